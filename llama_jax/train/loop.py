"""A training run from its recipe to its end: it can be killed at any moment, and resumes as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.checkpoint.arrays import DamagedError
from llama_jax.checkpoint.paths import local_folder
from llama_jax.checkpoint.run import RunCheckpoints
from llama_jax.compilation_cache import use_compilation_cache
from llama_jax.config import ModelConfig
from llama_jax.costs import mfu as metrics
from llama_jax.data.rows.loader import Loader, Step
from llama_jax.data.rows.plan import sources
from llama_jax.distributed.agreement import fingerprint
from llama_jax.libc import keep_freed_memory
from llama_jax.sharding import whole_weights
from llama_jax.train import build, checks, corpora, resume
from llama_jax.train.choose import choose, chosen_by
from llama_jax.train.guard import check_output, memory_in_words, only_one
from llama_jax.train.measure import Measurements
from llama_jax.train.objective import objective_of
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.outcome import Outcome
from llama_jax.train.preferences import REFERENCE
from llama_jax.train.profile import tracing, window
from llama_jax.train.recipe import Recipe
from llama_jax.train.reference import keep_reference
from llama_jax.train.report import Reporter, count, draw_curves, finite_or_none, read_metrics
from llama_jax.train.state import TrainState, describe, from_named_arrays, named_arrays, new_state
from llama_jax.train.step import compiled
from llama_jax.train.stop import StopRequest, on_request
from llama_jax.typing import JsonObject
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.formats.hf import hf_texts
from llama_jax.weights.formats.native import is_stacked
from llama_jax.weights.peft import RECIPE

log = logging.getLogger("llama_jax")

CHECKPOINTS = "checkpoints"
# Results of a step that are recorded by other names.
ELSEWHERE = ("tokens", "positions", "finite", "skipped", "skipped_in_a_row", "stop")


def train(recipe: Recipe, *, name: str = "run") -> Outcome:
    """Carries out a recipe; all processes call it alike.

    Args:
      recipe: the run.
      name: of the default output folder, `runs/NAME`.

    Returns:
      How it ended; after SIGTERM or Ctrl-C too, its state saved.

    Raises:
      ValueError: the recipe does not fit the data, the devices or what is in the output folder; or too many steps in a
        row were not finite.
      OSError: a file cannot be read or written; the last good checkpoint is intact.
    """
    with on_request() as request, memory_in_words(), contextlib.ExitStack() as guards:
        run = TrainingRun(recipe, local_folder(recipe.output or f"runs/{name}"), request, guards)
        with contextlib.closing(run):
            return run.go()


@dataclasses.dataclass
class _Pending:
    """A step whose results are still on the devices."""

    step: int
    part: Step
    results: dict[str, jax.Array]


class TrainingRun:
    """One run: what it reads, what it has made, and where it stands."""

    def __init__(self, recipe: Recipe, output: Path, request: StopRequest, guards: contextlib.ExitStack):
        self.recipe, self.output, self.request = recipe, output, request
        self.start = time.monotonic()
        request.nothing_to_lose = distributed.process_count() == 1
        resume.check_allowed(recipe)
        distributed.agree(resume.of_all_processes(recipe))
        use_compilation_cache()
        self.checkpoints = RunCheckpoints(
            output / CHECKPOINTS, **_kept(recipe), stacked=is_stacked,
            earlier=lambda: {row["step"]: row.get("validation_loss") for row in read_metrics(output) if "step" in row},
        )  # fmt: skip
        steps = distributed.broadcast(self.checkpoints.steps())
        if steps and recipe.resume == "never":
            raise ValueError(
                f"{output} holds a run, saved at step {steps[-1]}: go on with it by --resume auto, or give another"
                " --output"
            )
        if steps:
            resume.check_adapter(self.checkpoints.folder / str(steps[-1]) / RECIPE, recipe)
        checks.check_numbers(recipe)
        self.total, self.window = recipe.total_steps, window(recipe.profile)
        self.objective = objective_of(recipe)
        self.optimizer, self.schedule = adamw(recipe.optimizer), learning_rate(recipe.optimizer.schedule)
        self.corpora = corpora.open_corpora(recipe, output)
        self.batches = checks.batch_schedule(recipe.batch)
        self.plan = corpora.row_plan(recipe, self.corpora)
        # A resumed run has all that it began with, but the weights that an adapter leaves as they are.
        initial = None if steps and not recipe.adapter else build.open_initial(recipe, self.corpora)
        self.config = self._config(initial)
        self._agree_on_files(initial, steps)
        checks.check_sizes(recipe, self.config, self.corpora)
        self.machine = build.machine_here()
        self.recipe = recipe = choose(recipe, self.config, self.machine)
        distributed.agree(resume.of_all_processes(recipe))  # a process may have been given less memory
        self.batches = checks.batch_schedule(recipe.batch)
        self.mesh = build.mesh_of_recipe(recipe, self.config)
        if self.mesh.devices.flat[0].platform == "cpu":
            keep_freed_memory()
        self.measurements = Measurements(recipe, self.config, self.corpora, self.objective, self.mesh, output)
        self.files = self._files()
        if distributed.is_main():
            guards.enter_context(only_one(output))
        check_output(output, CHECKPOINTS, self.total)
        self.step = self.rows = 0
        self.last: JsonObject = {}
        self.validated: dict[str, float] = {}
        self.validated_step: int | None = None
        self.changes: list[JsonObject] = []
        self._save_owed = False
        self._whole_was_said = initial is not None  # by what reads it
        self.base = build.weights_id(initial) if initial and recipe.adapter else None
        self.state = self._restored(steps[-1], initial) if steps else self._new(initial)
        if REFERENCE in self.objective.columns:
            both: Any = [*self.corpora.train, *self.corpora.validation]
            keep_reference(self.state.model, both, self.objective, recipe.batch.seq_len, self.mesh, began=bool(steps))
        self.reporter = Reporter(
            output, main=distributed.is_main(), total_steps=self.total, step=self.step,
            tensorboard=recipe.tensorboard, wandb=recipe.wandb, recipe=dataclasses.asdict(recipe),
        )  # fmt: skip
        self._programs: dict[Any, Any] = {}

    # --- Before the first step ---

    def _config(self, initial: Checkpoint | None) -> ModelConfig:
        if initial:
            return initial.config
        if self.recipe.init_from:  # a resumed run: what it began with need not exist any more
            from llama_jax.weights.open import open_checkpoint

            return open_checkpoint(self.output).config
        return self.recipe.model

    def _agree_on_files(self, initial: Checkpoint | None, steps: list[int]) -> None:
        """Raises DisagreementError where the processes do not all read the same files."""
        if distributed.process_count() == 1:
            return
        newest = self.checkpoints.folder / str(steps[-1]) if steps else None
        train, validation = map(corpora.facts_of, (self.corpora.train, self.corpora.validation))
        distributed.agree(
            {
                "data": {"train": train, "validation": validation},
                "init_from": fingerprint(initial.path) if initial else None,
                "checkpoint": {newest.name: fingerprint(newest)} if newest else None,
                "model": dataclasses.asdict(self.config),
            }
        )  # fmt: skip

    def _new(self, initial: Checkpoint | None) -> TrainState:
        with jax.set_mesh(self.mesh):
            if initial:
                return build.initial_state(self.recipe, initial, self.optimizer, self.mesh)

            def new() -> TrainState:
                model = build.make_model(self.recipe, self.config, seed=self.recipe.seed)
                return new_state(model, self.optimizer)

            return distributed.compile_together(jax.jit(new).lower())()

    def _restored(self, step: int, initial: Checkpoint | None) -> TrainState:
        progress = self.checkpoints.progress(step)
        if self.base != progress.get("base"):
            raise ValueError(
                f"{self.output}: its adapter was trained on other weights than those of {self.recipe.init_from}: give"
                " the same by --init-from, or begin a new run in another --output"
            )
        if changed := corpora.changed_reads(progress["reads"], self.recipe, self.corpora):
            raise ValueError(
                f"{self.output}: its {progress['rows']} rows were counted with {'; '.join(changed)}: give the same, or"
                f" begin a new run from its weights: --output NEW --init-from {self.output}"
            )
        with jax.set_mesh(self.mesh):
            abstract = build.abstract_state(self.recipe, self.config, self.optimizer)
        try:
            self.checkpoints.check(step, named_arrays(abstract))
            before = resume.recorded(self.checkpoints.folder / str(step), RECIPE)
            found = resume.changes(before, self.recipe, self.config)
            resume.refuse(found, self.recipe)
            items = self.checkpoints.restore(step, named_arrays(abstract))
        except DamagedError as error:
            first, *_ = str(error).splitlines()  # the library adds its settings
            raise ValueError(
                f"{first}. Remove {self.checkpoints.folder / str(step)} to go on from the one before"
            ) from error
        self._remember(step, progress, resume.to_say(found, self.recipe))
        state = from_named_arrays(abstract, items)
        return build.with_frozen(state, self.recipe, initial, self.mesh) if initial else state

    def _remember(self, step: int, progress: JsonObject, changed: list[resume.Change]) -> None:
        """Takes up what the run decided by when this checkpoint was saved; an older version recorded less."""
        self.step, self.rows = step, progress["rows"]
        self.last = dict(progress.get("last", {}))
        known = progress.get("validated", {})
        self.validated = {name: math.nan if value is None else value for name, value in known.items()}
        self.validated_step = progress.get("validated_step")
        self._save_owed = bool(progress.get("save_owed"))
        new = [{"step": step, "field": one.field, "before": one.before, "now": one.now} for one in changed]
        self.changes = [*progress.get("changes", []), *new]
        if distributed.is_main():
            for change in changed:
                print(f"resumed with {change}", file=sys.stderr)
        self.checkpoints.tidy()  # of a run that was killed before it did so

    def _files(self) -> dict[str, bytes]:
        """What makes a checkpoint of ours a model that `load` takes."""
        files = self.corpora.tokenizer_files
        tokenizer = self.corpora.train[0].tokenizer()
        described = Checkpoint(self.output, "native", self.config, {}, tokenizer, lambda: files)
        recipe = json.dumps(dataclasses.asdict(self.recipe), indent=1).encode()
        texts = hf_texts(described, "float32")
        if self.recipe.adapter:  # beside PEFT's files, which make the folder an adapter's
            texts.pop("config.json")
        return {**texts, RECIPE: recipe}

    # --- The run ---

    def go(self) -> Outcome:
        """Does the steps that are left."""
        recipe, pending = self.recipe, None
        self._introduce()
        self._clock = time.perf_counter()
        spec = self.state.model.rules
        if not self.step and (found := self.measurements.before(self.state.model, self.reporter.say)):
            self.reporter.record({"step": 0, **found})
            self._clock = time.perf_counter()
        with jax.set_mesh(self.mesh):
            microbatch = self.batches.shape(self.batches.stages[-1])[1:]
            sharding = jax.NamedSharding(self.mesh, jax.P(None, *spec.spec(("batch", "seq"), microbatch)))
            loader = Loader(
                self.plan, self.batches, first_row=self.rows, sharding=sharding, threads=recipe.data.threads,
                prefetch=recipe.data.prefetch, columns=self.objective.columns,
            )  # fmt: skip
            # Elsewhere the host prepares the next step while the devices compute this one.
            synchronous = self.mesh.devices.flat[0].platform == "cpu"
            with loader, tracing(self.window, self.output) as profile:
                while self.step < self.total and not self._stopping():
                    profile(self.step, self.state)
                    part = next(loader)
                    program = self._program(part)
                    self.state, results = program(self.state, part.batch, self._stop_flags())
                    self.request.nothing_to_lose = False
                    self.step += 1
                    self.rows = part.first_row + part.rows
                    if pending:
                        self._report(pending)
                    pending = _Pending(self.step, part, results)
                    self._save_owed |= self._due(recipe.checkpoints.every) and self.step < self.total
                    if synchronous or self._save_owed or self.measurements.is_due(self.step):
                        self._report(pending)
                        pending = None
                    self.checkpoints.poll()
                    if self._save_owed and self._is_sound() and not self.last["skipped_in_a_row"]:  # else later
                        self._save_owed = False
                        self._save()
                if pending:
                    self._report(pending)
            if self.step and self._is_sound():
                self._save()
            self.checkpoints.wait()
        if distributed.is_main():
            draw_curves(self.output)
        signal_ = (self.request.signal or signal.SIGTERM) if self.step < self.total else None
        return Outcome(
            output=str(self.output), step=self.step, loss=finite_or_none(self.last.get("loss")),
            seconds=time.monotonic() - self.start, validation=self.validated, reference=self._reference(),
            skipped=int(self.last.get("skipped", 0)), signal=signal_, chats=self.objective.whole,
        )  # fmt: skip

    def _reference(self) -> dict[str, float]:
        """What else needs for the documents that were measured, where it is known."""
        if len(self.corpora.validation) != 1 or self.recipe.validation.documents:
            return {}
        return dict(self.corpora.validation[0].manifest.reference)

    def close(self) -> None:
        """Ends its threads; after an error it does not wait for what is being saved."""
        self.reporter.close()
        if sys.exc_info()[0] is None:
            self.checkpoints.close()

    def _introduce(self) -> None:
        config, recipe = self.config, self.recipe
        stage = self.batches.stage_at(self.rows)
        tokens = sum(corpus.manifest.tokens for corpus in self.corpora.train)
        self.reporter.say(
            f"{count(config.param_count())} parameters on {describe(self.mesh)}, {self.state.model.dtype};"
            f" {count(tokens)} tokens to read, {stage.rows * recipe.batch.seq_len:,} a step"
        )
        if self.machine:
            parts = f", {recipe.batch.microbatches} microbatches" if recipe.batch.microbatches > 1 else ""
            how = chosen_by(recipe, self.config, self.machine)
            self.reporter.say(f"mesh {recipe.mesh}, remat {recipe.remat}{parts}: {how}")
        if not self._whole_was_said and (
            whole := whole_weights(self.state.model.rules.undivided(config, self.mesh.shape))
        ):
            self.reporter.say(whole)
        if self.step >= self.total:
            self.reporter.say(f"{self.output}: all {self.total} steps are done already; --steps gives it more")
        else:
            after = f"from step {self.step} to" if self.step else "to step"
            self.reporter.say(f"{self.output}: {after} {self.total}")
        last = recipe.optimizer.schedule.steps
        if self.total > last:
            self.reporter.say(f"the learning rate stays as it is at step {last}, where its schedule ends")
        if self.config.vocab_size > 1.1 * (known := self.corpora.train[0].manifest.vocab_size):
            self.reporter.say(
                f"the tokenizer has {known:,} ids, so that the rest of {config.vocab_size:,} is not trained"
            )

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _is_sound(self) -> bool:
        """Whether the latest parameters are numbers: a learning rate that is far too large leaves none."""
        return math.isfinite(self.last.get("param_norm", 0.0))

    def _stopping(self) -> bool:
        if distributed.process_count() == 1:
            return self.request.signal is not None
        return bool(self.last.get("stop"))  # of a step that all have done

    def _stop_flags(self) -> jax.Array:
        """One number a device: whether its process has been asked to stop."""
        everywhere = jax.NamedSharding(self.mesh, jax.P(self.mesh.axis_names))
        asked = self.request.signal is not None
        return jax.make_array_from_callback((self.mesh.size,), everywhere, lambda index: np.full(1, asked), dtype=bool)

    def _program(self, part: Step) -> Any:
        """The step compiled for batches of this shape."""
        shape = part.batch["tokens"].shape
        if shape not in self._programs:
            start = time.perf_counter()
            step = compiled(self.optimizer, self.schedule, self.objective)
            lowered = step.lower(self.state, part.batch, self._stop_flags())
            self._programs[shape] = distributed.compile_together(lowered, self.recipe.compiler_options)
            M, B, T = shape
            parts = f"{M} microbatches of " if M > 1 else ""
            self.reporter.say(f"compiled for {parts}{B} x {T} tokens in {time.perf_counter() - start:.1f} s")
            self._clock += time.perf_counter() - start
        return self._programs[shape]

    def _report(self, pending: _Pending) -> None:
        """Waits for a step, and reports it with what is due after it; ends the run if too many were not finite."""
        part = pending.part
        results = {
            key: value.item()
            for key, value in zip(pending.results, distributed.fetch(*pending.results.values()), strict=True)
        }
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        rate = results["positions"] / seconds
        devices = self.mesh.devices
        seq_len = part.batch["tokens"].shape[-1]
        self.last = results
        values = {
            "step": pending.step,
            **{key: value for key, value in results.items() if key not in ELSEWHERE},
            "tokens_per_second": rate,
            "mfu": metrics.mfu(self.config, seq_len, rate, devices.size, devices.flat[0].device_kind),
            "step_seconds": seconds,
            "data_wait_seconds": part.wait_seconds,
            "step_tokens": results["tokens"],
            "tokens": (part.first_row + part.rows) * self.recipe.batch.seq_len,
            "rows": part.first_row + part.rows,
            "epoch": self.plan.epoch(part.first_row),
            "finite": results["finite"],
            "skipped": results["skipped"],
        }
        if pending.step == self.step:
            try:
                values |= self._measure()
            except Exception:
                self.reporter.step(values)
                self._save()  # a failed validation or sample must not cost trained steps
                self.checkpoints.wait()
                raise
        self.reporter.step(values)
        if results["skipped_in_a_row"] >= self.recipe.non_finite_limit:
            rows = range(part.first_row, part.first_row + part.rows)
            first = "; ".join(sources(self.plan, rows[:8])[:8])
            raise ValueError(
                f"step {pending.step}: loss or gradient was not finite {results['skipped_in_a_row']} times in a"
                f" row. These steps changed nothing, and were not saved. The batch came from {first}, ...: look for"
                " damaged texts there, or remove the latest checkpoints and go on with a lower learning rate"
            )

    def _measure(self) -> dict[str, float]:
        """What is due after the latest step."""
        start, model, say = time.perf_counter(), self.state.model, self.reporter.say
        if found := self.measurements.validated(model, self.step, say):
            self.validated, self.validated_step = found, self.step
        if replies := self.measurements.shown(model, self.step, say):
            found = self.validated = found | replies
        self._clock += time.perf_counter() - start
        return found

    def _save(self) -> None:
        progress = {
            "step": self.step,
            "rows": self.rows,
            "tokens": self.rows * self.recipe.batch.seq_len,
            "reads": corpora.what_is_read(self.recipe, self.corpora),
            "last": {name: finite_or_none(self.last[name]) for name in ("loss", "skipped") if name in self.last},
            "validated": {name: finite_or_none(value) for name, value in self.validated.items()},
            "validated_step": self.validated_step,
            "save_owed": self._save_owed,
            "changes": self.changes,
            **({"base": self.base} if self.base else {}),
        }
        loss = self.validated["validation_loss"] if self.validated_step == self.step else None
        of = corpora.measured_on(self.recipe, self.corpora)
        files = {**self.files, **build.adapter_files(self.recipe, self.state.model)}
        self.checkpoints.save(self.step, named_arrays(self.state), progress, files, loss=loss, of=of)
        self.reporter.say(f"step {self.step}: saving {self.output / CHECKPOINTS / str(self.step)}")


def _kept(recipe: Recipe) -> dict[str, int]:
    kept = recipe.checkpoints
    return {"keep_last": kept.keep_last, "keep_every": kept.keep_every, "keep_best": kept.keep_best}
