"""How fast a model runs here: decode and prefill, against the memory bandwidth, and against transformers.

Machines are noisy, so both sides are timed in turn within one run, and medians and their ratios are what counts.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax.infer.generate import generate
from llama_jax.ops.weights import name_of
from llama_jax.weights import params

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama

PROMPT = 16  # tokens before a decode measurement


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
      what: "decode" or "prefill".
      batch: rows.
      tokens_per_second: over all rows, median.
      weight_bytes_per_second: of decode: bytes of the weights that each step reads, times steps per second.
      against_tokens_per_second: of transformers on the same weights; None if not measured.
    """

    what: str
    batch: int
    tokens_per_second: float
    weight_bytes_per_second: float | None = None
    against_tokens_per_second: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        return self.tokens_per_second / self.against_tokens_per_second if self.against_tokens_per_second else None


def read_bandwidth(*, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second that all cores together read from memory, best of `repeats`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arrays = [np.ones(megabytes * 2**20 // 4, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        best = min(_seconds(lambda: list(pool.map(lambda x: float(np.dot(x, x)), arrays))) for _ in range(repeats))
    return sum(x.nbytes for x in arrays) / best


def measure(
    llama: LoadedLlama,
    *,
    batches: Sequence[int],
    new_tokens: int,
    prefill_tokens: int,
    repeats: int,
    against: str | None,
    progress: Callable[[str], None],
) -> list[Measurement]:
    """Times decode at each batch size and prefill at batch 1, greedy.

    Args:
      llama: the model.
      batches: rows of each decode measurement.
      new_tokens: tokens a row that a measurement decodes.
      prefill_tokens: length of the prefilled prompt.
      repeats: how often each is timed; the median counts.
      against: "transformers", or None.
      progress: called with a word about what is being timed.
    """
    if against not in (None, "transformers"):
        raise ValueError(f"against must be 'transformers' or left out, got {against!r}")
    llama = dataclasses.replace(llama, tokenizer=None)  # no stop ids: every row runs to its end
    theirs = transformers_generate(llama) if against else None
    vocab = llama.config.vocab_size
    weights = sum(x.nbytes for x in jax.tree.leaves(llama.model))
    if not llama.config.tie_embeddings:
        weights -= llama.model.embed.nbytes  # one row a token
    results = []
    for batch in batches:
        progress(f"decode, batch {batch}")
        prompts = np.random.default_rng(0).integers(0, vocab, (batch, PROMPT)).tolist()
        ours, other = _medians(
            repeats,
            lambda p=prompts: _decode_seconds(lambda n: generate(llama, p, max_new_tokens=n), new_tokens),
            theirs and (lambda p=prompts: _decode_seconds(lambda n: theirs(p, n), new_tokens)),
        )
        tokens = batch * new_tokens
        results.append(
            Measurement("decode", batch, tokens / ours, weights * new_tokens / ours, other and tokens / other)
        )
    progress(f"prefill of {prefill_tokens} tokens")
    prompts = np.random.default_rng(1).integers(0, vocab, (1, prefill_tokens)).tolist()
    ours, other = _medians(
        repeats,
        lambda: _seconds(lambda: generate(llama, prompts, max_new_tokens=1)),
        theirs and (lambda: _seconds(lambda: theirs(prompts, 1))),
    )
    results.append(Measurement("prefill", 1, prefill_tokens / ours, None, other and prefill_tokens / other))
    return results


def _decode_seconds(run: Callable[[int], Any], new_tokens: int) -> float:
    """Of `new_tokens` decode steps, the prefill taken off."""
    first = _seconds(lambda: run(1))
    return _seconds(lambda: run(new_tokens + 1)) - first


def _medians(repeats: int, ours: Callable[[], float], theirs: Callable[[], float] | None):
    both = [ours] + ([theirs] if theirs else [])
    for side in both:  # compile, warm up
        side()
    times = [[side() for side in both] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return medians[0], medians[1] if theirs else None


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def transformers_generate(llama: LoadedLlama) -> Callable[[list[list[int]], int], Any]:
    """Greedy generation by transformers (torch, CPU, float32, all cores) on the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from llama_jax.config.hf import to_hf_config

    logging.set_verbosity_error()
    config = LlamaConfig(**to_hf_config(llama.config, dtype="float32", transformers=5))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(llama.model)[0]:
        place = params.place_of(name_of(path), llama.config.layers)
        row, layer = place.spec, None if place.layers is None else place.layers[0]
        stored = params.to_stored(np.asarray(leaf, np.float32), row, llama.config, "hf")
        state[row.name("hf", layer)] = torch.from_numpy(np.array(stored))
    if llama.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run(prompts: list[list[int]], new_tokens: int):
        ids = torch.tensor(prompts)
        with torch.no_grad():
            return model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False,
            )  # fmt: skip

    return run


def startup(*, model: str, root: Path) -> dict[str, float]:
    """Seconds from the command to the first character of an answer, with the model cached: `first` compiles
    everything, `second` finds it in the compilation cache; and what imports cost.

    Args:
      model: as for `load`.
      root: the folder that holds `scripts/`.
    """
    question = [sys.executable, str(root / "scripts" / "chat.py"), "What is the capital of France?", "--model", model]
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        for name in ("first", "second"):
            start = time.perf_counter()
            with subprocess.Popen(question, stdout=subprocess.PIPE, env=environment) as process:
                assert process.stdout is not None
                process.stdout.read(1)
                results[name] = time.perf_counter() - start
                process.stdout.read()
            if process.returncode:
                raise RuntimeError(f"{' '.join(question)} ended with exit code {process.returncode}")
    for name, code in (("import_jax", "import jax"), ("import_load", "import llama_jax; llama_jax.load")):
        command = [
            sys.executable,
            "-c",
            f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)",
        ]
        times = [float(subprocess.run(command, capture_output=True, check=True, cwd=root).stdout) for _ in range(5)]
        results[name] = statistics.median(times)
    return results
