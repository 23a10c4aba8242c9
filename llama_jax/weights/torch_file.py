"""torch's files (`.pth`, `.bin`), read and written without torch, and without running what is in them.

Such a file is a zip archive whose members are stored, not compressed: `*/data.pkl` describes a dictionary of tensors,
and `*/data/N` is storage N, plain numbers that any number of tensors may be views of. A pickle is a program. The few
instructions that a dictionary of tensors takes are carried out here, not by the pickle module, whose memory and time a
hostile file could spend at will even where no class is found; all others are refused.
"""

from __future__ import annotations

import contextlib
import enum
import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.weights import foreign
from llama_jax.weights.sink import Entry, write_pieces
from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError, Tensor, map_file, plain_tensor

STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
UNTYPED = "torch.storage UntypedStorage"
# Numbers that have no storage class of their own: untyped bytes, and the tensor says what they are.
DTYPES = {
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch uint16": np.dtype("<u2"),
    "torch uint32": np.dtype("<u4"),
    "torch uint64": np.dtype("<u8"),
}


# Values that trainers keep beside weights; never more than a name here.
NAMES_OF_DTYPES = frozenset(
    f"torch {name}"
    for name in (
        "float64 double float32 float float16 half bfloat16 int64 long int32 int int16 short int8 uint8 bool complex64"
    ).split()
)


class _Call(enum.StrEnum):
    """The functions that a pickle may call."""

    DICT = "collections OrderedDict"
    TENSOR = "torch._utils _rebuild_tensor_v2"
    TENSOR_OF_DTYPE = "torch._utils _rebuild_tensor_v3"
    PARAMETER = "torch._utils _rebuild_parameter"
    BYTES = "_codecs encode"
    SIZE = "torch Size"
    DEVICE = "torch device"


ALLOWED = frozenset([*STORAGES, UNTYPED, *DTYPES, *NAMES_OF_DTYPES, *_Call])

# What trainers pickle beside weights, or in their place: names of classes, and a few functions that rebuild values.
# `torch` alone is not among them: most of its functions run code.
OF_TRAINERS = re.compile(
    r"(?!(os|posix|nt|subprocess|sys|shutil|socket|ctypes|importlib|runpy|pty|code|pickle|_pickle|dill|cloudpickle"
    r"|builtins|__builtin__|copyreg|copy_reg|_codecs|operator|functools|webbrowser|torch|llama_jax)\b)"
    r"[\w.]+ (\w+\.)*_*[A-Z]\w*"
    r"|numpy[\w.]* (scalar|dtype|ndarray|_reconstruct|__\w+_ctor|[a-z]+\d*)"
    r"|(builtins|__builtin__) (set|frozenset|slice|complex|bytearray|range)"
    r"|collections (defaultdict|deque|Counter|namedtuple)|datetime \w+|pathlib \w+|decimal \w+"
    r"|torch\.(nn\.modules|nn\.parallel|optim|torch_version|distributed|ao|cuda\.amp|amp|quantization)[\w.]* \w+"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_(wrapper_subclass|device_tensor_\w+|meta_tensor\w*|sparse\w*)"
    r"|(torchao|transformers|bitsandbytes|peft|trl|accelerate|deepspeed|omegaconf|megatron)[\w.]* \w+"
)

# Entries that hold the model where a file holds more, as DeepSpeed ("module"), Lightning ("state_dict") and others do.
CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "model_state", "network", "weights")
DEPTH = 8  # of dictionaries inside each other

# Bytes; the 405B model's pickle has 300 KB, its zip directory 100 KB. As Python objects, up to 80 times as much.
MAX_PICKLE = MAX_DIRECTORY = 4_000_000
MAX_DIMS = 64  # numpy's limit

SAVE_CLONES = (
    "its checksum is right, so it was made so: save the model's state_dict() again, {name: x.clone() for name, x in"
    " model.state_dict().items()}"
)
SAVE_AGAIN = "load it with torch.load(..., weights_only=True) and torch.save it again, with torch 1.6 or later"


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Opens what `torch.save` wrote: a dictionary of tensors, alone or as an entry of another, such as "model".

    Args:
      path: the file.

    Returns:
      Name -> tensor, in the order of the file, by the strides that it states; `Tensor.read` gives views of the mapped
      file. Entries that are no tensors are left out, and so is what a trainer keeps beside the model.

    Raises:
      CheckpointError: not such a file, damaged, cut short, of an unsupported kind, or with code in it.
    """
    data = map_file(path)
    members, crc = _read_zip(path, data)
    if members.get("byteorder", np.empty(0, np.uint8)).tobytes() == b"big":
        raise CheckpointError(
            f"{path}: its numbers are big-endian; load it on such a machine and save it as safetensors"
        )
    content = _model_in(_Unpickler(path, members, crc).load())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; save the model's state_dict()")
    if {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path}: the state of an optimizer, not of a model; give the model's own file")
    return {name: plain_tensor(name, array) for name, array in _arrays(content)}


def _model_in(content: Any) -> Any:
    """The dictionary of the model, where a trainer saved it among others."""
    for _ in range(DEPTH):
        found = [key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not found:
            break
        content = content[found[0]]
    return content


def _arrays(content: dict[Any, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor; of dictionaries inside each other only where there is none at the top."""
    waiting, seen = [("", content)], {id(content)}  # each once: a hostile file holds one under many names
    while waiting:
        prefix, inner = waiting.pop(0)
        items = {f"{prefix}{name}": value for name, value in inner.items() if isinstance(name, str)}
        found = [(name, value) for name, value in items.items() if isinstance(value, np.ndarray)]
        yield from found
        if found and not prefix:
            return
        for name, value in items.items():
            if isinstance(value, dict) and id(value) not in seen and name.count(".") < DEPTH:
                seen.add(id(value))
                waiting.append((f"{name}.", value))


# ---------------------------------------------------------------------------------------------------------------------
# The zip archive
# ---------------------------------------------------------------------------------------------------------------------

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, sizes, lengths
_CENTRAL = struct.Struct("<4s6H3I5H2I")


class _Directory(io.FileIO):
    """The file as `zipfile` sees it: no part that it asks for is large."""

    def read(self, size: int | None = -1, /) -> bytes | Any:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, more than {MAX_DIRECTORY}")
        return super().read(size)


def _read_zip(path: Path, data: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Members of the archive, without their common folder: name -> uint8 view of `data`; and the CRC of data.pkl."""
    if data[:4].tobytes() != b"PK\3\4":
        if data[:1].tobytes() == b"\x80" or data[257:262].tobytes() == b"ustar":
            raise CheckpointError(f"{path}: a torch file of the old format, from before version 1.6; {SAVE_AGAIN}")
        raise CheckpointError(f"{path}: not a torch file; {foreign.answer(data[:64].tobytes()) or DOWNLOAD_AGAIN}")
    try:
        with _Directory(path) as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError, struct.error) as error:
        raise _damaged(path, f"its zip directory cannot be read ({error})") from error

    members: dict[str, np.ndarray] = {}
    before = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, start = f"member {info.filename[:100]!r}", info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise CheckpointError(f"{path}: {name} is compressed or encrypted, which torch never does; {SAVE_AGAIN}")
        if start < before or start + _LOCAL.size > end:
            raise _damaged(path, f"{name} is said to begin at byte {start}, which cannot be")
        signature, *_, name_length, extra_length = _LOCAL.unpack(data[start : start + _LOCAL.size].tobytes())
        start += _LOCAL.size + name_length + extra_length
        before = start + info.file_size
        if signature != b"PK\3\4" or before > end or info.filename in members:
            raise _damaged(path, f"{name} of {info.file_size} bytes is not where its directory says")
        members[info.filename] = data[start:before]
    roots = [match[1] for name in members if (match := re.fullmatch(r"([^/]*/|)data\.pkl", name))]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip archive without data.pkl, not a torch file; give a .pth or .bin file")
    crc = next(info.CRC for info in infos if info.filename == f"{roots[0]}data.pkl")
    return {name.removeprefix(roots[0]): member for name, member in members.items() if name.startswith(roots[0])}, crc


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}; {DOWNLOAD_AGAIN}")


# ---------------------------------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------------------------------


class _Global(NamedTuple):
    """A class or function that the pickle names; never more than its name, "module name"."""

    name: str


class _Storage(NamedTuple):
    """The bytes of a storage, uint8, and what numbers they are, if the storage says."""

    data: np.ndarray
    dtype: np.dtype | None


class _Unpickler:
    """Carries out the instructions of `data.pkl` that build a dictionary of tensors, and no others.

    `pickletools` checks every length against the bytes that there are. Values are literals, tuples, lists, dicts, the
    two classes above, and tensors as numpy views of the file.
    """

    def __init__(self, path: Path, members: dict[str, np.ndarray], crc: int):
        self.path = path
        self.crc = crc
        self.members = members
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        program = self.members["data.pkl"]
        if len(program) > MAX_PICKLE:
            raise CheckpointError(
                f"{self.path}: its data.pkl has {len(program)} bytes, more than the {MAX_PICKLE} of any Llama; save the"
                " model's state_dict() alone"
            )
        try:
            for opcode, argument, _ in pickletools.genops(program.tobytes()):
                self.step(opcode.name, argument)
            return self.stack.pop()
        except CheckpointError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
            remedy = SAVE_CLONES if zlib.crc32(program.data) == self.crc else DOWNLOAD_AGAIN
            problem = f"its data.pkl cannot be read ({str(error)[:200]})"
            raise CheckpointError(f"{self.path}: {problem}; {remedy}") from error

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                self.stack = self.below.pop()
                self.collect(opcode, stack)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                count = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}[opcode]
                self.collect(opcode, [stack.pop() for _ in range(count)][::-1])
            case "BUILD":  # the state of an OrderedDict, such as the _metadata of a module's
                stack.pop()
                _expect(stack[-1], dict)
            case "GLOBAL":
                stack.append(self.find(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.find(f"{module} {name}"))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case _:
                raise self.refused(f"the pickle instruction {opcode} {argument}")

    def collect(self, opcode: str, items: list[Any]) -> None:
        """Puts items into a new tuple, or into the list or dict on top of the stack."""
        if opcode.startswith("TUPLE"):
            self.stack.append(tuple(items))
        elif opcode.startswith("APPEND"):
            _expect(self.stack[-1], list).extend(items)
        else:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, (str, int)):  # the hash of a deep tuple would end the process
                    raise ValueError(f"a key of type {type(key).__name__}")
                _expect(self.stack[-1], dict)[key] = value

    def find(self, name: str) -> _Global:
        if name not in ALLOWED:
            raise self.refused(name.replace(" ", ".", 1), of_trainer=OF_TRAINERS.fullmatch(name) is not None)
        return _Global(name)

    def refused(self, what: str, *, of_trainer: bool = False) -> CheckpointError:
        if of_trainer:
            return CheckpointError(
                f"{self.path}: made by a trainer, which pickled its own {what[:200]} into it, and such objects are not"
                " read: save its state_dict() alone where it was made, torch.save(model.state_dict(), FILE)"
            )
        return CheckpointError(
            f"{self.path}: asks for {what[:200]}, which is not part of a checkpoint: do not trust this file; take the"
            " weights from elsewhere, best as safetensors"
        )

    def storage(self, persistent_id: Any) -> _Storage:
        match persistent_id:
            case ("storage", _Global(kind), str(key), str(), int(count)) if kind in STORAGES or kind == UNTYPED:
                dtype = STORAGES.get(kind)
            case _:
                raise ValueError("a storage is not described as one")
        member = self.members.get(f"data/{key}")
        size = count * (dtype.itemsize if dtype else 1)
        if member is None or not 0 <= size <= len(member):
            held = "is not there" if member is None else f"has {len(member)}"
            raise ValueError(f"storage {key[:100]!r} shall have {size} bytes, and {held}")
        return _Storage(member[:size], dtype)

    def call(self, function: Any, arguments: Any) -> Any:
        match (_expect(function, _Global).name, *_expect(arguments, tuple)):
            case (_Call.DICT,):
                return {}
            case (_Call.BYTES, str(text), "latin1"):  # how protocol 2 spells bytes
                return text.encode("latin1")
            case (_Call.BYTES, *_):
                raise self.refused(_Call.BYTES.replace(" ", "."))
            case (_Call.SIZE, tuple(sizes)):
                return sizes
            case (_Call.DEVICE, str(kind), *_):
                return kind
            case (_Call.PARAMETER, np.ndarray() as tensor, *_):
                return tensor
            case (_Call.TENSOR, _Storage(data, np.dtype() as dtype), offset, tuple(shape), tuple(strides), *_):
                return _view(data, dtype, offset, shape, strides)
            case (
                _Call.TENSOR_OF_DTYPE, _Storage(data), offset, tuple(shape), tuple(strides), _, _, _Global(kind), *_
            ) if kind in DTYPES:  # fmt: skip
                return _view(data, DTYPES[kind], offset, shape, strides)
            case (name, *_):
                raise ValueError(f"the arguments of {name} are wrong")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__}, where a {kind.__name__} is expected")
    return value


def _view(data: np.ndarray, dtype: np.dtype, offset: Any, shape: tuple, strides: tuple) -> np.ndarray:
    """A view of a storage as torch describes it: offset and strides count numbers, not bytes."""
    if not len(shape) == len(strides) <= MAX_DIMS or any(
        type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *strides)
    ):
        raise ValueError("a tensor has an impossible offset, shape or stride")
    stored, count = len(data) // dtype.itemsize, math.prod(shape)
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if count else 0
    if max(count, end) > stored:  # more numbers than the storage has: torch's `expand`, which no weight needs
        raise ValueError(f"a tensor of shape {list(shape)} is cut from a storage of {stored} numbers, and needs {end}")
    if not count:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides])


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

ROOT = "archive/"  # any name does
ALIGNMENT = 64  # bytes; torch's own
_ZIP64 = 45  # the version of zip that a reader needs
_1980 = (0, 0x21)  # the first time and day that zip can say, so that the same weights give the same file


def write_torch_file(path: Path, entries: Sequence[Entry], advance: Callable[[int], None]) -> None:
    """Writes a dictionary of tensors that `torch.load(path, weights_only=True)` reads, with `mmap=True` too.

    Every tensor has its own storage, aligned to 64 bytes. All sizes are written in their 64-bit form, however small:
    members may be of any size, and there is one way to write them.

    Args:
      path: of a new file.
      entries: what it shall hold, in this order; of the dtypes of `STORAGES`.
      advance: called with the number of bytes just written.
    """
    with _ZipWriter(io.FileIO(path, "xb")) as file:
        file.add("data.pkl", _pickled(entries))
        file.add("byteorder", b"little")
        for key, entry in enumerate(entries):
            with file.member(f"data/{key}", entry.nbytes):
                write_pieces(file, entry, advance)
        file.add("version", b"3\n")
        file.finish()


def _pickled(entries: Sequence[Entry]) -> bytes:
    """What torch pickles for a dictionary of contiguous tensors."""

    def value(x: Any) -> bytes:  # of plain Python, without the marks at both ends of a pickle
        return pickle.dumps(x, protocol=2)[2:-1]

    def name(x: str) -> bytes:
        return b"c" + x.replace(" ", "\n").encode() + b"\n"

    storages = {dtype: storage for storage, dtype in STORAGES.items()}
    empty_dict = name(_Call.DICT) + b")R"
    parts = [b"\x80\2", empty_dict, b"("]
    for key, entry in enumerate(entries):
        storage = b"(" + value("storage") + name(storages[entry.dtype])
        storage += value(str(key)) + value("cpu") + value(math.prod(entry.shape)) + b"tQ"
        strides = tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))
        arguments = storage + value(0) + value(entry.shape) + value(strides) + value(False) + empty_dict
        parts += [value(entry.name), name(_Call.TENSOR), b"(", arguments, b"tR"]
    return b"".join([*parts, b"u."])


class _ZipWriter(io.BufferedWriter):
    """A zip archive under way; keeps the CRC-32 of what is written.

    `zipfile` aligns nothing, and copies what it writes.
    """

    crc = 0

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self.directory: list[bytes] = []

    def write(self, buffer: Any, /) -> int:
        self.crc = zlib.crc32(buffer, self.crc)
        return super().write(buffer)

    def add(self, name: str, content: bytes) -> None:
        with self.member(name, len(content)):
            self.write(content)

    @contextlib.contextmanager
    def member(self, name: str, size: int) -> Iterator[None]:
        """Between the member's header and its checksum, which needs its content: the caller writes `size` bytes."""
        encoded, start = (ROOT + name).encode(), self.tell()
        sizes = struct.pack("<2H2Q", 1, 16, size, size)
        content = start + _LOCAL.size + len(encoded) + len(sizes) + 4
        padding = -content % ALIGNMENT
        common = (_ZIP64, 0, 0, *_1980)
        full = (0xFFFFFFFF, 0xFFFFFFFF)  # look into the 64-bit fields

        def header(crc: int) -> bytes:
            return _LOCAL.pack(b"PK\3\4", *common, crc, *full, len(encoded), len(sizes) + 4 + padding)

        self.write(header(0) + encoded + sizes + struct.pack("<2sH", b"FB", padding) + bytes(padding))
        self.crc = 0
        yield
        crc = self.crc
        self.seek(start)
        self.write(header(crc))
        self.seek(content + padding + size)
        fields = struct.pack("<2H3Q", 1, 24, size, size, start)
        entry = (b"PK\1\2", _ZIP64, *common, crc, *full, len(encoded), len(fields), 0, 0, 0, 0, 0xFFFFFFFF)
        self.directory.append(_CENTRAL.pack(*entry) + encoded + fields)

    def finish(self) -> None:
        """Writes the directory, and the records that end the archive."""
        start, count, directory = self.tell(), len(self.directory), b"".join(self.directory)
        self.write(directory)
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _ZIP64, _ZIP64, 0, 0, count, count, len(directory), start)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
        full = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        self.write(end + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *full, 0))
