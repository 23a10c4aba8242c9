"""What a compiled program does, read from its text (`compiled.as_text()`): for TPU and GPU.

Everything is of one device, and counts what is inside a loop as often as the loop runs. A loop whose length the text
does not tell (the decode loop: until no row is running) counts once, so that its figures are of one step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}  # the others say: s4, u8, f8e4m3fn
VMEM = "S(1)"  # the memory space of a TPU's own memory, in a layout
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_NO_WORK = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id"
    " opt-barrier copy-done slice-done async-done async-update all-gather-done all-reduce-done"
    " collective-permute-done".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: its element type, dimensions, and layout as text."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"^[a-z]+(\d+).*$", r"\1", self.dtype))
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result."""
        found = _ARRAY.findall(self.type)
        return tuple(
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), layout) for dtype, dims, layout in found
        )

    def attribute(self, name: str) -> str:
        """Up to the next comma, or the text within its braces; empty if it has none."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^, ]*))", self.attributes)
        return (match[1] or match[2] or "") if match else ""

    @functools.cached_property
    def config(self) -> dict:
        """Its `backend_config`."""
        at = self.attributes.find("backend_config=")
        if at < 0 or self.attributes[at + 15 : at + 16] != "{":
            return {}
        return json.JSONDecoder().raw_decode(self.attributes[at + 15 :])[0]


@dataclasses.dataclass
class Program:
    """The computations of a program, and how often each runs.

    Attributes:
      computations: instructions by name, in order, by computation.
      entry: the computation that runs first.
      times: how often each computation runs; those that never do are not in it.
      fused: computations that run within one instruction (fusions, reductions).
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    times: Counter[str] = dataclasses.field(default_factory=Counter)
    fused: set[str] = dataclasses.field(default_factory=set)

    def instructions(self, *, fused: bool) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """All that run, each with the instructions beside it and how often; those within fusions too, or not."""
        for name, times in self.times.items():
            if fused or name not in self.fused:
                scope = self.computations[name]
                for instruction in scope.values():
                    yield instruction, scope, times


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Reads a program's text."""
    computations, entry = {}, ""
    scope: dict[str, Instruction] = {}
    for line in _logical_lines(text):
        header = _HEADER.match(line)
        if header:
            scope = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        else:
            instruction = _instruction(line)
            scope[instruction.name] = instruction
    program = Program(computations, entry)
    _count(program, entry, 1, fused=False)
    return program


def _logical_lines(text: str) -> Iterator[str]:
    """Headers and instructions; the attributes of a Pallas kernel may span lines."""
    pending = ""
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction or line == "}" or (_HEADER.match(line) and not line.startswith(("HloModule", " "))):
            if pending:
                yield pending
            pending = "" if line == "}" else line
        elif pending and not _HEADER.match(pending):
            pending += "\n" + line
    if pending:
        yield pending


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    assert start, line
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing]
    operands = tuple(_NAME.findall(arguments))
    opcode = line[end:opening].strip()
    return Instruction(start[2], line[at:end], opcode, operands, arguments, line[closing + 1 :], bool(start[1]))


def _closing(line: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"not HLO: {line[:200]!r}")


def _count(program: Program, name: str, times: int, *, fused: bool) -> None:
    program.times[name] += times
    if fused:
        program.fused.add(name)
    for instruction in program.computations[name].values():
        inside = fused or instruction.opcode not in ("while", "call", "conditional", "async-start")
        trips = _trip_count(program, name, instruction) if instruction.opcode == "while" else 1
        for _, called in _CALLED.findall(instruction.attributes):
            for target in re.findall(r"[\w.\-]+", called):
                if target in program.computations:
                    _count(program, target, times * trips, fused=inside)


def _trip_count(program: Program, name: str, loop: Instruction) -> int:
    """As XLA says; for TPU it says nothing, and the condition does: the counter, from 0, is less than a constant."""
    known = loop.config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition = program.computations[loop.attribute("condition").lstrip("%")]
    root = next(x for x in condition.values() if x.root)
    while root.opcode in ("fusion", "bitcast", "copy"):
        inner = program.computations.get(root.attribute("calls").lstrip("%"))
        if inner is None or len(condition) > 6:
            return 1
        condition, root = {**condition, **inner}, next(x for x in inner.values() if x.root)
    if root.opcode != "compare" or root.attribute("direction") != "LT":
        return 1
    limits = [x for x in condition.values() if x.opcode == "constant" and x.type.startswith("s32[]")]
    return int(limits[0].arguments) if len(limits) == 1 else 1


def estimated_cycles(text: str) -> int:
    """The sum of what the TPU compiler expects of each instruction.

    Kernels, collectives, asynchronous copies and writes of a single slot have no estimate.
    """
    total = 0
    for instruction, _, times in parse(text).instructions(fused=False):
        match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        total += times * int(match[1]) if match else 0
    return total


def flops(text: str) -> int:
    """Two for each multiplication of a matrix product; products inside attention kernels (`kernels`) are not seen."""
    total = 0
    for instruction, scope, times in parse(text).instructions(fused=True):
        if instruction.opcode == "dot":
            contracted = instruction.attribute("lhs_contracting_dims").split(",")
        elif instruction.opcode == "custom-call" and "__cublas$" in instruction.attribute("custom_call_target"):
            config = instruction.config["gemm_backend_config"]
            contracted = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        elif instruction.opcode == "convolution":
            total += times * _convolution_flops(instruction, *(scope[name] for name in instruction.operands))
            continue
        else:
            continue
        left = scope[instruction.operands[0]].arrays[0]
        size = math.prod(left.shape[int(i)] for i in contracted if i != "")
        total += 2 * times * size * math.prod(instruction.arrays[0].shape)
    return total


def _convolution_flops(instruction: Instruction, left: Instruction, right: Instruction) -> int:
    """TPU's form of a product. Batch dimensions are spatial ones with a window that sees one element of each."""
    lhs, rhs, out = re.split("_|->", instruction.attribute("dim_labels"))
    sizes = [
        dict(zip(labels, x.arrays[0].shape, strict=True))
        for labels, x in ((lhs, left), (rhs, right), (out, instruction))
    ]
    window = dict(part.split("=") for part in instruction.attribute("window").split() if "=" in part)
    total = 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis in sorted(filter(str.isdigit, lhs)):

        def of(name, default, axis=axis):
            return [int(i) for i in window[name].split("x")[int(axis)].split("_")] if name in window else [default]

        padding, stride = of("pad", 0)[0], of("stride", 1)[0]
        dilation, spread = of("rhs_dilate", 1)[0], of("lhs_dilate", 1)[0]
        total *= _overlaps(sizes[0][axis], sizes[1][axis], sizes[2][axis], padding, stride, dilation, spread)
    return total


@functools.lru_cache(maxsize=1024)
def _overlaps(size: int, window: int, out: int, padding: int, stride: int, dilation: int, spread: int) -> int:
    """How many pairs of an output and a window element meet an element of the input, along one dimension."""
    last = (size - 1) * spread
    places = (o * stride - padding + k * dilation for o in range(out) for k in range(window))
    return sum(0 <= place <= last and place % spread == 0 for place in places)


def kernels(text: str) -> list[tuple[str, tuple[tuple[int, ...], ...], int]]:
    """Calls of kernels whose work the text does not show: (name, shapes of the operands, times)."""
    found = []
    for instruction, scope, times in parse(text).instructions(fused=True):
        target = instruction.attribute("custom_call_target").strip('"')
        if target == "tpu_custom_call":
            target = re.sub(r"\.\d+$", "", instruction.name)
        elif "fmha" not in target and "triton" not in target:
            continue
        shapes = tuple(scope[name].arrays[0].shape for name in instruction.operands if scope[name].arrays)
        found.append((target, shapes, times))
    return found


def bytes_moved(text: str) -> int:
    """Bytes that instructions read and write outside a TPU's own memory.

    Of a stack of which a fusion takes a slice, that slice; more than the traffic where a part is read otherwise.
    """
    program, total = parse(text), 0
    for instruction, scope, times in program.instructions(fused=False):
        if instruction.opcode in _NO_WORK or "ConcatBitcast" in instruction.attributes:
            continue
        sources = [array for name in instruction.operands if name in scope for array in scope[name].arrays]
        results = list(instruction.arrays)
        if instruction.opcode == "fusion":
            total += times * _moved_by(program, instruction, scope)
            continue
        if instruction.opcode == "copy-start":  # (destination, source, context)
            results = results[:1]
        elif instruction.opcode in ("slice-start", "async-start"):  # ((sources), destination, context)
            results = results[len(sources) :][:1] or results[-1:]
            sources = [dataclasses.replace(array, shape=results[0].shape) for array in sources[:1]]
        elif instruction.opcode.endswith("-start"):
            results = results[len(results) // 2 :]
        elif instruction.opcode == "dynamic-slice":
            sources = results
        elif instruction.opcode == "dynamic-update-slice":
            sources = results = sources[1:2]
        total += times * sum(x.num_bytes for x in (*sources, *results) if VMEM not in x.layout)
    return total


def _moved_by(program: Program, fusion: Instruction, scope: dict[str, Instruction]) -> int:
    """Bytes that a fusion reads and writes."""
    inside = program.computations[fusion.attribute("calls").lstrip("%")]
    total = 0
    for number, name in enumerate(fusion.operands):
        if name in scope:
            size = sum(array.num_bytes for array in scope[name].arrays if VMEM not in array.layout)
            total += _read_by(inside, number, size)
    roots = [next(x for x in inside.values() if x.root)]
    if roots[0].opcode == "tuple":
        roots = [inside[name] for name in roots[0].operands]
    for root, array in zip(roots, fusion.arrays, strict=False):
        written = inside[root.operands[1]].arrays[0] if root.opcode == "dynamic-update-slice" else array
        total += 0 if VMEM in array.layout else written.num_bytes
    return total


def _read_by(inside: dict[str, Instruction], number: int, size: int) -> int:
    """Bytes that a fused computation reads of its parameter of that number, which has `size`."""
    parameter = next((x.name for x in inside.values() if x.opcode == "parameter" and x.arguments == str(number)), "")
    users = [x for x in inside.values() if parameter in x.operands]
    if users and all(x.opcode == "dynamic-slice" for x in users):
        return min(size, sum(x.arrays[0].num_bytes for x in users))
    if users and all(x.opcode == "dynamic-update-slice" and x.operands[0] == parameter for x in users):
        return 0  # written in place
    return size
