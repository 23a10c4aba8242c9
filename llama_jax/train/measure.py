"""What a run is measured on beside its own steps: validation, replies to conversations, samples of its text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax.config import ModelConfig
from llama_jax.model import Llama
from llama_jax.train.answers import Answers
from llama_jax.train.corpora import Corpora
from llama_jax.train.objective import Objective
from llama_jax.train.recipe import Recipe
from llama_jax.train.samples import Samples
from llama_jax.train.validation import Validator


class Measurements:
    """All that a recipe asks for.

    Args:
      recipe: what is measured, and when.
      config: of the model.
      corpora: of the run.
      objective: whose loss validation takes.
      mesh: of the run.
      output: its folder.

    Raises:
      ValueError: something cannot be measured.
    """

    def __init__(
        self, recipe: Recipe, config: ModelConfig, corpora: Corpora, objective: Objective, mesh: jax.sharding.Mesh,
        output: Path,
    ):  # fmt: skip
        self._recipe, self._validation, self._answers = recipe, None, None
        if corpora.validation:
            self._validation = Validator(
                corpora.validation, objective=objective, seq_len=recipe.batch.seq_len,
                documents=recipe.validation.documents, mesh=mesh,
            )  # fmt: skip
        if recipe.validation.answers:
            self._answers = Answers(recipe, config, corpora.validation, mesh)
        self._samples = Samples(recipe, config, corpora.train[0].tokenizer(), mesh, output)

    def is_due(self, step: int) -> bool:
        """Whether something is measured after a step."""
        return any(self._due(step, every) for every in (self._recipe.validation.every, self._recipe.samples.every))

    def before(self, model: Llama, say: Callable[[str], None]) -> dict[str, float]:
        """Returns what is measured before the first step."""
        if self._answers is None:
            return {}
        say(f"before the first step: {len(self._answers)} replies")
        return self._answers(model, say)

    def validated(self, model: Llama, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """Returns what validation finds after a step; empty where it is not due."""
        if self._validation is None or not self._due(step, self._recipe.validation.every):
            return {}
        say(f"step {step}: validating")
        return self._validation(model)

    def shown(self, model: Llama, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """Writes samples, and after the last step replies, whose share of right ones is returned."""
        if self._recipe.samples.prompts and self._due(step, self._recipe.samples.every):
            self._samples(model, step, say)
        if self._answers is None or step != self._recipe.total_steps:
            return {}
        found = self._answers(model, say)
        say(f"exact match: {found['exact_match']:.1%} of {len(self._answers)} replies")
        return found

    def _due(self, step: int, every: int) -> bool:
        return step == self._recipe.total_steps or (bool(every) and step % every == 0)
