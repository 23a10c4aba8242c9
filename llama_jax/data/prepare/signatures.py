"""What a file is, by its first bytes: how it is compressed, and what it is where it is not text."""

from __future__ import annotations

import re

HEAD = 512  # bytes: a tar archive says so at byte 257
BOM = b"\xef\xbb\xbf"

PACKINGS = {
    "gzip": rb"\x1f\x8b",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "lzma": rb"\]\0\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}

UNPACK = "unpack it, and give what was in it"
CONVERT = "write its text as JSON lines or Parquet"
ICONV = "convert it with `iconv -f {} -t UTF-8`"
OTHER = "leave it out, such as by --glob"
# No text begins like these, whatever follows.
CERTAIN = {
    rb"%PDF-1\.|%PDF-2\.": ("a PDF document", "extract its text, such as with pdftotext"),
    rb"version https://git-lfs\.github\.com/spec/": ("a Git LFS pointer, not the file itself", "run `git lfs pull`"),
}
# They tell what a file is that cannot be read as text. Letters that a text may begin with need a NUL byte after them.
FOREIGN = CERTAIN | {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": ("UTF-32 text", ICONV.format("UTF-32")),
    rb"\xff\xfe|\xfe\xff": ("UTF-16 text", ICONV.format("UTF-16")),
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": ("a ZIP archive or an Office document", "unpack it, or export its text"),
    rb"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    rb"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    rb".{257}ustar": ("a tar archive", UNPACK),
    rb"\x04\x22\x4d\x18": ("compressed by lz4", "unpack it with `lz4 -d`"),
    rb"\x1f[\x9d\xa0]": ("compressed by compress (.Z)", "unpack it with `gzip -d`"),
    rb"LZIP.*\0": ("compressed by lzip", "unpack it with `lzip -d`"),
    rb"\x89LZO": ("compressed by lzop", "unpack it with `lzop -d`"),
    rb"\xff\x06\0\0sNaPpY": ("compressed by snappy", UNPACK),
    rb"PAR1": ("a Parquet file", "give --format parquet, or end its name in .parquet"),
    rb"PARE": ("an encrypted Parquet file", "decrypt it"),
    rb"ARROW1|\xff\xff\xff\xff.\0\0": ("an Arrow file, as datasets keeps them", "save it as Parquet (`to_parquet`)"),
    rb"ORC.*\0": ("an ORC file", CONVERT),
    rb"Obj\x01": ("an Avro file", CONVERT),
    rb"\x89HDF": ("an HDF5 file", CONVERT),
    rb"\x93NUMPY": ("a NumPy array", CONVERT),
    rb"SQLite format 3\0": ("an SQLite database", CONVERT),
    rb"\x80[\x02-\x05]": ("a Python pickle", CONVERT),
    rb"\xd0\xcf\x11\xe0": ("an old Office document", "export its text"),
    rb"\x89PNG|\xff\xd8\xff|II\*\0|MM\0\*|(GIF8|RIFF....WEBP|BM).*\0": ("an image", OTHER),
    rb"\xff[\xfb\xf3\xf2]|\x1aE\xdf\xa3|(RIFF|OggS|fLaC|ID3|....ftyp).*\0": ("audio or video", OTHER),
    rb"\x7fELF|\0asm|\xfe\xed\xfa[\xce\xcf]|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe|MZ.*\0": ("a program", OTHER),
    rb"GGUF.*\0": ("a GGUF file", OTHER),
    rb".{6}\0\0\{\"": ("a safetensors file", OTHER),
}  # fmt: skip
PAGE = re.compile(rb"\s*<(!doctype html|html\b|\?xml)", re.IGNORECASE)


def packing(head: bytes) -> str | None:
    """Returns how a file is compressed that begins so: gzip, bz2, xz, lzma or zstd; None if it is not."""
    return next((name for name, magic in PACKINGS.items() if re.match(magic, head)), None)


def is_parquet(head: bytes) -> bool:
    """Tells whether a file that begins so is a Parquet file."""
    return head.startswith(b"PAR1") and len(head) >= 12


def is_lines(head: bytes) -> bool:
    """Tells whether a file that begins so holds a JSON object."""
    return head.removeprefix(BOM).lstrip().startswith(b"{")


def foreign(head: bytes, *, certain: bool = False) -> str | None:
    """Returns what a file is that begins so and is not text, and what to do with it.

    Args:
      head: its first bytes.
      certain: only what no text begins with.
    """
    table = CERTAIN if certain else FOREIGN
    return next(
        (f"is {what}: {remedy}" for magic, (what, remedy) in table.items() if re.match(magic, head, re.DOTALL)), None
    )


def page(head: bytes) -> str | None:
    """Returns what to do with a file of records that begins like a page of HTML or XML; None for another one."""
    return "is a page of HTML or XML, not records: look at it, it may be an error page" if PAGE.match(head) else None
