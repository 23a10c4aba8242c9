"""A tokenizer from its files: a folder's, or a GGUF file's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llama_jax.text import gguf
from llama_jax.text.added import is_control_like as is_control_like
from llama_jax.text.base import TOKENIZER_FILES, VOCABULARY_FILES, Tokenizer
from llama_jax.text.bpe import TiktokenTokenizer, load_tokenizer_json
from llama_jax.text.facts import TEMPLATE_FOLDER, file_facts, with_named_templates
from llama_jax.text.facts import AddedToken as AddedToken
from llama_jax.text.spm import SentencePieceTokenizer
from llama_jax.typing import Fields


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Loads the tokenizer of a Hugging Face or Meta folder.

    Args:
      folder: holds `tokenizer.json` (preferred) or `tokenizer.model` (SentencePiece or tiktoken). Beside a
        `params.json`, `tokenizer.model` may be one folder up.

    Returns:
      The tokenizer, or None where there is neither file.
    """
    folder = Path(folder)
    return tokenizer_from_files(read_files(folder, (*TOKENIZER_FILES, "config.json", "generation_config.json")), folder)


def read_files(folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> dict[str, bytes]:
    """Reads the files of a folder's tokenizer.

    Args:
      folder: A Hugging Face, native or Meta folder.
      names: the files to look for.

    Returns:
      File name to content, of the files that exist; `tokenizer_config.json` with the templates that are stored in
      files of their own, beside the default one, in `additional_chat_templates`.
    """
    folder = Path(folder).absolute()
    names = tuple(names)
    files = {name: path.read_bytes() for name in names if (path := folder / name).is_file()}
    shared = folder.parent / "tokenizer.model"
    # LLaMA 1's download has one tokenizer.model beside its folders 7B to 65B.
    if files.keys().isdisjoint(VOCABULARY_FILES) and (folder / "params.json").is_file() and shared.is_file():
        files["tokenizer.model"] = shared.read_bytes()
    named = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")) if "tokenizer_config.json" in names else []
    return with_named_templates(files, {path.stem: path.read_bytes() for path in named})


def tokenizer_from_files(files: Mapping[str, bytes], folder: Path = Path()) -> Tokenizer | None:
    """Builds the tokenizer that files of a folder describe.

    Args:
      files: file name to content.
      folder: where they are, for error messages.

    Returns:
      The tokenizer, or None without `tokenizer.json` and `tokenizer.model`.
    """
    name = next((name for name in VOCABULARY_FILES if name in files), None)
    if name is None:
        return None
    facts, data, source = file_facts(files, folder), files[name], str(folder / name)
    if name == "tokenizer.json":
        return load_tokenizer_json(data, facts, source=source)
    if is_tiktoken(data):
        return TiktokenTokenizer(data, facts, source=source)
    return SentencePieceTokenizer(data, facts, source=source)


def is_tiktoken(model: bytes) -> bool:
    """Tells whether a `tokenizer.model` is a tiktoken file and not SentencePiece's."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model) is not None


def tokenizer_from_gguf(metadata: Fields) -> Tokenizer | None:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Args:
      metadata: key to value; arrays may be lists or numpy arrays.

    Returns:
      The tokenizer, or None where the file holds none.
    """
    return gguf.tokenizer_from_gguf(metadata)
