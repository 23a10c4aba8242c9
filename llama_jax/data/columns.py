"""Columns of a corpus: numbers for each token beside its id, such as whether it counts in the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import MANIFEST, TokenColumn, array_record, content_of, content_of_both
from llama_jax.files import sync, write_whole

DTYPES = ("uint8", "int32", "float32")


def write_column(path: str | Path, name: str, values: Iterable[np.ndarray], *, dtype: str = "uint8") -> None:
    """Adds a column to a prepared corpus, whose manifest names it when it is complete.

    Args:
      path: the corpus's folder.
      name: of the column, an identifier.
      values: of each document in order, one number for each of its tokens.
      dtype: of the numbers, one of DTYPES.

    Raises:
      ValueError: a bad name or dtype; there is such a column; or documents or tokens are more or fewer.
    """
    corpus = open_corpus(path)
    if not name.isidentifier() or name == "tokens" or name in corpus.columns:
        raise ValueError(f"{corpus.path}: a column cannot be named {name!r}: give an identifier that is not taken")
    if dtype not in DTYPES:
        raise ValueError(f"column {name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    rows, document, content, sizes = iter(values), 0, "", []
    for shard in corpus.manifest.shards:
        file = corpus.path / f"{shard.name}.{name}.array_record"
        writer = array_record().ArrayRecordWriter(str(file), "group_size:1")
        for _ in range(shard.documents):
            found = next(rows, None)
            if found is None or np.shape(found) != (corpus.lengths[document],):
                shape = "nothing" if found is None else f"numbers of shape {np.shape(found)}"
                raise ValueError(
                    f"column {name}: {shape} for document {document}, which has {corpus.lengths[document]} tokens"
                )
            record = np.asarray(found).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            content = content_of_both(content, content_of(record), 1)
            writer.write(record)
            document += 1
        writer.close()
        sync([file])
        sizes.append(file.stat().st_size)
    if next(rows, None) is not None:
        raise ValueError(f"column {name}: more than the corpus's {document} documents")
    column = TokenColumn(name, dtype, tuple(sizes), content)
    manifest = dataclasses.replace(corpus.manifest, columns=(*corpus.manifest.columns, column))
    write_whole(corpus.path / MANIFEST, manifest.to_json())
