"""What tests of a corpus's input share."""

from __future__ import annotations

from pathlib import Path

from llama_jax.data.prepare.documents import Reading, read_piece
from llama_jax.data.prepare.pieces import cut_pieces, find_pieces

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(*inputs, cut=1 << 62, reading=None, skipped=None, **options) -> list[str]:
    """The documents of inputs."""
    pieces = cut_pieces(find_pieces(inputs, **options), cut)
    return [document.text for piece in pieces for document in read_piece(piece, reading or Reading(), skipped)]


def write(path: Path, data: bytes) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
