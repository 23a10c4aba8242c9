"""Reading an optimized XLA program: what its loops repeat, its FLOPs, its traffic, the compiler's cycles.

The text is `compiled.as_text()`, of TPUs or GPUs. XLA's own `cost_analysis` counts the body of a loop once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "s16": 16,
    "u16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-done", "async-update", "all-gather-done",
    "all-reduce-done", "collective-permute-done", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array: sizes, bytes, and whether it lies in the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    type: str
    opcode: str
    inputs: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.\-]+)", self.inputs))

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """Of its result: one, or those of a tuple."""
        return arrays(self.type)

    @functools.cached_property
    def calls(self) -> dict[str, list[str]]:
        """Computations that it uses, by role."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for role, name in _CALLS.findall(self.attributes):
            found[role].append(name)
        for names in _BRANCHES.findall(self.attributes):
            found["branches"] += [name.strip().lstrip("%") for name in names.split(",")]
        found["branches"] += found.pop("true_computation", []) + found.pop("false_computation", [])
        return found

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in its attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each its instructions by name in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does in all, loops taken as often as they run.

    Attributes:
      flops: of matrix products; kernels are apart.
      cycles: the compiler's estimates, which TPUs have for most operations; kernels and asynchronous copies have none.
      traffic_bytes: what operations read and write in main memory.
      kernels: how often each custom kernel runs, by its name.
    """

    flops: float = 0
    cycles: int = 0
    traffic_bytes: int = 0
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """The sum, the other taken `times`."""
        kernels = self.kernels + collections.Counter({name: times * n for name, n in other.kernels.items()})
        return Counts(
            self.flops + times * other.flops,
            self.cycles + times * other.cycles,
            self.traffic_bytes + times * other.traffic_bytes,
            kernels,
        )


def arrays(type_: str) -> list[Array]:
    """The arrays of a type as XLA writes it."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), not re.search(r"S\([1-9]", layout))
        for dtype, shape, layout in _ARRAY.findall(type_)
        if dtype in _BITS
    ]


def parse(text: str) -> Program:
    """Reads a program.

    Raises:
      ValueError: there is none in the text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _joined(text):
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no optimized XLA program: it has no entry computation")
    return Program(computations, entry)


def _joined(text: str) -> Iterator[str]:
    """Lines, those of one instruction joined: a kernel's metadata has line breaks."""
    pending = ""
    for line in text.splitlines():
        starts = not line or line[0] in "%}" or line.startswith(("ENTRY", "HloModule", "  %", "  ROOT "))
        if starts:
            if pending:
                yield pending
            pending = line
        else:
            pending += " " + line.strip()
    if pending:
        yield pending


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    start = match.end()
    end = _close(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _close(line, opening)
    return Instruction(
        match[2], line[start:end], line[end:opening].strip(), line[opening:closing], line[closing:], bool(match[1])
    )


def _close(line: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    return len(line)


def count(text: str) -> Counts:
    """What a program does; of several branches the one with most cycles and FLOPs."""
    program = parse(text)
    known: dict[str, Counts] = {}

    def of(name: str) -> Counts:
        if name not in known:
            known[name] = Counts()  # recursion does not exist in XLA
            total = Counts()
            for instruction in program.computations.get(name, {}).values():
                total = total.plus(one(instruction, program.computations[name]))
            known[name] = total
        return known[name]

    def one(instruction: Instruction, inside: dict[str, Instruction]) -> Counts:
        own = Counts(
            _flops(instruction, inside),
            int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0),
            _traffic(instruction, inside, program),
            _kernel(instruction),
        )
        calls = instruction.calls
        if instruction.opcode == "while":
            return own.plus(of(calls["body"][0]), trips(instruction, inside, program))
        if instruction.opcode == "conditional":
            return own.plus(max(map(of, calls["branches"]), key=lambda c: (c.cycles, c.flops)))
        if instruction.opcode in ("fusion", "async-start"):  # an inner operation costs the fusion's own estimate
            for name in calls["calls"]:
                own = own.plus(Counts(of(name).flops, 0, 0, of(name).kernels))
        elif instruction.opcode == "call":
            for name in calls["to_apply"]:
                own = own.plus(of(name))
        return own

    return of(program.entry)


def trips(loop: Instruction, inside: dict[str, Instruction], program: Program) -> int:
    """How often a loop runs; 1 where that depends on data."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = program.computations[loop.calls["condition"][0]]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode == "fusion":
        fused = program.computations[root.calls["calls"][0]]
        root = next(instruction for instruction in fused.values() if instruction.is_root)
    constants = [c for c in map(_constant, condition.values()) if c is not None]
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(constants) != 1:
        return 1
    return max(1, constants[0] - _first(loop, inside, condition))


def _constant(instruction: Instruction) -> int | None:
    """The value of a constant integer."""
    match = re.match(r"\((-?\d+)\)$", instruction.inputs) if instruction.opcode == "constant" else None
    return int(match[1]) if match and instruction.type[:5] in ("s32[]", "u32[]", "s64[]") else None


def _first(loop: Instruction, inside: dict[str, Instruction], condition: dict[str, Instruction]) -> int:
    """Where the counter of a loop starts: a loop whose first round was peeled off starts at 1."""
    index = next((i.attribute(r"index=(\d+)") for i in condition.values() if i.opcode == "get-tuple-element"), None)
    start = inside.get(loop.operands[0])
    if index is None or start is None or start.opcode != "tuple":
        return 0
    counter = inside.get(start.operands[int(index)])
    while counter is not None and counter.opcode in ("copy", "bitcast") and counter.operands:
        counter = inside.get(counter.operands[0])
    return (_constant(counter) if counter else None) or 0


def _flops(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Two for each multiplication of a matrix product."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    operands = [inside[name].arrays[0].shape for name in instruction.operands[:2] if name in inside]
    out = instruction.arrays[0].shape
    if instruction.opcode == "convolution":
        return 2.0 * _convolution(instruction, operands[0], operands[1], out)
    if instruction.opcode == "dot":
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    elif "__cublas" in instruction.attributes:
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    else:
        return 0
    dims = [int(dim) for dim in re.findall(r"\d+", contracted or "")]
    return 2.0 * math.prod(out) * math.prod(operands[0][dim] for dim in dims)


def _convolution(instruction: Instruction, lhs: tuple, rhs: tuple, out: tuple) -> int:
    """Multiplications of a convolution, as which TPUs write products: batch dimensions are windows, and a window that
    lies in the padding, or between the elements of a dilated operand, multiplies nothing."""
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    assert labels
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    count = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    spatial = sorted(label for label in out_labels if label.isdigit())
    for place, label in enumerate(spatial):
        size = rhs[rhs_labels.index(label)]
        stride, dilation, gap = (
            int(window[key].split("x")[place]) if key in window else 1 for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        before = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
        length = (lhs[lhs_labels.index(label)] - 1) * gap
        count *= sum(
            0 <= at <= length and at % gap == 0
            for o in range(out[out_labels.index(label)])
            for at in (o * stride + k * dilation - before for k in range(size))
        )
    return count


def _kernel(instruction: Instruction) -> collections.Counter[str]:
    """The name of a kernel, if the instruction is one."""
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    if target == "tpu_custom_call":
        return collections.Counter([re.sub(r"[.\d]+$", "", instruction.name)])
    return collections.Counter([target] if target.startswith("__cudnn$fmha") else [])


def _traffic(instruction: Instruction, inside: dict[str, Instruction], program: Program) -> int:
    """Bytes that an operation reads and writes in main memory: of a stack that it takes a slice of, only the slice."""
    if instruction.opcode in _FREE:
        return 0
    fused = {}
    if instruction.opcode == "fusion":
        fused = program.computations[instruction.calls["calls"][0]]
    elif instruction.opcode in ("dynamic-slice", "dynamic-update-slice", "slice", "copy-start", "slice-start"):
        size = max((a.bytes for a in instruction.arrays if a.in_memory), default=0)
        if instruction.opcode == "dynamic-update-slice":
            size = inside[instruction.operands[1]].arrays[0].bytes
        return 2 * size
    total = 0
    for number, name in enumerate(instruction.operands):
        if name in inside:
            size = sum(a.bytes for a in inside[name].arrays if a.in_memory)
            total += min(size, _slice(fused, number)) if fused else size
    root = next((i for i in fused.values() if i.is_root), None)
    if root is not None and root.opcode == "dynamic-update-slice":
        return total + fused[root.operands[1]].arrays[0].bytes
    return total + sum(a.bytes for a in instruction.arrays if a.in_memory)


def _slice(fused: dict[str, Instruction], number: int) -> int:
    """Bytes that a fusion reads of its parameter `number`."""
    parameter = next((i for i in fused.values() if i.opcode == "parameter" and i.inputs == f"({number})"), None)
    if parameter is None:
        return 0
    users = [i for i in fused.values() if parameter.name in i.operands]
    if users and all(user.opcode == "dynamic-slice" for user in users):
        return sum(user.arrays[0].bytes for user in users)
    if users and all(user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name for user in users):
        return 0
    return sum(a.bytes for a in parameter.arrays)
