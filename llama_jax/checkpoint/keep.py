"""Which checkpoints of a run are kept: a pure function of their steps and validation losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Validated:
    """What is known of the validation of one checkpoint.

    Attributes:
      loss: None where it was not measured, or was not finite.
      of: what it was measured on; only losses of the same are compared. Empty: not recorded, taken to be that of the
        newest.
    """

    loss: float | None = None
    of: str = ""


@dataclasses.dataclass(frozen=True)
class KeepRules:
    """The rules, each of which keeps checkpoints that the others would not.

    Attributes:
      last: how many of the newest.
      every: those of every so many steps; 0: none.
      best: how many with the lowest loss, of equal ones the later; as many for each thing that was measured on.
    """

    last: int
    every: int
    best: int

    def kept(self, steps: Iterable[int], validated: Mapping[int, Validated]) -> set[int]:
        """Returns the steps that stay.

        Args:
          steps: of all checkpoints.
          validated: of each; one that it does not have is unknown, and stays where the best are kept.
        """
        steps = sorted(steps)
        kept = set(steps[-max(1, self.last) :])
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        if self.best:
            kept |= {step for step in steps if step not in validated}
            newest = next((known.of for step in reversed(steps) if (known := validated.get(step)) and known.of), "")
            groups: dict[str, list[tuple[float, int]]] = {}
            for step in steps:
                if (known := validated.get(step)) and known.loss is not None and math.isfinite(known.loss):
                    groups.setdefault(known.of or newest, []).append((known.loss, -step))
            kept |= {-step for group in groups.values() for _, step in sorted(group)[: self.best]}
        return kept
