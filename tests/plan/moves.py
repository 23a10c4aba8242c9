"""What a compiled program sends between devices and moves about: for tests of compiled steps."""

from __future__ import annotations

import math
import re
from collections import defaultdict

from llama_jax.plan.hlo import VMEM, Instruction, Program, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def collectives(text: str) -> dict[str, int]:
    """Bytes that a device receives, by kind."""
    received: defaultdict[str, int] = defaultdict(int)
    seen = set()
    for instruction, scope, times in parse(text).instructions(fused=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        # A fused asynchronous collective is in its start, its steps and its end.
        channel = instruction.attribute("channel_id")
        if "async_collective" in instruction.attributes or _in_fusion(text, instruction):
            if channel in seen:
                continue
            seen.add(channel)
        operands = sum(array.num_bytes for name in instruction.operands for array in scope[name].arrays)
        arrays = instruction.arrays
        if instruction.opcode.endswith("-start") and instruction.type.startswith("(") and kind != "all-reduce":
            arrays = arrays[len(instruction.operands) : 2 * len(instruction.operands)]  # (operands, results, context)
        result = sum(array.num_bytes for array in arrays)
        n = _group_size(instruction)
        received[kind] += times * {
            "all-gather": result - operands,
            "reduce-scatter": operands - result,
            "all-reduce": 2 * operands * (n - 1) // n,
            "all-to-all": operands * (n - 1) // n,
        }.get(kind, operands)
    return dict(received)


def _in_fusion(text: str, instruction: Instruction) -> bool:
    program = parse(text)
    return any(program.computations[name].get(instruction.name) is instruction for name in program.fused)


def _group_size(instruction: Instruction) -> int:
    """How many devices take part, in any of the ways that `replica_groups` is written."""
    text = instruction.attributes.partition("replica_groups=")[2]
    if text.startswith("{{"):
        return text[2:].partition("}")[0].count(",") + 1
    if iota := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(part.split("=") for part in mesh[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(","))
    return 1


def large_moves(text: str, at_least: int = 2**20) -> list[str]:
    """Copies, conversions, transposes and slices of a parameter whose result has `at_least` bytes, one line each.

    Followed from the program's parameters (weights and cache) through loops and their results. What a TPU fetches into
    its own memory on the way to a product is no move: asynchronous copies, and what is done to them there counts.
    """
    program = parse(text)
    found: list[str] = []
    _follow(program, program.entry, None, found, at_least, set())
    return found


MOVES = frozenset(("copy", "convert", "transpose", "slice", "dynamic-slice", "reverse", "pad", "concatenate"))


_SAME = frozenset(("bitcast", "get-tuple-element", "tuple", "opt-barrier", "reshape", "dynamic-update-slice"))


def _follow(program, name, arguments, found, at_least, done):
    """Finds moves in a computation; returns which leaves of its result are still parameters: a set of indices, or True.

    `arguments` says so of each of its parameters; None: all of them.
    """
    key = (name, repr(arguments))
    scope = program.computations[name]
    held: dict[str, set[int] | bool] = {}
    for x in scope.values():
        if x.opcode == "parameter":
            index = int(x.arguments)
            held[x.name] = True if arguments is None else arguments[index]
            continue
        of = [held.get(operand, False) for operand in x.operands]
        if x.opcode == "get-tuple-element":
            index = int(x.attribute("index"))
            held[x.name] = of[0] if isinstance(of[0], bool) else index in of[0]
        elif x.opcode == "tuple":
            held[x.name] = {i for i, kept in enumerate(of) if kept}
        elif x.opcode in ("while", "call"):
            target = x.attribute("body" if x.opcode == "while" else "to_apply").lstrip("%")
            result = _follow(program, target, of, found, at_least, done)
            if x.opcode == "while" and not isinstance(result, bool) and not isinstance(of[0], bool):
                result = result & of[0]
            held[x.name] = result
        elif not any(of):
            held[x.name] = False
        elif x.opcode in ("copy-start", "slice-start", "async-start"):
            to_vmem = VMEM in x.arrays[0 if x.opcode == "copy-start" else -2 if len(x.arrays) > 2 else -1].layout
            held[x.name] = bool(of[0])
            if not to_vmem and x.opcode != "copy-start":
                _report(x, found, at_least, key, done)
        elif x.opcode.endswith("-done") or x.opcode in _SAME or "ConcatBitcast" in x.attributes:
            held[x.name] = bool(of[0])
        elif x.opcode in MOVES:
            held[x.name] = True
            _report(x, found, at_least, key, done)
        elif x.opcode == "fusion":
            held[x.name] = _moved_by_fusion(program, x, of)
            if held[x.name]:
                _report(x, found, at_least, key, done)
        elif x.opcode == "custom-call" and "output_to_operand_aliasing" in x.attributes:
            held[x.name] = True
        else:
            held[x.name] = False
    root = next(x for x in scope.values() if x.root)
    return held.get(root.name, False)


def _moved_by_fusion(program: Program, fusion: Instruction, of: list) -> bool:
    """Whether the root of the fused computation is a parameter, moved: through bitcasts and other moves alone."""
    scope = program.computations[fusion.attribute("calls").lstrip("%")]
    x = next(x for x in scope.values() if x.root)
    moved = False
    while x.opcode in MOVES or x.opcode in ("bitcast", "reshape", "fusion"):
        if x.opcode == "fusion":
            inner = [
                scope[operand].opcode == "parameter" and bool(of[int(scope[operand].arguments)])
                for operand in x.operands
            ]
            return _moved_by_fusion(program, x, inner)
        moved |= x.opcode in MOVES
        x = scope[x.operands[0]]
    return moved and x.opcode == "parameter" and bool(of[int(x.arguments)])


def _report(x: Instruction, found: list[str], at_least: int, key: tuple, done: set) -> None:
    size = max((array.num_bytes for array in x.arrays), default=0)
    if size >= at_least and (key[0], x.name) not in done:
        done.add((key[0], x.name))
        source = re.search(r'op_name="([^"]*)"', x.attributes)
        found.append(f"{x.opcode} {x.name} = {x.type[:120]} ({size} bytes), of {source[1] if source else '?'}")
