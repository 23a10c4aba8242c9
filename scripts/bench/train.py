"""How fast a training step is here, against transformers and torch's AdamW: SmolLM2-135M's shape, float32, one device.

Machines are noisy, so all are timed in turn within one run, each in a process of its own, and medians and their ratios
are what counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import jax
import numpy as np

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.libc import keep_freed_memory
from llama_jax.train import build
from llama_jax.train.optim import adamw
from llama_jax.train.recipe import Batch, Data, Optimizer, Recipe, Remat, Schedule

PRESET = "smollm2-135m"
ROWS, LENGTH = 4, 256
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
      what: of REMAT.
      tokens_per_second: median.
      temporary_bytes: what a step needs beside parameters, optimizer and batch, as the compiler says.
      against_tokens_per_second: of transformers; None if not measured.
    """

    what: str
    tokens_per_second: float
    temporary_bytes: int
    against_tokens_per_second: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        return self.tokens_per_second / self.against_tokens_per_second if self.against_tokens_per_second else None


def measure(
    remat: Sequence[str],
    *,
    repeats: int,
    against: str | None = "transformers",
    rank: int = 0,
    progress: Callable[[str], None],
) -> list[Measurement]:
    """Times a step of 4 rows of 256 tokens: loss, gradient, clipping by its norm, AdamW.

    Args:
      remat: policies, each a measurement.
      repeats: how often each is timed; the median counts.
      against: "transformers", or None.
      rank: of a LoRA adapter on all matrices of the layers, which alone trains (theirs with PEFT); 0 trains all.
      progress: called with a word about what is being timed.

    Raises:
      ValueError: `against` is something else.
      OSError: a process ended, for want of memory or of transformers.
    """
    if against not in (None, "transformers"):
        raise ValueError(f"against must be 'transformers' or left out, got {against!r}")
    results = []
    with contextlib.ExitStack() as stack:
        progress("a training step: compiling")
        theirs = stack.enter_context(_Apart(against, rank)) if against else None
        for policy in remat:
            with _Apart(policy, rank) as ours:  # one at a time: four of them need more than 20 GB
                times: list[list[float]] = [[], []]
                for i in range(repeats):
                    progress(f"training steps, remat {policy}, {i + 1} of {repeats}")
                    times[0].append(ours.seconds())
                    if theirs:
                        times[1].append(theirs.seconds())
            speeds = [ROWS * LENGTH / statistics.median(column) if column else None for column in times]
            results.append(Measurement(policy, speeds[0] or 0.0, ours.temporary_bytes, speeds[1]))
    return results


def memory(
    *, rows: int = 16, microbatches: Sequence[int] = (1, 2, 4), progress: Callable[[str], None]
) -> dict[str, dict[int, int]]:
    """Compiles, and does not run, a step of so many rows of 256 tokens: bytes of temporaries by remat policy and M."""
    found: dict[str, dict[int, int]] = {}
    with jax.set_mesh(sharding.make_mesh(PRESETS[PRESET])):
        for policy in ("none", "matmuls", "attention", "full"):
            for M in microbatches:
                progress(f"nothing: compiling remat {policy}, {M} microbatches")
                program, args = build.abstract_step(_recipe(policy, rows, M))
                found.setdefault(policy, {})[M] = _temporary_bytes(program.lower(*args).compile())
    return found


def _recipe(remat: Remat, rows: int, microbatches: int = 1, rank: int = 0) -> Recipe:
    optimizer = Optimizer(Schedule(LEARNING_RATE, 1000), weight_decay=WEIGHT_DECAY, clip_norm=CLIP)
    batch = Batch(LENGTH, rows, microbatches)
    adapter = Adapter(rank=rank, alpha=2 * rank)
    return Recipe(PRESETS[PRESET], Data(train=()), batch, optimizer, remat=remat, dtype="float32", adapter=adapter)


def _temporary_bytes(program: Any) -> int:
    sizes = program.memory_analysis()
    assert sizes is not None, "a CPU's compiler says it"
    return sizes.temp_size_in_bytes


class _Apart:
    """A step in a process of its own, so that allocators and threads of one do not disturb another; warmed up."""

    def __init__(self, what: str, rank: int):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, what, rank), daemon=True)
        self._process.start()
        theirs.close()
        self.temporary_bytes: int = self._answer()

    def seconds(self) -> float:
        """Takes one step."""
        self._connection.send(True)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise OSError(
                f"a process of the benchmark ended with code {self._process.exitcode}: see above, and whether there is"
                " memory for all of them, 4 GB each"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> _Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()


def _serve(connection: Connection, what: str, rank: int) -> None:
    """Steps of one kind, as they are asked for."""
    try:
        config = PRESETS[PRESET]
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1))
        if what == "transformers":
            run, nbytes = transformers_step(config, tokens, rank), 0
        else:
            keep_freed_memory()  # as the training loop does
            run, nbytes = our_step(_recipe(cast(Remat, what), ROWS, rank=rank), tokens)
        for _ in range(2):
            run()
        connection.send(nbytes)
        with contextlib.suppress(EOFError):
            while connection.recv():
                connection.send(_seconds(run))
    except (ValueError, OSError, ImportError) as error:
        connection.send(OSError(str(error)))


def our_step(recipe: Recipe, tokens: np.ndarray) -> tuple[Callable[[], None], int]:
    """What runs one step of `scripts/train.py` on one device, and the bytes of temporary memory that it needs.

    Args:
      recipe: of one microbatch, with the sizes of `tokens`.
      tokens: int [B, T + 1].
    """
    with jax.set_mesh(sharding.make_mesh(recipe.model)):
        program, (like, batch, stop) = build.abstract_step(recipe)
        program = program.lower(like, batch, stop).compile()
        optimizer = adamw(recipe.optimizer)
        state = jax.jit(lambda: build.state_of(recipe, build.make_model(recipe, recipe.model, seed=0), optimizer))()
        rows, length = tokens[:, 1:].shape
        values = {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((rows, length)),
            "positions": np.broadcast_to(np.arange(length), (rows, length)),
        }  # fmt: skip
        batch = {name: jax.device_put(x[None].astype(np.int32), batch[name].sharding) for name, x in values.items()}
        stop = jax.device_put(np.zeros(1, bool), stop.sharding)

    def run() -> None:
        nonlocal state
        state, results = program(state, batch, stop)
        results["loss"].block_until_ready()

    return run, _temporary_bytes(program)


def speed(recipe: Recipe, *, repeats: int) -> float:
    """Tokens a second of a recipe's step on one device, the median."""
    sizes = recipe.batch.sequences, recipe.batch.seq_len + 1
    run, _ = our_step(recipe, np.random.default_rng(0).integers(0, recipe.model.vocab_size, sizes))
    run()
    return recipe.batch.sequences * recipe.batch.seq_len / statistics.median(_seconds(run) for _ in range(repeats))


def transformers_step(config: ModelConfig, tokens: np.ndarray, rank: int = 0) -> Callable[[], None]:
    """The same by transformers (torch, CPU, float32, all cores), with PEFT's adapter, and torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_jax.config.hf import to_hf_config

    model = LlamaForCausalLM(LlamaConfig(**to_hf_config(config, dtype="float32", transformers=5))).train()
    if rank:
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

        options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**options))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    ids = torch.from_numpy(tokens)
    inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()

    def run() -> None:
        model(input_ids=inputs, labels=targets, shift_labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
