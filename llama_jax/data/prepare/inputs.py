"""What a corpus was prepared from, kept beside it, so that files that only look changed do not have to be read again.

inputs.json    the options, and of each piece: kind, name, start, stop, size, time of the last change, SHA-256
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.manifest import INPUTS
from llama_jax.data.prepare.pieces import InputSlice, open_parquet
from llama_jax.data.prepare.system import naming
from llama_jax.typing import Fields

SHOWN = 10  # changes that are told one by one
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """What a corpus was prepared from.

    Attributes:
      options: by name, what else the corpus depends on.
      pieces: of the input, in order.
      digests: SHA-256 of what each piece read, in hexadecimal; None for what is not on a disk.
    """

    options: Fields
    pieces: Sequence[InputSlice]
    digests: Sequence[str | None]

    def to_json(self) -> str:
        """Writes it, a line for each piece."""
        rows = [
            json.dumps([piece.kind, piece.name, piece.start, piece.stop, *piece.version, digest])
            for piece, digest in zip(self.pieces, self.digests, strict=True)
        ]
        return f'{{"options": {json.dumps(self.options)},\n"pieces": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Reads the record of a corpus; None where there is none, as of an earlier version, or it is damaged."""
        try:
            with naming(folder / INPUTS):
                values = json.loads((folder / INPUTS).read_bytes())
            rows = [InputSlice(kind, name, name, start, stop, 0, (size, time))
                    for kind, name, start, stop, size, time, _ in values["pieces"]]  # fmt: skip
            return cls(values["options"], rows, [row[-1] for row in values["pieces"]])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def changes(before: Record, options: Fields, pieces: Sequence[InputSlice]) -> list[str]:
    """Says what is not as it was, a sentence for each file or option; reads files that only their time tells apart.

    Args:
      before: what the corpus was prepared from.
      options: what they are now.
      pieces: what they are now.
    """
    then, now = _by_file(before.pieces), _by_file(pieces)
    digests = dict(zip(map(_key, before.pieces), before.digests, strict=True))
    found = [*(f"{name} is not an input any more" for name in then if name not in now)]
    for name, parts in now.items():
        if name not in then:
            found.append(f"{name} is new")
        elif (old := then[name][0].version[0]) != (size := parts[0].version[0]):
            found.append(f"{name} had {old} bytes and now has {size}")
        elif any(piece.stream for piece in parts):
            found.append(f"{name} cannot be read again")
        elif then[name][0].version != parts[0].version and not _same(parts, digests):
            found.append(f"the content of {name} is another one")
    if found:
        return found
    found = [f"{name} was {_told(value)}, now {_told(options.get(name))}"
             for name, value in before.options.items() if value != options.get(name)]  # fmt: skip
    return found or ([] if [*map(_key, before.pieces)] == [*map(_key, pieces)] else ["the files are in another order"])


def listed(found: Sequence[str]) -> str:
    """Joins sentences, the first few of many."""
    rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + rest


def digest(piece: InputSlice) -> str | None:
    """Returns the SHA-256 of the bytes that a piece reads, as they are stored; None for what is not on a disk."""
    if piece.alone or "://" in piece.path:
        return None
    found = hashlib.sha256()
    with naming(piece.path), open(piece.path, "rb") as file:
        for start, stop in _ranges(piece):
            file.seek(start)
            while data := file.read(BLOCK if stop is None else min(BLOCK, stop - start)):
                found.update(data)
                start += len(data)
    return found.hexdigest()


def _ranges(piece: InputSlice) -> Iterator[tuple[int, int | None]]:
    """Yields the ranges of bytes that a piece reads."""
    if piece.kind != "parquet" or piece.stop is None:
        yield piece.start, piece.stop
        return
    with open_parquet(piece) as file:
        groups = [file.metadata.row_group(i) for i in range(piece.start, piece.stop)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    yield piece.version[0] - 8, None  # the length of what describes the columns
    for column in columns:
        offsets = [column.data_page_offset, column.dictionary_page_offset]
        start = min(offset for offset in offsets if offset)
        yield start, start + column.total_compressed_size


def _same(pieces: Iterable[InputSlice], digests: Mapping[tuple[Any, ...], str | None]) -> bool:
    return all((old := digests.get(_key(piece))) is not None and digest(piece) == old for piece in pieces)


def _key(piece: InputSlice) -> tuple[Any, ...]:
    return piece.kind, piece.name, piece.start, piece.stop


def _by_file(pieces: Iterable[InputSlice]) -> dict[str, list[InputSlice]]:
    files: dict[str, list[InputSlice]] = {}
    for piece in pieces:
        files.setdefault(piece.name, []).append(piece)
    return files


def _told(value: object) -> str:
    return "left out" if value is None else str(value)
