"""What a run tells: a line of progress, `metrics.jsonl`, TensorBoard, Weights & Biases, and a picture of its curves."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from llama_jax.data.prepare.system import naming
from llama_jax.files import write_whole
from llama_jax.progress import rich_bar
from llama_jax.typing import Fields, Foreign, JsonObject

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
CURVES, WANDB = "curves.png", "wandb_id"
EVERY = 10.0  # seconds between lines where stderr is no terminal
SHOWN = ("loss", "learning_rate", "tokens_per_second", "mfu")


class Reporter:
    """Writes one object a step to `metrics.jsonl`, and shows some of it; on process 0 only.

    Args:
      output: the run's folder.
      main: whether this is process 0; the others' reports go nowhere.
      total_steps: of the run.
      step: of the checkpoint that it resumes from: what was written of later steps is taken back.
      tensorboard: whether to write event files too.
      wandb: a project of Weights & Biases, or nothing.
      recipe: for Weights & Biases.
    """

    def __init__(
        self,
        output: Path,
        *,
        main: bool,
        total_steps: int,
        step: int,
        tensorboard: bool,
        wandb: str,
        recipe: Fields,
    ):
        self._main, self._file, self._events, self._wandb, self._bar = main, None, None, None, None
        if not main:
            return
        if wandb:
            self._wandb = _start_wandb(wandb, output, recipe)
        output.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            _keep_until(output / name, step)
        self._file = (output / METRICS).open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(output.absolute() / "tensorboard"), purge_step=step + 1)
        self._total, self._last = total_steps, 0.0
        self._start, self._first = time.monotonic(), step
        if sys.stderr.isatty():
            self._bar = rich_bar("bar", "count", "{task.fields[text]}", "left", transient=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=total_steps, completed=step, text="")

    def step(self, values: Fields) -> None:
        """Takes one step's metrics, `step` and numbers, and shows them."""
        self.record(values)
        if not self._main:
            return
        text = _text(values)
        if self._bar:
            self._bar.update(self._task, completed=values["step"], text=text)
        elif time.monotonic() - self._last >= EVERY or values["step"] == self._total or "validation_loss" in values:
            self._last = time.monotonic()
            self.say(f"step {values['step']}/{self._total}  {text}{self._left(values['step'])}")

    def record(self, values: Fields) -> None:
        """Writes metrics of a step, `step` and numbers."""
        if not self._main:
            return
        assert self._file
        finite = {name: finite_or_none(value) for name, value in values.items()}
        with naming(self._file.name, "write"):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in finite.items() if isinstance(value, (int, float)) and name != "step"}
        if self._events:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.log(numbers, step=values["step"])

    def _left(self, step: int) -> str:
        """How long the rest takes, in words, where it is more than a few seconds."""
        seconds = (time.monotonic() - self._start) / max(1, step - self._first) * (self._total - step)
        return f"  {duration(seconds)} left" if seconds > EVERY else ""

    def say(self, text: str) -> None:
        """Shows a line."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._main:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line of progress, and the files."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        if self._file:
            with naming(self._file.name, "write"):
                self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def count(number: float) -> str:
    """Such as 16,196, 2.0M, 8.03B, 15.0T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Such as "40 s", "9 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def read_metrics(output: Path) -> list[JsonObject]:
    """The objects of a run's `metrics.jsonl`, without a last line that was cut short by a kill."""
    return _read(output / METRICS)


def _read(path: Path) -> list[JsonObject]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def draw_curves(output: Path) -> Path | None:
    """Draws loss, learning rate, gradient norm and speed over the steps into `curves.png`; None without any step."""
    from matplotlib.figure import Figure

    rows = read_metrics(output)
    if not rows:
        return None
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    panels = panels.flat

    def curve(panel: Foreign, name: str, label: str, **style: object) -> None:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, **style)

    loss, rate, norm, speed = panels
    curve(loss, "loss", "training", linewidth=0.8)
    curve(loss, "validation_loss", "validation", marker="o", markersize=3)
    loss.set_title("loss (nats a token)")
    loss.legend()
    for panel, name, title in (
        (rate, "learning_rate", "learning rate"),
        (norm, "grad_norm", "gradient norm"),
        (speed, "tokens_per_second", "tokens a second"),
    ):
        curve(panel, name, title, linewidth=0.8)
        panel.set_title(title)
    for panel in (loss, rate, norm, speed):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.savefig(output / CURVES, dpi=100)
    return output / CURVES


def _keep_until(path: Path, step: int) -> None:
    """Takes back what was written after `step`, which will be done again."""
    if not path.exists():
        return
    kept = [row for row in _read(path) if row.get("step", 0) <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def finite_or_none(value: Any) -> Any:
    """A number as JSON takes it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _text(values: Fields) -> str:
    loss = values["loss"]
    text = f"loss {loss:.4f}" if values.get("finite", True) else "not finite, step skipped"
    text += f"  lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
    if values.get("mfu") is not None:
        text += f"  MFU {values['mfu']:.1%}"
    if values.get("epoch"):
        text += f"  epoch {values['epoch'] + 1}"
    if values.get("validation_loss") is not None:
        text += f"  validation {values['validation_loss']:.4f}"
    if values.get("exact_match") is not None:
        text += f"  exact match {values['exact_match']:.1%}"
    if values.get("validation_bits_per_byte") is not None:
        text += f" ({values['validation_bits_per_byte']:.3f} bits a byte)"
    return text


def _start_wandb(project: str, output: Path, recipe: Fields) -> Foreign:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("--wandb needs the package: pip install wandb (or leave the option out)") from error
    output.mkdir(parents=True, exist_ok=True)
    file = output / WANDB  # so that a run that is resumed continues its own curves
    known = file.read_text(encoding="utf-8").strip() if file.exists() else None
    run = wandb.init(
        project=project, dir=str(output), name=output.name, config=dict(recipe), resume="allow", id=known or None
    )
    file.write_text(f"{run.id}\n", encoding="utf-8")
    return run
