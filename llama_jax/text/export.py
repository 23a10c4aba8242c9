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
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llama_jax.text.added import library_tokens
from llama_jax.text.bpe import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    GPT2_REGEX,
    LLAMA3_PRE,
    LLAMA3_REGEX,
    PRE_TOKENIZERS,
    backend_from_gguf,
    byte_level_backend,
    llama3_control_tokens,
    read_ranks,
)
from llama_jax.text.chat import ChatError, chat_format
from llama_jax.text.facts import AddedToken
from llama_jax.text.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    model_from_gguf,
    read_pieces,
)
from llama_jax.text.tokenizer import (
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


@_refuses_wrong_types("the tokenizer's files")
def hf_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what transformers' `AutoTokenizer` loads.

    Args:
        files: Tokenizer files. With a `tokenizer.json`, or without any vocabulary, they stay as they are.

    Returns:
        The files, with a `tokenizer.json` and a `tokenizer_config.json` made from `tokenizer.model`. Meta's files do
        not tell a base model from a chat model: both get the chat template of their generation.

    Raises:
        ValueError: a file is damaged, or its SentencePiece model is not like a Llama's.
    """
    tokenizer = None if "tokenizer.json" in files else tokenizer_from_files(files)
    if tokenizer is None:
        return dict(files)
    config = json.loads(files.get("tokenizer_config.json", b"{}")) | _hf_config(tokenizer)
    if tokenizer.chat_template is None and "tokenizer_config.json" not in files:
        with contextlib.suppress(ChatError):  # a vocabulary of no known generation
            config["chat_template"] = _CHAT_TEMPLATES[chat_format(tokenizer).name]
    model = files["tokenizer.model"]
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
    return result


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
    files = {"tokenizer_config.json": _json(_hf_config(tokenizer))}
    if metadata["tokenizer.ggml.model"] == "llama":
        return hf_files({"tokenizer.model": model_from_gguf(metadata), **files})
    return {"tokenizer.json": _tokenizer_json(backend_from_gguf(metadata), tokenizer), **files}


@_refuses_wrong_types("the tokenizer's files")
def gguf_metadata(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """Returns the tokenizer's part of a GGUF file's metadata.

    Args:
        files: Tokenizer files.
        vocab_size: Rows of the embedding; llama.cpp wants as many tokens, so unused ones fill up.

    Returns:
        `tokenizer.*` keys to str, int, bool, list[str], list[float] or list[int].

    Raises:
        ValueError: a file is damaged, there are more than `vocab_size` tokens, or llama.cpp has no such tokenizer.
    """
    files = hf_files(files)
    tokenizer = tokenizer_from_files(files)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size} rows: use the"
            " tokenizer that belongs to these weights"
        )
    state = _state(files["tokenizer.json"])
    model, added = state["model"], {token["id"]: token["content"] for token in state["added_tokens"]}
    added |= {token.id: token.content for token in tokenizer.added_tokens if token.id is not None}
    texts = {i: text for text, i in model["vocab"].items()} | added
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    ids = {text: i for i, text in enumerate(tokens)}
    kinds = dict.fromkeys(added, USER_DEFINED) | dict.fromkeys(tokenizer.control_tokens.values(), CONTROL)
    if _is_byte_level(state):
        merges = [" ".join(pair) for pair in model["merges"]]
        vocabulary = {"model": "gpt2", "pre": _pre_tokenizer(state), "merges": merges}
    else:
        kinds |= {ids[name]: BYTE for byte in range(256) if (name := f"<0x{byte:02X}>") in ids}
        kinds |= {ids[name]: UNKNOWN for name in [model["unk_token"]] if name in ids}
        vocabulary = {"model": "llama", "pre": "default", "scores": _scores(files, model["merges"], tokens)}
    kinds |= {i: UNUSED for i, token in enumerate(tokens) if token == f"[PAD{i}]"}
    special = tokenizer.special_tokens
    roles = {
        "bos": tokenizer.bos_id,
        "eos": ids.get(special.get("eos_token", "")),
        "unknown": ids.get(special.get("unk_token", "")),
        "padding": ids.get(special.get("pad_token", "")),
        **{role: next((ids[name] for name in names if name in ids), None) for role, names in _GGUF_NAMES.items()},
    }
    metadata = {
        **vocabulary,
        "tokens": tokens,
        "token_type": [kinds.get(i, NORMAL) for i in range(vocab_size)],
        **{f"{role}_token_id": i for role, i in roles.items() if i is not None},
        "add_bos_token": tokenizer.add_bos,
        "add_space_prefix": tokenizer.drops_space,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.tool_template is not None:
        metadata |= {
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": tokenizer.tool_template,
        }
    _check_same_ids(tokenizer, tokenizer_from_gguf(metadata), "a GGUF file")
    return metadata


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
        _pre_tokenizer(state) in LLAMA3_PRE
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
    templates = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template}
    if tokenizer.tool_template is not None:
        config["chat_template"] = [{"name": k, "template": v} for k, v in templates.items() if v is not None]
    elif tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _backend_from_tiktoken(model: bytes, tokenizer: Tokenizer) -> Any:
    from tokenizers import models

    ranks = read_ranks(model, "tokenizer.model")
    vocab = {token.decode("latin-1").translate(BYTE_TO_CHAR): rank for token, rank in ranks.items()}
    merges = _merges(sorted(vocab, key=vocab.__getitem__), vocab)
    added = library_tokens(tokenizer.added_tokens, special=lambda token: token.special)
    # In the vocabulary, tokens beyond Llama 3's own keep their ids, whatever is missing between them.
    vocab |= {token.content: i for token in tokenizer.added_tokens if (i := token.id or 0) >= 128_256}
    return byte_level_backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), (LLAMA3_REGEX,), added)


def _backend_from_sentencepiece(model: bytes, tokenizer: Tokenizer, *, legacy: bool) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = read_pieces(model)
    control = tokenizer.control_tokens
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    plain = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == NORMAL and piece.text not in control}
    merges = _merges(sorted(plain, key=lambda text: -pieces[plain[text]].score), plain)
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    bpe = models.BPE(
        vocab=vocab | {token.content: i for token in tokenizer.added_tokens if (i := token.id) is not None},
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in pieces),
    )
    backend: Any = Backend(bpe)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if not tokenizer.drops_space:
        backend.normalizer = normalizers.Replace(" ", "▁")
    elif legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if tokenizer.drops_space else steps)
    added = {unknown: AddedToken(unknown, vocab[unknown], special=True, normalized=False)}
    added |= {
        piece.text: AddedToken(piece.text, i, normalized=False)
        for i, piece in enumerate(pieces)
        if piece.kind == USER_DEFINED
    }
    # SentencePiece has its prefix before all that is between two tokens: they are found in the raw text.
    added |= {token.content: dataclasses.replace(token, normalized=False) for token in tokenizer.added_tokens}
    in_order = sorted(added.values(), key=lambda token: token.id or 0)
    backend.add_tokens(library_tokens(in_order, special=lambda token: token.special))
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
        name for name, known in PRE_TOKENIZERS.items() if known == regexes and (name in LLAMA3_PRE) == whole_words
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


def _scores(files: Mapping[str, bytes], merges: list[list[str]], tokens: list[str]) -> list[float]:
    """Returns the score of every token: the higher, the earlier it is merged."""
    model = files.get("tokenizer.model", b"")
    if model and not is_tiktoken(model) and tokenizer_from_files({"tokenizer.model": model}):
        pieces = read_pieces(model)
        if tokens[: len(pieces)] == [piece.text for piece in pieces]:
            return [piece.score for piece in pieces] + [0.0] * (len(tokens) - len(pieces))
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(merges)])}
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _check_same_ids(tokenizer: Tokenizer, converted: Tokenizer | None, form: str) -> None:
    # Hugging Face's newer form of Llama 2's tokenizer adds no space to a text that starts with one: none here does.
    for text in (f"a{text}" for text in sample_texts()):
        # How a control token is spelt when it is text differs, and matters to no one.
        if tokenizer.split_control(text) == [text] and (
            converted is None or converted.encode(text) != tokenizer.encode(text)
        ):
            raise ValueError(
                f"this tokenizer is not like a Llama's: as {form} it would give other ids for {text!r}; use the"
                " tokenizer that belongs to these weights"
            )


def sample_texts() -> list[str]:
    """Returns some two hundred texts of many scripts and oddities, to compare two tokenizers by."""
    phrases = _PHRASES.strip().splitlines()
    spaces = [f"a{space * n}b{space * n}" for space in _SPACES for n in (1, 2, 3, 4, 7, 16)]
    numbers = ["0123456789"[: n + 1] * (n // 5 + 1) for n in range(10)]
    marks = [mark for char in string.punctuation for mark in (char, f" {char}{char}x")]
    return ["", *phrases, *(phrase[::-1] for phrase in phrases), *spaces, *numbers, *marks, *_CODE]


_SPACES = (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000")
_CODE = (
    'def f(x: int) -> str:\n    return f\'{x!r:>8}\'\n\n\nclass A(B):\n\t"""Doc."""\n',
    "for (int i = 0; i < n; ++i) { a[i] *= 2.5e-3f; }  // done\n#include <stdio.h>\n",
    "SELECT \"name\", COUNT(*) FROM t WHERE x <> 'y' GROUP BY 1;\n",
    '{"key": [1, null, true, "\\u00e9"], "b": {}}\r\n',
    "<div class='a'>&amp;&nbsp;</div>\n<!-- x -->",
    "\\begin{align} E &= mc^2 \\\\ \\end{align} $\\alpha_1$",
)
_PHRASES = """
The capital of France is Paris, isn't it? I'm sure we'LL see; they'd've said so.
À l'été, l'œuvre naïve coûte 5 €. Straße über Größe. Señor, ¿qué pasó?
Dziękuję, żółć. Příliš žluťoučký kůň. İstanbul'da ığdır. Þórður, Ærøskøbing.
Tiếng Việt: việc này rất quan trọng. Ng\u0303 e\u0301 o\u0302\u0323 a\u030a
Съешь же ещё этих мягких французских булок. Україна: їжак, ґанок.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ λόγος.
السلام عليكم، كيف حالك؟ العربيَّة ١٢٣٤٥ ﷺ
שלום עולם, מה שלומך? בְּרֵאשִׁית
नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १२३
สวัสดีชาวโลก วันนี้อากาศดีมาก ๑๒๓
வணக்கம் உலகம். ಕನ್ನಡ ಭಾಷೆ. বাংলা ভাষা। ગુજરાતી
你好，世界！今天天气怎么样？繁體中文：龍馬精神。𠮷野家
こんにちは世界。カタカナとひらがな、漢字ヲ混ゼル。ｶﾞｷﾞｸﾞ
안녕하세요, 세계! 오늘 날씨가 좋네요. \u1112\u1161\u11ab\u1100\u1173\u11af
გამარჯობა მსოფლიო. Բարեւ աշխարհ. ሰላም ልዑል። ភាសាខ្មែរ မြန်မာ
🦙 👩‍👩‍👧‍👦 👍🏽 🇫🇷🇯🇵 ❤️ 1️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ☺☻
x\u200by\u200dz\ufeffw\u00ad \u202eabc\u202c \x00\x07\x1b[0m\x7f\u0085 \ufffd\ue000\U0010fffd
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ xᵢ² ≠ ½ Ⅷ ① ﬁ ﬀ Å Ω
3.14159 1,234,567.89 0xDEADBEEF 1e-10 12:34:56 2024-07-23 +49 (0)30 ١٢ Ⅻ ²³
https://user@example.com:8080/path/?q=a%20b&c=#frag C:\\Users\\x a_b-c.d/e
<|begin_of_text|><|start_header_id|>user<|end_header_id|> hi<|eot_id|><|python_tag|>
<s>[INST] <<SYS>> be brief <</SYS>> hello [/INST] hi </s><unk><pad><0x0A><step>
<PRE> def f <SUF> return <MID> <EOT>▁<PRE>▁▁a▁b <|im_start|>system<|im_end|><|endoftext|>
ALL CAPS AND camelCaseWords snake_case_words kebab-case-words aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
abababababababa 哈哈哈哈哈哈哈 !!!!!!?????......------______=====~~~~
"""
