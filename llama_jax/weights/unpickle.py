"""The pickle of a torch file, carried out without running what is in it.

A pickle is a program. The few instructions that a dictionary of tensors takes are carried out here, not by the pickle
module, whose memory and time a hostile file could spend at will even where no class is found; all others are refused.
"""

from __future__ import annotations

import enum
import math
import pickletools
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError

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
# Dtypes without a storage class: untyped bytes, and the tensor names the dtype.
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


class Call(enum.StrEnum):
    """The functions that a pickle may call."""

    DICT = "collections OrderedDict"
    TENSOR = "torch._utils _rebuild_tensor_v2"
    TENSOR_OF_DTYPE = "torch._utils _rebuild_tensor_v3"
    PARAMETER = "torch._utils _rebuild_parameter"
    BYTES = "_codecs encode"
    SIZE = "torch Size"
    DEVICE = "torch device"


ALLOWED = frozenset([*STORAGES, UNTYPED, *DTYPES, *NAMES_OF_DTYPES, *Call])

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

# Bytes; the 405B model's pickle has 300 KB. As Python objects, up to 80 times as much.
MAX_PICKLE = 4_000_000
MAX_DIMS = 64  # numpy's limit

SAVE_CLONES = (
    "its checksum is right, so it was made so: save the model's state_dict() again, {name: x.clone() for name, x in"
    " model.state_dict().items()}"
)


def unpickle(path: Path, members: dict[str, np.ndarray], crc: int) -> Any:
    """Returns what `data.pkl` describes: literals, tuples, lists, dicts, and tensors as numpy views of the file.

    Args:
      path: for messages.
      members: of the archive: name -> bytes.
      crc: of data.pkl in the archive; tells damage from a fault of the program that wrote the file.

    Raises:
      CheckpointError: it asks for anything else, or cannot be read.
    """
    return _Unpickler(path, members, crc).load()


class _Global(NamedTuple):
    """A class or function that the pickle names; never more than its name, "module name"."""

    name: str


class _Storage(NamedTuple):
    """The bytes of a storage, uint8, and their dtype, if the storage has one."""

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
            case (Call.DICT,):
                return {}
            case (Call.BYTES, str(text), "latin1"):  # how protocol 2 spells bytes
                return text.encode("latin1")
            case (Call.BYTES, *_):
                raise self.refused(Call.BYTES.replace(" ", "."))
            case (Call.SIZE, tuple(sizes)):
                return sizes
            case (Call.DEVICE, str(kind), *_):
                return kind
            case (Call.PARAMETER, np.ndarray() as tensor, *_):
                return tensor
            case (Call.TENSOR, _Storage(data, np.dtype() as dtype), offset, tuple(shape), tuple(strides), *_):
                return _view(data, dtype, offset, shape, strides)
            case (
                Call.TENSOR_OF_DTYPE, _Storage(data), offset, tuple(shape), tuple(strides), _, _, _Global(kind), *_
            ) if kind in DTYPES:  # fmt: skip
                return _view(data, DTYPES[kind], offset, shape, strides)
            case (name, *_):
                raise ValueError(f"the arguments of {name} are wrong")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__}, where a {kind.__name__} is expected")
    return value


def _view(data: np.ndarray, dtype: np.dtype, offset: Any, shape: tuple, strides: tuple) -> np.ndarray:
    """Returns a view of a storage as torch describes it: offset and strides count numbers, not bytes."""
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
