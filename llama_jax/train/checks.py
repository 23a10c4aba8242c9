"""Whether the numbers of a recipe go together, before anything is opened or made."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.config.quantization import check_quantize
from llama_jax.data.corpus import check_tokenizer
from llama_jax.data.rows.loader import BatchSchedule, BatchStage
from llama_jax.train.corpora import Corpora
from llama_jax.train.preferences import COMPARED
from llama_jax.train.recipe import Batch, Recipe

log = logging.getLogger("llama_jax")


def check_numbers(recipe: Recipe) -> None:
    """Raises ValueError for a number that is too small, by its option's name."""
    batch, schedule = recipe.batch, recipe.optimizer.schedule
    least = {
        "steps": (recipe.steps, 0),
        "non_finite_limit": (recipe.non_finite_limit, 1),
        "batch.seq_len": (batch.seq_len, 1),
        "batch.sequences": (batch.sequences, 1),
        "batch.microbatches": (batch.microbatches, 0),
        **{f"batch.stages.{i}.sequences": (stage.sequences, 1) for i, stage in enumerate(batch.stages)},
        **{f"batch.stages.{i}.split": (stage.split, 1) for i, stage in enumerate(batch.stages)},
        "optimizer.schedule.decay_steps": (schedule.decay_steps, 0),
        "data.threads": (recipe.data.threads, 1),
        "data.prefetch": (recipe.data.prefetch, 1),
        "checkpoints.every": (recipe.checkpoints.every, 0),
        "checkpoints.keep_last": (recipe.checkpoints.keep_last, 1),
        "checkpoints.keep_every": (recipe.checkpoints.keep_every, 0),
        "checkpoints.keep_best": (recipe.checkpoints.keep_best, 0),
        "validation.every": (recipe.validation.every, 0),
        "validation.documents": (recipe.validation.documents, 0),
        "validation.answers": (recipe.validation.answers, 0),
        "samples.every": (recipe.samples.every, 0),
        "samples.new_tokens": (recipe.samples.new_tokens, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    if recipe.validation.answers and (recipe.objective != "sft" or not recipe.data.validation):
        raise ValueError(
            "validation.answers are of conversations that are held out: give data.validation, objective sft"
        )
    if recipe.objective != "pretrain" and any(stage.split > 1 for stage in batch.stages):
        raise ValueError(
            "batch.stages.split would cut answers from their questions: leave it at 1 with objective"
            f" {recipe.objective}"
        )
    if recipe.objective in COMPARED:
        _check_preference(recipe)
    if recipe.adapter and not recipe.init_from:
        raise ValueError("an adapter needs the weights that it adapts: give --init-from")
    check_quantize(recipe.quantize)
    if recipe.quantize and not recipe.adapter:
        raise ValueError("quantized weights do not train: give an adapter (--adapter.rank 16), or leave quantize out")
    if recipe.adapter and recipe.adapter.dropout:
        raise ValueError("adapter.dropout is not computed in training yet: leave it at 0")


def _check_preference(recipe: Recipe) -> None:
    options = recipe.preference
    if options.beta is not None and not options.beta > 0:
        raise ValueError(f"preference.beta must be more than 0, got {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"preference.label_smoothing must be from 0 to below 0.5, got {options.label_smoothing}")
    if options.nll_weight is not None and not options.nll_weight >= 0:
        raise ValueError(f"preference.nll_weight must be at least 0, got {options.nll_weight}")
    if recipe.optimizer.z_weight:
        raise ValueError(f"optimizer.z_weight is not of objective {recipe.objective}: leave it at 0")
    if not recipe.init_from:
        raise ValueError(f"objective {recipe.objective} compares answers of a model that gives some: give --init-from")


def check_sizes(recipe: Recipe, config: ModelConfig, corpora: Corpora) -> None:
    """Raises ValueError where model, corpora and batch do not fit each other."""
    check_tokenizer(corpora.train[0], vocab_size=config.vocab_size)
    if recipe.batch.seq_len > config.max_seq_len:
        raise ValueError(
            f"batch.seq_len ({recipe.batch.seq_len}) is more than the model's max_seq_len ({config.max_seq_len}): lower"
            " it, or raise --model.max-seq-len"
        )


def batch_schedule(batch: Batch) -> BatchSchedule:
    """How many rows each step takes.

    Raises:
      ValueError: sizes do not divide.
    """
    start, stages = 0, []
    for stage in batch.stages:  # as many of the plan's rows in a microbatch as later
        microbatches = max(1, batch.microbatches * stage.sequences // batch.sequences)
        stages.append(BatchStage(start, stage.sequences, stage.split, microbatches))
        start = stage.until_tokens
    stages.append(BatchStage(start, batch.sequences, 1, max(1, batch.microbatches)))
    return BatchSchedule(batch.seq_len, tuple(stages))


def check_divides(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where a stage of the run does not divide on a mesh of these sizes."""
    for stage in batch_schedule(recipe.batch).stages:
        rows, seq_len = stage.rows * stage.split, recipe.batch.seq_len // stage.split
        if why := sharding.undivided_batch(sizes, rows=rows, seq_len=seq_len, microbatches=stage.microbatches):
            raise ValueError(why)
