"""A checkpoint's tokenizer in the spelling of another format, with the same ids.

*Tokenizer files* are a mapping of file name to content: Hugging Face's files, and Meta's `tokenizer.model`.
transformers wants a `tokenizer.json`, Meta's code a `tokenizer.model`, llama.cpp metadata in the GGUF file.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.text.added import STOP_TOKENS, library_tokens
from llama_jax.text.bpe import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    byte_level_backend,
    llama3_control_tokens,
    read_ranks,
)
from llama_jax.text.chat import ChatError, guessed_format
from llama_jax.text.facts import AddedToken as Added
from llama_jax.text.gguf import backend_from_gguf, is_sentencepiece, model_from_gguf
from llama_jax.text.pre_tokenizers import GPT2_REGEX, LLAMA3_REGEX, PRE_TOKENIZERS
from llama_jax.text.samples import sample_texts as sample_texts
from llama_jax.text.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelType,
    read_pieces,
    read_spec,
)
from llama_jax.text.tokenizer import (
    VOCABULARY_FILES,
    Tokenizer,
    file_facts,
    is_tiktoken,
    tokenizer_from_files,
    tokenizer_from_gguf,
)
from llama_jax.text.tokenizer import read_files as read_files  # of the folder that a tokenizer comes from

_TEXT = """
{%- macro text(m) %}
    {{- m.content if m.content is string else m.content | map(attribute='text') | join }}
{%- endmacro %}"""
# By the names of `chat.py`'s formats: the same ids, in Jinja.
_CHAT_TEMPLATES = {
    "llama2": _TEXT
    + r"""
{%- set system, turns = '', messages %}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = '<<SYS>>\n' + text(messages[0]) + '\n<</SYS>>\n\n', messages[1:] %}
{%- endif %}
{%- for m in turns %}
    {%- if m.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('roles must alternate user, assistant, user, ...') }}
    {%- endif %}
    {%- set content = ((system if loop.first else '') + text(m)) | trim %}
    {{- bos_token + '[INST] ' + content + ' [/INST]' if m.role == 'user' else ' ' + content + ' ' + eos_token }}
{%- endfor %}""",
    "codellama70b": _TEXT
    + r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- ' Source: system<step>' }}
{%- endif %}
{%- for m in messages %}
    {%- set content = text(m) | trim %}
    {{- ' Source: ' + m.role + (' \n\n ' + content if content else '') + '<step>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' Source: assistant\nDestination: user \n\n ' }}
{%- endif %}""",
    "llama3": _TEXT
    + r"""
{%- macro header(role) %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- endmacro %}
{{- bos_token }}
{%- for m in messages %}
    {{- header('ipython' if m.role == 'tool' else m.role) + text(m) | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}""",
}

# tokenizer.ggml.<name>_token_id -> how Llama 3 and Code Llama spell it.
_GGUF_NAMES = {
    "eot": ("<|eot_id|>", "▁<EOT>"),
    "eom": ("<|eom_id|>",),
    "fim_pre": ("▁<PRE>",),
    "fim_suf": ("▁<SUF>",),
    "fim_mid": ("▁<MID>",),
}
# What Meta's code finds by its place after the ranks.
_LLAMA3_MARKERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


@contextlib.contextmanager
def _refuses_wrong_types(source: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"a value in {source} has the wrong type ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}: download the checkpoint again") from error


class _Inexact(ValueError):
    """A format cannot say what a tokenizer does."""


def with_named_ids(files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Returns the files with the ids of tokens that they only name, which depend on how many rows the model has.

    Args:
        files: Tokenizer files.
        tokenizer: Of these files and of the model's config.json.
    """
    vocabulary = b"".join(files.get(name, b"") for name in VOCABULARY_FILES)
    named = {token.content for token in file_facts(files).added_tokens if token.id is None}
    ids = {token.content: token.id for token in (tokenizer.added_tokens if tokenizer else ()) if token.content in named}
    ids = {text: i for text, i in ids.items() if text.encode() not in vocabulary}
    if not ids:
        return dict(files)
    return {**files, "added_tokens.json": _json(json.loads(files.get("added_tokens.json", b"{}")) | ids)}


@_refuses_wrong_types("the tokenizer's files")
def hf_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what transformers' `AutoTokenizer` loads.

    Args:
        files: Tokenizer files. With a `tokenizer.json`, or without any vocabulary, they stay as they are.

    Returns:
        The files, with a `tokenizer.json` and a `tokenizer_config.json` made from `tokenizer.model`. Meta's files do
        not tell a base model from a chat model: both get the chat template of their generation. Where no
        `tokenizer.json` says exactly what `tokenizer.model` does, the files stay as they are; see `hf_warnings`.

    Raises:
        ValueError: a file is damaged.
    """
    tokenizer = None if "tokenizer.json" in files else tokenizer_from_files(files)
    if tokenizer is None:
        return dict(files)
    config = json.loads(files.get("tokenizer_config.json", b"{}")) | _hf_config(tokenizer)
    if tokenizer.chat_template is None and "tokenizer_config.json" not in files:
        with contextlib.suppress(ChatError):  # a marker is missing
            if (chat := guessed_format(tokenizer)) is not None:
                config["chat_template"] = _CHAT_TEMPLATES[chat.name]
    model = files["tokenizer.model"]
    try:
        if is_tiktoken(model):
            backend = _backend_from_tiktoken(model, tokenizer)
        else:
            backend = _backend_from_sentencepiece(model, tokenizer, legacy=file_facts(files).legacy)
        result = {
            **files,
            "tokenizer.json": _tokenizer_json(backend, tokenizer),
            "tokenizer_config.json": _json(config),
        }
        _check_same_ids(tokenizer, tokenizer_from_files(result), "tokenizer.json")
    except _Inexact:
        return dict(files)
    return result


def hf_warnings(files: Mapping[str, bytes]) -> list[str]:
    """Returns what transformers does otherwise with the files of `hf_files`, in words."""
    if "tokenizer.json" in files or "tokenizer.model" not in files:
        return []
    return [
        "no tokenizer.json says exactly what this tokenizer.model does (its normalization, or its kind), so there is"
        " only tokenizer.model: sentencepiece and transformers 4 with use_fast=False give its ids, transformers 5"
        " gives other ids for some texts"
    ]


@_refuses_wrong_types("the GGUF file's metadata")
def hf_files_from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns what transformers' `AutoTokenizer` loads, and a `tokenizer.model` of a SentencePiece vocabulary.

    Args:
        metadata: The GGUF file's metadata: key to value; arrays may be lists or numpy arrays.

    Returns:
        Tokenizer files; none where the GGUF file has no tokenizer.

    Raises:
        ValueError: the metadata are damaged, or of another kind than `llama` and `gpt2`.
    """
    tokenizer = tokenizer_from_gguf(metadata)
    if tokenizer is None:
        return {}
    config = _hf_config(tokenizer)
    if is_sentencepiece(metadata):
        config["added_tokens_decoder"] = {
            str(token.id): {key: value for key, value in dataclasses.asdict(token).items() if key != "id"}
            for token in tokenizer.added_tokens
        }
        return hf_files({"tokenizer.model": model_from_gguf(metadata), "tokenizer_config.json": _json(config)})
    files = {"tokenizer_config.json": _json(config)}
    return {"tokenizer.json": _tokenizer_json(backend_from_gguf(metadata), tokenizer), **files}


@_refuses_wrong_types("the tokenizer's files")
def gguf_metadata(files: Mapping[str, bytes], vocab_size: int, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the tokenizer's part of a GGUF file's metadata.

    Args:
        files: Tokenizer files.
        vocab_size: Rows of the embedding; llama.cpp wants as many tokens, so unused ones fill up, and added tokens
            that have no row are left out.
        stop_ids: Ids that end generation, besides those that the files name.

    Returns:
        `tokenizer.*` keys to str, int, bool, bytes, list[str], list[float] or list[int].

    Raises:
        ValueError: a file is damaged, there are more than `vocab_size` tokens, or llama.cpp has no such tokenizer.
    """
    files = hf_files(files)
    tokenizer = tokenizer_from_files(files)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if "tokenizer.json" in files:
        texts, kinds, vocabulary = _of_tokenizer_json(files)
    else:
        texts, kinds, vocabulary = _of_sentencepiece(files["tokenizer.model"])
    added = _added(tokenizer)
    if any(i >= vocab_size and i not in added for i in texts):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size} rows: use the"
            " tokenizer that belongs to these weights"
        )
    texts |= {i: token.content for i, token in added.items()}
    hidden = {i for i in added if not tokenizer.token_bytes(i)}
    fixed = {i: kind for i, kind in kinds.items() if kind in (BYTE, UNKNOWN)}
    kinds |= {i: CONTROL if i in hidden else USER_DEFINED for i in added} | fixed
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds |= {i: UNUSED for i in range(vocab_size) if i not in texts}
    scores = vocabulary.pop("scores", None)
    metadata = {
        **vocabulary,
        "tokens": tokens,
        "token_type": [kinds.get(i, NORMAL) for i in range(vocab_size)],
        **({} if scores is None else {"scores": [scores.get(i, 0.0) for i in range(vocab_size)]}),
        **_gguf_roles(tokenizer, tokens, stop_ids),
        "add_bos_token": tokenizer.add_bos,
        "add_space_prefix": tokenizer.drops_space,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    named = {name: text for name, text in _templates(tokenizer).items() if name != "default"}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if named:
        metadata["tokenizer.chat_templates"] = list(named)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    _check_same_ids(tokenizer, tokenizer_from_gguf(metadata), "a GGUF file")
    return metadata


def gguf_warnings(metadata: Mapping[str, Any]) -> list[str]:
    """Returns what llama.cpp does otherwise with the metadata of `gguf_metadata`, in words."""
    keys = ("precompiled_charsmap", "remove_extra_whitespaces")
    held = [key for key in keys if metadata.get(f"tokenizer.ggml.{key}")]
    if metadata.get("tokenizer.ggml.model") != "llama" or not held:
        return []
    return [
        f"llama.cpp does not read {' and '.join(held)} for this kind of tokenizer: it gives other ids for some texts"
    ]


def _gguf_roles(tokenizer: Tokenizer, tokens: list[str], stop_ids: Sequence[int]) -> dict[str, Any]:
    """Returns the special ids by GGUF's names."""
    ids, special = {text: i for i, text in enumerate(tokens)}, tokenizer.special_tokens
    roles = {
        "bos": tokenizer.bos_id,
        "eos": ids.get(special.get("eos_token", "")),
        "unknown": ids.get(special.get("unk_token", "")),
        "padding": ids.get(special.get("pad_token", "")),
        **{role: next((ids[name] for name in names if name in ids), None) for role, names in _GGUF_NAMES.items()},
    }
    ends = sorted(i for i in {*tokenizer.stop_ids, *stop_ids} if i < len(tokens))
    known = {ids[name] for name in STOP_TOKENS if name in ids} | {roles[role] for role in ("eos", "eot", "eom")}
    if roles["eos"] is None and ends:
        roles["eos"] = ends[0]
    found: dict[str, Any] = {f"{role}_token_id": i for role, i in roles.items() if i is not None and i < len(tokens)}
    return found if known.issuperset(ends) else found | {"eos_token_ids": ends}  # ollama's key


def _of_tokenizer_json(files: Mapping[str, bytes]) -> tuple[dict[int, str], dict[int, int], dict[str, Any]]:
    """Returns the tokens of a tokenizer.json, the types of some of them, and the keys of its kind."""
    state = _state(files["tokenizer.json"])
    model = state["model"]
    texts = {i: text for text, i in model["vocab"].items()}
    if _is_byte_level(state):
        # The gguf package writes no empty list, and llama.cpp wants the key: the empty merge is none.
        merges = [" ".join(pair) for pair in model["merges"]] or [""]
        return texts, {}, {"model": "gpt2", "pre": _pre_tokenizer(state), "merges": merges}
    ids = model["vocab"]
    kinds = {ids[name]: BYTE for byte in range(256) if (name := f"<0x{byte:02X}>") in ids}
    kinds |= {ids[name]: UNKNOWN for name in [model["unk_token"]] if name in ids}
    scores = _scores(files, model["merges"], texts)
    spaces = {"remove_extra_whitespaces": True} if " {2,}" in json.dumps(state["normalizer"]) else {}
    return texts, kinds, {"model": "llama", "pre": "default", "scores": scores, **spaces}


def _of_sentencepiece(model: bytes) -> tuple[dict[int, str], dict[int, int], dict[str, Any]]:
    """Returns the tokens of a tokenizer.model, their types, and the keys of its kind."""
    if is_tiktoken(model):
        raise ValueError("this tokenizer.model is not Llama 3's own: convert with llama.cpp's own script")
    pieces, spec = read_pieces(model), read_spec(model)
    kinds: dict[int, str] = {ModelType.BPE: "llama", ModelType.UNIGRAM: "t5"}
    if spec.kind not in kinds:
        raise ValueError(
            f"tokenizer.model is of SentencePiece's kind {spec.kind}: a GGUF file has none but BPE and unigram"
        )
    keys = {
        "model": kinds[spec.kind],
        "pre": "default",
        "scores": {i: piece.score for i, piece in enumerate(pieces)},
        **({"remove_extra_whitespaces": True} if spec.remove_spaces else {}),
        **({"precompiled_charsmap": spec.charsmap} if spec.charsmap else {}),
    }
    fixed = {i: piece.kind for i, piece in enumerate(pieces) if piece.kind != NORMAL}
    return {i: piece.text for i, piece in enumerate(pieces)}, fixed, keys


@_refuses_wrong_types("the tokenizer's files")
def meta_files(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Returns what goes into a Meta folder.

    Args:
        files: Tokenizer files.

    Returns:
        The files, with a `tokenizer.model` if they had none and it can be rebuilt; and warnings about what Meta's code
        will miss. Hugging Face's files stay: they say all that there is to say, and llama_jax prefers them.

    Raises:
        ValueError: a file is damaged.
    """
    files, tokenizer = dict(files), tokenizer_from_files(files)
    if tokenizer is None:
        return files, []
    if "tokenizer.model" not in files:
        try:
            files["tokenizer.model"] = _meta_model(files, tokenizer)
        except ValueError as error:
            return files, [f"Meta's code cannot use this tokenizer, for it cannot be a tokenizer.model: {error}"]
    meta = tokenizer_from_files({"tokenizer.model": files["tokenizer.model"]})
    if meta is not None and meta.vocab_size < tokenizer.vocab_size:
        return files, [
            f"Meta's code reads only the first {meta.vocab_size} of {tokenizer.vocab_size} tokens: tokenizer.model has"
            " no place for tokens that were added later"
        ]
    return files, []


def _meta_model(files: Mapping[str, bytes], tokenizer: Tokenizer) -> bytes:
    """Makes a `tokenizer.model` from a `tokenizer.json`: Llama 3's tiktoken file, or a SentencePiece model."""
    state = _state(files["tokenizer.json"])
    if not _is_byte_level(state):
        return model_from_gguf(gguf_metadata(files, tokenizer.vocab_size))
    vocab = {text: i for text, i in state["model"]["vocab"].items() if i < 128_000}
    merges = [(left, right) for left, right in state["model"]["merges"]]
    known = llama3_control_tokens()
    # tiktoken merges what makes the lowest id, whatever its two parts, down to single bytes.
    if not (
        _pre_tokenizer(state) == "llama-bpe"
        and sorted(vocab.values()) == list(range(128_000))
        and all(tokenizer.control_tokens.get(name) == known[name] for name in _LLAMA3_MARKERS)
        and {chr(char) for char in CHAR_TO_BYTE} == set("".join(vocab)) <= vocab.keys()
        and set(merges) == set(_merges(vocab, vocab))
        and all(vocab[a + b] <= vocab[c + d] for (a, b), (c, d) in itertools.pairwise(merges))
    ):
        raise ValueError("its format has none but SentencePiece's and Llama 3's vocabularies")
    ranks = {text.translate(CHAR_TO_BYTE).encode("latin-1"): i for text, i in vocab.items()}
    lines = (f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in sorted(ranks, key=ranks.__getitem__))
    return "".join(lines).encode()


def _hf_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what `tokenizer_config.json` has to say; transformers' own clean-up would eat spaces."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    named = _templates(tokenizer)
    if named.keys() - {"default"}:
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif named:
        config["chat_template"] = tokenizer.chat_template
    return config


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the chat templates by name."""
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template, **tokenizer.chat_templates}
    return {name: text for name, text in named.items() if text is not None}


def _backend_from_tiktoken(model: bytes, tokenizer: Tokenizer) -> Any:
    from tokenizers import models

    ranks = read_ranks(model, "tokenizer.model")
    vocab = {token.decode("latin-1").translate(BYTE_TO_CHAR): rank for token, rank in ranks.items()}
    merges = _merges(sorted(vocab, key=vocab.__getitem__), vocab)
    added = _library_tokens(tokenizer)
    if len(tokenizer.added_tokens) > 256:  # the library would number them by the size of the vocabulary, gaps apart
        vocab |= {token.content: i for i, token in _added(tokenizer).items()}
    return byte_level_backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), (LLAMA3_REGEX,), added)


def _added(tokenizer: Tokenizer) -> dict[int, Added]:
    """Returns the tokenizer's added tokens by id."""
    return {token.id: token for token in tokenizer.added_tokens if token.id is not None}


def _library_tokens(tokenizer: Tokenizer, but: Container[str] = ()) -> list[Any]:
    """Returns the tokenizer's added tokens as the library has them, special where no text shows them."""
    # SentencePiece has its prefix before all that is between two tokens: they are found in the raw text.
    return library_tokens(
        (dataclasses.replace(t, normalized=False) for t in tokenizer.added_tokens if t.content not in but),
        special=lambda token: token.special or (token.id is not None and not tokenizer.token_bytes(token.id)),
    )


def _backend_from_sentencepiece(model: bytes, tokenizer: Tokenizer, *, legacy: bool) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces, spec = read_pieces(model), read_spec(model)
    if spec.kind != ModelType.BPE or spec.charsmap:
        raise _Inexact("the library has no such model, or normalizes by another table")
    added = {token.content: i for i, token in _added(tokenizer).items()}
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    plain = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == NORMAL and piece.text not in added}
    merges = _merges(sorted(plain, key=lambda text: -pieces[plain[text]].score), plain)
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    bpe = models.BPE(
        vocab=vocab | added,
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in pieces),
    )
    backend: Any = Backend(bpe)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    normal: list[Any] = []
    if spec.remove_spaces:  # at the end, a typed "▁" counts as one
        normal = [normalizers.Replace(Regex(regex), text) for regex, text in ((r"\A +", ""), (" {2,}", " "))]
        normal += [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"▁+\z"), "")]
    if tokenizer.drops_space and legacy:
        normal += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    elif tokenizer.drops_space:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        normal += [normalizers.Replace(" ", "▁")]
    if normal:
        backend.normalizer = normalizers.Sequence(normal) if len(normal) > 1 else normal[0]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if tokenizer.drops_space else steps)
    words = {p.text: AddedToken(p.text, normalized=False) for p in pieces if p.kind == USER_DEFINED}
    words = {text: token for text, token in words.items() if text not in added}
    words[unknown] = AddedToken(unknown, special=True, normalized=False)
    tokens = {token.content: token for token in _library_tokens(tokenizer, but=[unknown])} | words
    ids = vocab | added
    backend.add_tokens([tokens[text] for text in sorted(tokens, key=ids.__getitem__)])
    return backend


def _merges(pieces: Iterable[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Lists every split of every piece into two of the vocabulary, as Hugging Face's converters do.

    Args:
        pieces: What is merged, first come, first merged.
        vocab: Piece to id; splits of one piece come in the order of their parts' ids.
    """
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        merges += sorted(known, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    return merges


def _tokenizer_json(backend: Any, tokenizer: Tokenizer) -> bytes:
    from tokenizers import processors

    bos = tokenizer.special_tokens.get("bos_token")
    if tokenizer.add_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    return backend.to_str(pretty=True).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _state(tokenizer_json: bytes) -> dict[str, Any]:
    """Parses a `tokenizer.json` of any age as the library of today would write it."""
    from tokenizers import Tokenizer

    state = json.loads(Tokenizer.from_buffer(tokenizer_json).to_str())
    if (kind := state["model"]["type"]) != "BPE":
        raise ValueError(f"tokenizer.json has a model of type {kind}: a Llama's is BPE; use another checkpoint")
    return state


def _is_byte_level(state: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(state["decoder"])


def _pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a byte-level `tokenizer.json`."""
    regexes, whole_words = _regexes(state["pre_tokenizer"]), state["model"]["ignore_merges"]
    fitting = (
        name for name, known in PRE_TOKENIZERS.items() if (known.regexes, known.whole_words) == (regexes, whole_words)
    )
    name = None if state["normalizer"] else next(fitting, None)
    if name is None:
        raise ValueError(
            f"tokenizer.json has normalizer {state['normalizer']}, ignore_merges {whole_words} and splits text by"
            f" {regexes}: llama.cpp has no name for this that llama_jax knows; convert with llama.cpp's own script"
        )
    return name


def _regexes(state: Any) -> tuple[str, ...]:
    """Returns the regexes by which a pre-tokenizer splits text, one after the other; what is none stays as it is."""
    match state:
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(regex for step in steps for regex in _regexes(step))
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (regex,)
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (GPT2_REGEX,) if use_regex else ()
    return (str(state),)


def _scores(files: Mapping[str, bytes], merges: list[list[str]], texts: Mapping[int, str]) -> dict[int, float]:
    """Returns the score of every token: the higher, the earlier it is merged."""
    model = files.get("tokenizer.model", b"")
    if model and not is_tiktoken(model) and tokenizer_from_files({"tokenizer.model": model}):
        pieces = read_pieces(model)
        if all(texts.get(i) == piece.text for i, piece in enumerate(pieces)):
            return {i: piece.score for i, piece in enumerate(pieces)}
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(merges)])}
    return {i: -float(ranks.get(text, len(merges))) for i, text in texts.items()}


def _check_same_ids(tokenizer: Tokenizer, converted: Tokenizer | None, form: str) -> None:
    # Hugging Face's newer form of Llama 2's tokenizer adds no space to a text that starts with one: none here does.
    # What formats cannot say of added words, such as the spaces that some take, `differences` tells.
    words = [token.content for token in tokenizer.added_tokens if token.content]
    for text in (f"a{text}" for text in sample_texts()):
        # How a control token is spelt when it is text differs, and matters to no one.
        if tokenizer.split_control(text) != [text] or any(word in text for word in words):
            continue
        if converted is None or converted.encode(text) != tokenizer.encode(text):
            raise _Inexact(
                f"as {form} this tokenizer would give other ids for some texts, first {text!r}: the format cannot say"
                " what it does; convert to hf or meta, which keep its files"
            )
