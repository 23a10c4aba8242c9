"""A tokenizer as a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.text.added import STOP_TOKENS
from llama_jax.text.base import Tokenizer
from llama_jax.text.export.common import added_of, check_same_ids, refuses_wrong_types, state_of, templates_of
from llama_jax.text.export.hf import hf_files
from llama_jax.text.open import is_tiktoken, tokenizer_from_files, tokenizer_from_gguf
from llama_jax.text.open import read_files as read_files  # of the folder that a tokenizer comes from
from llama_jax.text.pre_tokenizers import GPT2_REGEX, PRE_TOKENIZERS
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
from llama_jax.typing import Fields, JsonObject

# tokenizer.ggml.<name>_token_id -> how Llama 3 and Code Llama spell it.
_GGUF_NAMES = {
    "eot": ("<|eot_id|>", "▁<EOT>"),
    "eom": ("<|eom_id|>",),
    "fim_pre": ("▁<PRE>",),
    "fim_suf": ("▁<SUF>",),
    "fim_mid": ("▁<MID>",),
}


@refuses_wrong_types("the tokenizer's files")
def gguf_metadata(files: Mapping[str, bytes], vocab_size: int, stop_ids: Sequence[int] = ()) -> JsonObject:
    """Returns the tokenizer's part of a GGUF file's metadata.

    Args:
      files: tokenizer files.
      vocab_size: rows of the embedding; llama.cpp wants as many tokens, so unused ones fill up, and added tokens
        that have no row are left out.
      stop_ids: ids that end generation, besides those that the files name.

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
    tokens, token_type = _tokens(tokenizer, texts, kinds, vocab_size)
    scores = vocabulary.pop("scores", None)
    metadata = {
        **vocabulary,
        "tokens": tokens,
        "token_type": token_type,
        **({} if scores is None else {"scores": [scores.get(i, 0.0) for i in range(vocab_size)]}),
        **_gguf_roles(tokenizer, tokens, stop_ids),
        "add_bos_token": tokenizer.add_bos,
        "add_space_prefix": tokenizer.drops_space,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | _chat_templates(tokenizer)
    check_same_ids(tokenizer, tokenizer_from_gguf(metadata), "a GGUF file")
    return metadata


def _tokens(
    tokenizer: Tokenizer, texts: dict[int, str], kinds: dict[int, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Returns text and type of every row, from those of the vocabulary."""
    added = added_of(tokenizer)
    if any(i >= vocab_size and i not in added for i in texts):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size} rows: use the"
            " tokenizer that belongs to these weights"
        )
    texts = texts | {i: token.content for i, token in added.items()}
    hidden = {i for i in added if not tokenizer.token_bytes(i)}
    fixed = {i: kind for i, kind in kinds.items() if kind in (BYTE, UNKNOWN)}
    kinds = kinds | {i: CONTROL if i in hidden else USER_DEFINED for i in added} | fixed
    kinds |= {i: UNUSED for i in range(vocab_size) if i not in texts}
    rows = range(vocab_size)
    return [texts.get(i, f"[PAD{i}]") for i in rows], [kinds.get(i, NORMAL) for i in rows]


def _chat_templates(tokenizer: Tokenizer) -> JsonObject:
    named = {name: text for name, text in templates_of(tokenizer).items() if name != "default"}
    found: JsonObject = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        found = {"tokenizer.chat_templates": list(named), **found}
    if tokenizer.chat_template is not None:
        found = {"tokenizer.chat_template": tokenizer.chat_template, **found}
    return found


def gguf_warnings(metadata: Fields) -> list[str]:
    """Returns what llama.cpp does otherwise with the metadata of `gguf_metadata`, in words."""
    keys = ("precompiled_charsmap", "remove_extra_whitespaces")
    held = [key for key in keys if metadata.get(f"tokenizer.ggml.{key}")]
    if metadata.get("tokenizer.ggml.model") != "llama" or not held:
        return []
    return [
        f"llama.cpp does not read {' and '.join(held)} for this kind of tokenizer: it gives other ids for some texts"
    ]


def _gguf_roles(tokenizer: Tokenizer, tokens: list[str], stop_ids: Sequence[int]) -> JsonObject:
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
    found: JsonObject = {f"{role}_token_id": i for role, i in roles.items() if i is not None and i < len(tokens)}
    return found if known.issuperset(ends) else found | {"eos_token_ids": ends}  # ollama's key


def _of_tokenizer_json(files: Mapping[str, bytes]) -> tuple[dict[int, str], dict[int, int], JsonObject]:
    """Returns the tokens of a tokenizer.json, the types of some of them, and the keys of its kind."""
    state = state_of(files["tokenizer.json"])
    model = state["model"]
    texts = {i: text for text, i in model["vocab"].items()}
    if is_byte_level(state):
        # The gguf package writes no empty list, and llama.cpp wants the key: the empty merge is none.
        merges = [" ".join(pair) for pair in model["merges"]] or [""]
        return texts, {}, {"model": "gpt2", "pre": _pre_tokenizer(state), "merges": merges}
    ids = model["vocab"]
    kinds = {ids[name]: BYTE for byte in range(256) if (name := f"<0x{byte:02X}>") in ids}
    kinds |= {ids[name]: UNKNOWN for name in [model["unk_token"]] if name in ids}
    scores = _scores(files, model["merges"], texts)
    spaces = {"remove_extra_whitespaces": True} if " {2,}" in json.dumps(state["normalizer"]) else {}
    return texts, kinds, {"model": "llama", "pre": "default", "scores": scores, **spaces}


def _of_sentencepiece(model: bytes) -> tuple[dict[int, str], dict[int, int], JsonObject]:
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


def is_byte_level(state: Fields) -> bool:
    """Returns whether a tokenizer.json is of GPT-2's kind: bytes, not pieces of text."""
    return '"ByteLevel"' in json.dumps(state["decoder"])


def _pre_tokenizer(state: Fields) -> str:
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
