"""How fast a model runs on this machine.

    python scripts/bench.py                                  # decode at batch 1 and 8, prefill of 512 tokens
    python scripts/bench.py --against transformers           # the same weights in transformers, timed in turn
    python scripts/bench.py --startup                        # seconds from the command to the first character
    python scripts/bench.py --training --against transformers  # a training step; 3 minutes
    python scripts/bench.py --training-memory                # what remat and microbatches save, as the compiler says
    python scripts/bench.py --loader                         # tokens a second of the data loader alone
    python scripts/bench.py --convert llama3.2-3b            # conversion HF <-> Meta against cp; needs 26 GB of disk

Times vary with what else the machine does: compare ratios of one run. --json prints one object.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

CLONE = Path(__file__).parents[2]


def __getattr__(name: str) -> Any:
    """Returns `Args` or `main` of scripts/bench/command.py, which only a clone has."""
    if name not in ("Args", "main"):
        raise AttributeError(name)
    if not (CLONE / "scripts" / "bench" / "command.py").is_file():
        where = "run scripts/bench.py in a clone of the repository"
        raise FileNotFoundError(f"the benchmarks are not installed with the package: {where}")
    if str(CLONE) not in sys.path:
        sys.path.insert(0, str(CLONE))
    return getattr(importlib.import_module("scripts.bench.command"), name)
