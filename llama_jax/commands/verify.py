"""Compare two checkpoints of any formats: configuration, tokenizer, every weight, and the logits of a long text.

    python scripts/verify.py meta-llama/Llama-3.2-1B-Instruct llama-1b-meta
    python scripts/verify.py smollm2-135m-instruct smollm2-q8.gguf --tolerance 2 --json
    python scripts/verify.py llama-70b-hf llama-70b-native --no-logits      # loads no model

Exit code 1 when they differ: in configuration or tokenizer at all, in a weight or a logit by more than --tolerance.
Exit code 2 when they cannot be compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import tyro

from llama_jax.cli import ProcessArgs


@dataclasses.dataclass
class Args:
    a: tyro.conf.Positional[str]
    """The reference: a folder, a .gguf file, a hub id or smollm2-135m-instruct."""
    b: tyro.conf.Positional[str]
    """The other one."""
    tolerance: float = 1e-5
    """Most that a weight, a kind of weight relative to its size, or a logit may differ."""
    logits: bool = True
    """Compare logits, in float32, of one text past position 8192 where the models allow; loads each model once."""
    positions: int = 8704
    """Length of that text in tokens."""
    mesh: str | None = None
    """Devices for the logits, such as fsdp=2,tensor=4; default: the tuned table's, else all on tensor."""
    json: bool = False
    """Print one JSON object."""
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def main(args: Args) -> int:
    args.processes.start()
    from llama_jax.distributed import is_main
    from llama_jax.evaluate.compare import compare

    if args.positions < 1 or not args.tolerance >= 0:
        raise ValueError(f"--positions must be positive, --tolerance not negative: {args.positions}, {args.tolerance}")
    found = compare(
        args.a, args.b, positions=args.positions, mesh=args.mesh, with_logits=args.logits,
        say=lambda text: print(f"{text} ...", file=sys.stderr) if is_main() else None,
    )  # fmt: skip
    problems = found.problems(args.tolerance)
    same = not problems
    if args.json:
        print(json.dumps(finite({"same": same, "tolerance": args.tolerance} | dataclasses.asdict(found))))
        return int(not same)
    if not found.weights:
        print("weights: not compared, their shapes differ")
    else:
        print(f"{'weights (worst layer)':28}{'dtypes':>20}{'max |difference|':>20}{'relative RMS':>15}")
    for d in found.weights:
        dtypes = d.dtypes[0] if d.dtypes[0] == d.dtypes[1] else "/".join(d.dtypes)
        size = f"{'same bits':>20}{'':>15}" if d.same_bits else f"{d.max_abs:20.3e}{d.relative:15.3e}"
        print(f"{d.name:28}{dtypes:>20}{size}")
    if found.logits:
        x = found.logits
        print(f"logits at position {x.positions}: max |difference| {x.max_abs:.3e}, KL {x.kl:.3e}, top-1 {x.top1:.1%}")
    for text in found.left_out:
        print(text)
    within = f"tolerance {args.tolerance:g}"
    print(f"the same, {within}" if same else f"different, {within}: {'; '.join(problems)}")
    return int(not same)


def finite(value: Any) -> Any:
    """Returns `value` with None for NaN and infinity, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
