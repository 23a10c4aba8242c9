"""A tokenizer as Meta's code loads it: `tokenizer.model`."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping

from llama_jax.text.base import Tokenizer
from llama_jax.text.bpe import (
    CHAR_TO_BYTE,
    llama3_control_tokens,
)
from llama_jax.text.export.common import refuses_wrong_types, state_of
from llama_jax.text.export.gguf import _pre_tokenizer, gguf_metadata, is_byte_level
from llama_jax.text.export.hf import _merges
from llama_jax.text.gguf import model_from_gguf
from llama_jax.text.open import read_files as read_files  # of the folder that a tokenizer comes from
from llama_jax.text.open import tokenizer_from_files
from llama_jax.text.samples import sample_texts as sample_texts

# What Meta's code finds by its place after the ranks.
_LLAMA3_MARKERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


@refuses_wrong_types("the tokenizer's files")
def meta_files(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Returns what goes into a Meta folder.

    Args:
      files: tokenizer files.

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
    state = state_of(files["tokenizer.json"])
    if not is_byte_level(state):
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
