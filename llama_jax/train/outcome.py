"""How a run ended."""

from __future__ import annotations

import dataclasses
import shlex

from llama_jax.train.report import duration


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      output: its folder.
      step: the last one that was done.
      loss: of that step, nats a token; None without any.
      seconds: that it took.
      validation: of `Validator`, or empty.
      reference: bits a byte that something else needs for what is held out, by its name.
      skipped: steps that changed nothing.
      signal: what it was asked to stop by, or None where it is complete.
    """

    output: str
    step: int
    loss: float | None
    seconds: float
    validation: dict[str, float]
    reference: dict[str, float]
    skipped: int
    signal: int | None

    def __str__(self) -> str:
        """In words, a line each."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        lines = [f"{'stopped' if self.signal else 'done'} at step {self.step} after {duration(self.seconds)}{loss}"]
        if self.validation:
            bits = self.validation.get("validation_bits_per_byte")
            per_byte = "no byte is predicted" if bits is None else f"{bits:.4f} bits a byte"
            lines.append(f"validation: {self.validation['validation_loss']:.4f} nats a token, {per_byte}")
            lines += [f"  for comparison, {name}: {bits:.4f} bits a byte" for name, bits in self.reference.items()]
        if self.skipped:
            lines.append(f"{self.skipped} steps were skipped: their loss or gradient was not finite")
        if self.signal:
            lines.append("go on with --resume auto")
        else:
            lines.append(f"python scripts/generate.py --model {shlex.quote(self.output)} --prompt ...")
        return "\n".join(lines)
