"""A tokenizer as transformers loads it: `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Container, Iterable, Mapping

from llama_jax.text.added import library_tokens
from llama_jax.text.base import VOCABULARY_FILES, Tokenizer
from llama_jax.text.bpe import (
    BYTE_TO_CHAR,
    byte_level_backend,
    read_ranks,
)
from llama_jax.text.chat import ChatError, guessed_format
from llama_jax.text.export.common import (
    InexactError,
    added_of,
    check_same_ids,
    refuses_wrong_types,
    templates_of,
    to_json,
)
from llama_jax.text.export.templates import CHAT_TEMPLATES
from llama_jax.text.facts import file_facts
from llama_jax.text.gguf import backend_from_gguf, is_sentencepiece, model_from_gguf
from llama_jax.text.open import is_tiktoken, tokenizer_from_files, tokenizer_from_gguf
from llama_jax.text.open import read_files as read_files  # of the folder that a tokenizer comes from
from llama_jax.text.pre_tokenizers import LLAMA3_REGEX
from llama_jax.text.samples import sample_texts as sample_texts
from llama_jax.text.spm import (
    BYTE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    ModelType,
    read_pieces,
    read_spec,
)
from llama_jax.typing import Fields, Foreign, JsonObject


def with_named_ids(files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Returns the files with the ids of tokens that they only name, which depend on how many rows the model has.

    Args:
      files: tokenizer files.
      tokenizer: of these files and of the model's config.json.
    """
    vocabulary = b"".join(files.get(name, b"") for name in VOCABULARY_FILES)
    named = {token.content for token in file_facts(files).added_tokens if token.id is None}
    ids = {token.content: token.id for token in (tokenizer.added_tokens if tokenizer else ()) if token.content in named}
    ids = {text: i for text, i in ids.items() if text.encode() not in vocabulary}
    if not ids:
        return dict(files)
    return {**files, "added_tokens.json": to_json(json.loads(files.get("added_tokens.json", b"{}")) | ids)}


@refuses_wrong_types("the tokenizer's files")
def hf_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what transformers' `AutoTokenizer` loads.

    Args:
      files: tokenizer files. With a `tokenizer.json`, or without any vocabulary, they stay as they are.

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
                config["chat_template"] = CHAT_TEMPLATES[chat.name]
    model = files["tokenizer.model"]
    try:
        if is_tiktoken(model):
            backend = _backend_from_tiktoken(model, tokenizer)
        else:
            backend = _backend_from_sentencepiece(model, tokenizer, legacy=file_facts(files).legacy)
        result = {
            **files,
            "tokenizer.json": _tokenizer_json(backend, tokenizer),
            "tokenizer_config.json": to_json(config),
        }
        check_same_ids(tokenizer, tokenizer_from_files(result), "tokenizer.json")
    except InexactError:
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


@refuses_wrong_types("the GGUF file's metadata")
def hf_files_from_gguf(metadata: Fields) -> dict[str, bytes]:
    """Returns what transformers' `AutoTokenizer` loads, and a `tokenizer.model` of a SentencePiece vocabulary.

    Args:
      metadata: the GGUF file's metadata: key to value; arrays may be lists or numpy arrays.

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
        return hf_files({"tokenizer.model": model_from_gguf(metadata), "tokenizer_config.json": to_json(config)})
    files = {"tokenizer_config.json": to_json(config)}
    return {"tokenizer.json": _tokenizer_json(backend_from_gguf(metadata), tokenizer), **files}


def _hf_config(tokenizer: Tokenizer) -> JsonObject:
    """Returns what `tokenizer_config.json` has to say; transformers' own clean-up would eat spaces."""
    config: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    named = templates_of(tokenizer)
    if named.keys() - {"default"}:
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif named:
        config["chat_template"] = tokenizer.chat_template
    return config


def _backend_from_tiktoken(model: bytes, tokenizer: Tokenizer) -> Foreign:
    from tokenizers import models

    ranks = read_ranks(model, "tokenizer.model")
    vocab = {token.decode("latin-1").translate(BYTE_TO_CHAR): rank for token, rank in ranks.items()}
    merges = _merges(sorted(vocab, key=vocab.__getitem__), vocab)
    added = _library_tokens(tokenizer)
    if len(tokenizer.added_tokens) > 256:  # the library would number them by the size of the vocabulary, gaps apart
        vocab |= {token.content: i for i, token in added_of(tokenizer).items()}
    return byte_level_backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), (LLAMA3_REGEX,), added)


def _library_tokens(tokenizer: Tokenizer, but: Container[str] = ()) -> list[Foreign]:
    """Returns the tokenizer's added tokens as the library has them, special where no text shows them."""
    # SentencePiece has its prefix before all that is between two tokens: they are found in the raw text.
    return library_tokens(
        (dataclasses.replace(t, normalized=False) for t in tokenizer.added_tokens if t.content not in but),
        special=lambda token: token.special or (token.id is not None and not tokenizer.token_bytes(token.id)),
    )


def _backend_from_sentencepiece(model: bytes, tokenizer: Tokenizer, *, legacy: bool) -> Foreign:
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    pieces, spec = read_pieces(model), read_spec(model)
    if spec.kind != ModelType.BPE or spec.charsmap:
        raise InexactError("the library has no such model, or normalizes by another table")
    added = {token.content: i for i, token in added_of(tokenizer).items()}
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
    backend: Foreign = Backend(bpe)
    _set_spaces(backend, remove=spec.remove_spaces, drops=tokenizer.drops_space, legacy=legacy)
    words = {p.text: AddedToken(p.text, normalized=False) for p in pieces if p.kind == USER_DEFINED}
    words = {text: token for text, token in words.items() if text not in added}
    words[unknown] = AddedToken(unknown, special=True, normalized=False)
    tokens = {token.content: token for token in _library_tokens(tokenizer, but=[unknown])} | words
    ids = vocab | added
    backend.add_tokens([tokens[text] for text in sorted(tokens, key=ids.__getitem__)])
    return backend


def _set_spaces(backend: Foreign, *, remove: bool, drops: bool, legacy: bool) -> None:
    """Gives a backend SentencePiece's way with spaces: `remove` all but single ones, and a first one that `drops`."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    normal: list[Foreign] = []
    if remove:  # at the end, a typed "▁" counts as one
        normal = [normalizers.Replace(Regex(regex), text) for regex, text in ((r"\A +", ""), (" {2,}", " "))]
        normal += [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"▁+\z"), "")]
    if drops and legacy:
        normal += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    elif drops:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        normal += [normalizers.Replace(" ", "▁")]
    if normal:
        backend.normalizer = normalizers.Sequence(normal) if len(normal) > 1 else normal[0]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if drops else steps)


def _merges(pieces: Iterable[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Lists every split of every piece into two of the vocabulary, as Hugging Face's converters do.

    Args:
      pieces: what is merged, first come, first merged.
      vocab: piece to id; splits of one piece come in the order of their parts' ids.
    """
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        merges += sorted(known, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    return merges


def _tokenizer_json(backend: Foreign, tokenizer: Tokenizer) -> bytes:
    from tokenizers import processors

    bos = tokenizer.special_tokens.get("bos_token")
    if tokenizer.add_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    return backend.to_str(pretty=True).encode()
