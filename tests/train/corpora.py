"""Tiny prepared corpora, written with the array_record package and none of the library's own writers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_corpus(
    folder: Path, documents: Sequence[Sequence[int]], *, reference: dict[str, float] | None = None
) -> Path:
    """A corpus of documents of byte ids (below 256), which are all that its tokenizer has."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    writer = ArrayRecordWriter(str(folder / "00000-of-00001.array_record"), "group_size:1")
    for ids in documents:
        writer.write(np.asarray(ids, "<u2").tobytes())
    writer.close()
    index = np.array([[len(ids), len(ids)] for ids in documents], "<u4")
    (folder / "00000-of-00001.index").write_bytes(index.tobytes())
    (folder / "00000-of-00001.sources").write_text("".join(f"text:{i}\n" for i in range(len(documents))))
    tokens = sum(map(len, documents))
    shard = {
        "name": "00000-of-00001", "documents": len(documents), "tokens": tokens, "bytes": tokens,
        "record_bytes": (folder / "00000-of-00001.array_record").stat().st_size,
    }  # fmt: skip
    manifest = {
        "format": 1, "vocab_size": 256, "bos": False, "eos_id": 0, "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "token_dtype": "uint16", "documents": len(documents), "tokens": tokens, "bytes": tokens,
        "shards": [shard], "reference": reference or {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def random_documents(count: int, *, seed: int = 0, longest: int = 150) -> list[list[int]]:
    """Documents with something to learn: each repeats a short random pattern."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        pattern = rng.integers(0, 256, rng.integers(2, 6))
        documents.append(np.resize(pattern, rng.integers(2, longest)).tolist())
    return documents
