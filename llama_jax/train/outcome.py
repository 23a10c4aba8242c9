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
      chats: whether it was trained on conversations.
    """

    output: str
    step: int
    loss: float | None
    seconds: float
    validation: dict[str, float]
    reference: dict[str, float]
    skipped: int
    signal: int | None
    chats: bool = False

    def __str__(self) -> str:
        """In words, a line each."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        lines = [f"{'stopped' if self.signal else 'done'} at step {self.step} after {duration(self.seconds)}{loss}"]
        if self.validation:
            bits, right = (self.validation.get(name) for name in ("validation_bits_per_byte", "exact_match"))
            per_byte = "no byte is predicted" if bits is None else f"{bits:.4f} bits a byte"
            more = per_byte if right is None else f"{right:.1%} of the replies are the answer"
            lines.append(f"validation: {self.validation['validation_loss']:.4f} nats a token, {more}")
            lines += [f"  for comparison, {name}: {bits:.4f} bits a byte" for name, bits in self.reference.items()]
        if self.skipped:
            lines.append(f"{self.skipped} steps were skipped: their loss or gradient was not finite")
        if self.signal:
            lines.append("go on with --resume auto")
        else:
            command = "chat.py" if self.chats else "generate.py --prompt ..."
            script, *options = command.split(" ", 1)
            lines.append(" ".join([f"python scripts/{script} --model {shlex.quote(self.output)}", *options]))
        return "\n".join(lines)
