"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from llama_jax.data.prepare.pieces import AGAIN, InputSlice, file_version, open_dataset, open_parquet
from llama_jax.data.prepare.shapes import conversation
from llama_jax.data.prepare.signatures import BOM, HEAD, foreign, page
from llama_jax.data.prepare.streams import is_damage, open_binary, peek
from llama_jax.data.prepare.system import told
from llama_jax.typing import Foreign, JsonObject

InvalidUtf8 = Literal["error", "skip", "replace"]

LARGEST_DOCUMENT = 1 << 27  # bytes; SentencePiece needs some 40 times as much memory


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or one `shapes.Conversation` as JSON.

    `source` is where it came from: a path, `path:line`, `path@byte` in a file that was cut, or `name#row`.
    """

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
      field: of JSON lines, Parquet files and datasets: the one that holds the text.
      invalid_utf8: what to do with a document that is not valid UTF-8, or holds NUL bytes: `error`, `skip` it, or
        `replace` the bad bytes by U+FFFD.
      conversations: whether rows are conversations, not texts.
      pairs: whether each has two answers to its prompt.
    """

    field: str = "text"
    invalid_utf8: InvalidUtf8 = "error"
    conversations: bool = False
    pairs: bool = False

    def __post_init__(self):
        if self.invalid_utf8 not in ("error", "skip", "replace"):
            raise ValueError(f"invalid_utf8 must be error, skip or replace, got {self.invalid_utf8!r}")


def read_piece(piece: InputSlice, reading: Reading, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Reads the documents of a piece, in order; empty ones too.

    Args:
      piece: one of `find_pieces`.
      reading: how.
      skipped: counts what is left out: `invalid_utf8` documents.

    Raises:
      ValueError: a document cannot be read; the message says where it is and what to do.
    """
    skipped = Counter() if skipped is None else skipped
    if reading.conversations and piece.kind == "text":
        raise ValueError(
            f"{piece.path}: is read as one text, and conversations are rows of JSON lines (.jsonl), Parquet files or"
            " datasets: give such files"
        )
    check_unchanged(piece)
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet, "hf": _read_dataset}[piece.kind]
    try:
        yield from read(piece, reading, skipped)
    except Exception as error:
        if type(error).__name__ == "ArrowNotImplementedError":
            raise ValueError(f"{piece.path}: this pyarrow cannot read it ({error}): write it anew") from error
        if piece.kind != "hf" and is_damage(error):
            raise ValueError(f"{piece.path}: is damaged or truncated ({error}): {AGAIN}") from error
        raise


def check_unchanged(piece: InputSlice) -> None:
    """Raises ValueError where the file of a piece is not as it was when it was found."""
    if not piece.alone and file_version(piece.path) != piece.version:
        raise ValueError(f"{piece.path}: has changed since the preparation began: run it again")


def _read_text(piece: InputSlice, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    with open_binary(piece.path) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    what = foreign(data[:HEAD], certain=_is_text(data))
    if what is not None and reading.invalid_utf8 != "skip":
        raise ValueError(f"{piece.path}: {what}")
    if what is not None:
        skipped["not_text"] += 1
    elif (text := _decode(data, lambda: piece.path, reading, skipped)) is not None:
        yield Document(text, piece.name)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _read_lines(piece: InputSlice, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    is_cut = piece.stop is not None
    with open_binary(piece.path, whole=not is_cut) as file:
        head, file = peek(file)
        what = foreign(head) or page(head)
        if what is not None and reading.invalid_utf8 != "skip":
            raise ValueError(f"{piece.path}: {what}")
        at = piece.start
        if at:  # the line that runs over the boundary is the piece's before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        number = 0
        while (piece.stop is None or at < piece.stop) and (line := file.readline(LARGEST_DOCUMENT + 1)):
            offset, at, number = at, at + len(line), number + 1
            where = functools.partial(_line_at, piece, offset, number)
            if line.isspace():
                continue
            if (content := _decode(line, where, reading, skipped)) is None or not content.strip():
                continue
            text = _valid(_of_line(content, where, reading), where, reading, skipped)
            if text is not None:
                yield Document(text, f"{piece.name}@{offset}" if is_cut else f"{piece.name}:{number}")


def _line_at(piece: InputSlice, offset: int, number: int) -> str:
    """Names a line for a message: the number counts from where the piece begins."""
    return f"{piece.path}:{number if piece.stop is None else _line_number(piece.path, offset)}"


def _line_number(path: str, offset: int) -> int:
    """The number of the line that starts at a byte, from 1."""
    with open_binary(path) as file:
        newlines = 0
        while offset and (block := file.read(min(1 << 24, offset))):
            newlines, offset = newlines + block.count(b"\n"), offset - len(block)
    return newlines + 1


def _integer(digits: str) -> int | float:
    """Reads a number of JSON; one of more digits than Python reads is infinite, as 1e999 is."""
    try:
        return int(digits)
    except ValueError:
        return math.inf


_JSON = json.JSONDecoder(parse_int=_integer)


def _of_line(line: str, where: Callable[[], str], reading: Reading) -> str:
    try:
        record = _JSON.decode(line.rstrip("\r\n"))
    except RecursionError as error:
        raise ValueError(
            f"{where()}: is JSON that is nested too deeply to be read: flatten it or leave it out"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{where()}: is not JSON ({error}): a file of JSON lines has one object a line{_over_lines(line)}"
        ) from error
    if not isinstance(record, dict):
        hint = "; `jq -c .[]` makes lines of an array" if isinstance(record, list) else ""
        raise ValueError(
            f"{where()}: holds a JSON {type(record).__name__}: a file of JSON lines has one object a line{hint}"
        )
    if reading.conversations:
        return _text(record, where, reading)
    field = reading.field
    spellings = {json.dumps(field), json.dumps(field, ensure_ascii=False)}
    if sum(map(line.count, spellings)) > 1 or _has_escaped_name(line):
        _check_once(line, where, field)
    return _text(record, where, reading)


_STRINGS = re.compile(r'"((?:[^"\\]++|\\.)*+)"\s*+(:?)')  # of JSON, each once: possessive, so that time is linear


def _has_escaped_name(line: str) -> bool:
    """Tells whether a name in the line is spelt with escapes, and so may be any name: "te\\u0078t"."""
    return "\\" in line and any(colon and "\\" in name for name, colon in _STRINGS.findall(line))


def _over_lines(line: str) -> str:
    """Says how to make lines of one JSON value that stands on several."""
    opened = line.strip()
    if opened.startswith("["):
        return "; it looks like one array: `jq -c .[]` makes lines of it"
    return "; it looks like an object on several lines: `jq -c .` makes lines of it" if opened == "{" else ""


def _check_once(line: str, where: Callable[[], str], field: str) -> None:
    """Raises ValueError for an object that has a field twice, with different values."""

    def pairs(found: list[tuple[str, Any]]) -> list[Any]:
        return [value for name, value in found if name == field]  # of the outermost object in the end

    values = json.JSONDecoder(parse_int=_integer, object_pairs_hook=pairs).decode(line)
    if any(value != values[0] for value in values):
        raise ValueError(f"{where()}: has the field {field!r} {len(values)} times, with different values: correct it")


def _text(record: JsonObject, where: Callable[[], str], reading: Reading) -> str:
    """The text of a row, or its conversation as JSON."""
    field = reading.field
    if reading.conversations:
        try:
            return conversation(record, pairs=reading.pairs).to_json()
        except (ValueError, TypeError, RecursionError) as error:  # JSON has no times, for one
            raise ValueError(f"{where()}: {error}") from error
    if field not in record:
        raise ValueError(f"{where()}: has no field {field!r}: name the text's with --field; it has {_list(record)}")
    if not isinstance(record[field], str):
        raise ValueError(
            f"{where()}: its field {field!r} is a {type(record[field]).__name__}, not a text: correct it, or name"
            f" another with --field; it has {_list(record)}"
        )
    return record[field]


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, list(names)[:20])) or "none"


def _decode(data: bytes, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    """Decodes a document of a file, without a byte order mark; None leaves it out."""
    if (nul := data.find(b"\0")) >= 0 and len(data) <= LARGEST_DOCUMENT:
        why = f"a NUL byte at byte {nul}, which no text has{'; UTF-16 has' if _is_wide(data) else ''}"
        replaced = data.removeprefix(BOM).replace(b"\0", "\ufffd".encode()).decode(errors="replace")
        return _invalid(replaced, why, where, reading, skipped)
    return _decode_value(data, where, reading, skipped, mark=len(BOM) if data.startswith(BOM) else 0)


def _is_wide(data: bytes) -> bool:
    """Tells whether every other byte is NUL, nearly, as in UTF-16 of Latin letters."""
    start = data[:HEAD]
    halves = sorted((start[::2].count(0), start[1::2].count(0)))
    return halves[1] > 0.2 * len(start) and halves[0] < 0.45 * len(start)


def _decode_value(
    data: bytes, where: Callable[[], str], reading: Reading, skipped: Counter[str], *, mark: int = 0
) -> str | None:
    """Decodes a document, without its first `mark` bytes; None leaves it out."""
    if len(data) > LARGEST_DOCUMENT:
        raise ValueError(
            f"{where()}: is one document of more than {LARGEST_DOCUMENT >> 20} MB: cut it into documents, such as the"
            " lines of a JSON lines file"
        )
    text = data[mark:]
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start + mark}"
        return _invalid(text.decode(errors="replace"), why, where, reading, skipped)


def _valid(text: str, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    """Checks a text that JSON decoded: escapes such as \\ud800 have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _invalid(repaired, f"{error.reason} at character {error.start}", where, reading, skipped)
    return text


def _invalid(repaired: str, why: str, where: Callable[[], str], reading: Reading, skipped: Counter[str]) -> str | None:
    if reading.invalid_utf8 == "replace":
        return repaired
    if reading.invalid_utf8 == "skip":
        skipped["invalid_utf8"] += 1
        return None
    raise ValueError(
        f"{where()}: is not valid UTF-8 ({why}): correct it, or give --invalid-utf8 skip to leave such documents out,"
        " or --invalid-utf8 replace to put U+FFFD for what is wrong"
    )


def _read_parquet(piece: InputSlice, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow as pa

    with open_parquet(piece) as file:
        names = file.schema_arrow.names
        if reading.conversations:
            yield from _rows(piece, file, reading, skipped)
            return
        if reading.field not in names:
            raise ValueError(
                f"{piece.path}: has no field {reading.field!r}: name the text's with --field; it has {_list(names)}"
            )
        if names.count(reading.field) > 1:
            raise ValueError(
                f"{piece.path}: has the field {reading.field!r} {names.count(reading.field)} times: drop one"
            )
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        for batch in file.iter_batches(1024, row_groups=groups, columns=[reading.field]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            try:
                values = column.cast(pa.large_binary()).to_pylist()
            except pa.ArrowException as error:
                raise ValueError(
                    f"{piece.path}: its field {reading.field!r} is {column.type}, not a text: name another with"
                    f" --field; it has {_list(names)}"
                ) from error
            for i, value in enumerate(values, row):
                where = f"{piece.name}#{i}"
                if value is None:
                    raise ValueError(
                        f"{where}: its field {reading.field!r} is null, not a text: correct it or leave it out"
                    )
                if (text := _decode_value(value, lambda where=where: where, reading, skipped)) is not None:
                    yield Document(text, where)
            row += len(values)


def _rows(piece: InputSlice, file: Foreign, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    """The rows of a Parquet file as conversations."""
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    for batch in file.iter_batches(256, row_groups=groups):
        for i, record in enumerate(batch.to_pylist(), row):
            where = f"{piece.name}#{i}"
            text = _text(record, lambda where=where: where, reading)
            if (text := _valid(text, lambda where=where: where, reading, skipped)) is not None:
                yield Document(text, where)
        row += len(batch)


def _read_dataset(piece: InputSlice, reading: Reading, skipped: Counter[str]) -> Iterator[Document]:
    source = piece.name if piece.stop == 1 else f"{piece.name}[{piece.start}/{piece.stop}]"
    rows = iter(open_dataset(piece.path).shard(num_shards=piece.stop, index=piece.start))
    for row in itertools.count():
        try:
            record = next(rows)
        except StopIteration:
            return
        except PermissionError as error:
            raise told(error, f"{source}#{row}") from error
        except Exception as error:
            raise OSError(f"{source}#{row}: cannot be read ({error}): run it again, it resumes") from error
        where = f"{source}#{row}"
        text = _text(record, lambda where=where: where, reading)
        if (text := _valid(text, lambda where=where: where, reading, skipped)) is not None:
            yield Document(text, where)
