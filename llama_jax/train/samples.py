"""Text that the model writes during a run, kept in OUTPUT/samples.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax import distributed
from llama_jax.config import ModelConfig
from llama_jax.data.prepare.system import naming
from llama_jax.infer.generate import Sampling, encode_prompt, generate
from llama_jax.loaded import LoadedLlama
from llama_jax.model import Llama
from llama_jax.text.base import Tokenizer
from llama_jax.train.build import make_model
from llama_jax.train.recipe import Recipe
from llama_jax.train.report import SAMPLES


class Samples:
    """Continues the prompts of a recipe from the weights of a run.

    Args:
      recipe: its prompts, and how they are continued.
      config: of the model.
      tokenizer: of the corpora.
      mesh: of the run.
      output: the run's folder.

    Raises:
      ValueError: a prompt and its new tokens are longer than the model's context.
    """

    def __init__(
        self, recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, output: Path
    ):
        self._options, self._seed, self._path = recipe.samples, recipe.seed, output / SAMPLES
        if not self._options.prompts:
            return
        with jax.set_mesh(mesh):
            self._writer = LoadedLlama(config, make_model(recipe, config), tokenizer, mesh)  # without weights
        Sampling(temperature=self._options.temperature)
        for prompt in self._options.prompts:
            ids = encode_prompt(self._writer, prompt, where=f"samples.prompts {prompt!r}")
            length = len(ids) + self._options.new_tokens
            if length > config.max_seq_len:
                raise ValueError(
                    f"samples: {prompt!r:.60} and {self._options.new_tokens} new tokens are {length}, more than the"
                    f" model's max_seq_len ({config.max_seq_len}): lower --samples.new-tokens"
                )

    def __call__(self, model: Llama, step: int, say: Callable[[str], None]) -> None:
        """Writes the samples of a step, and says them."""
        prompts = [prompt.rstrip(" ") or prompt for prompt in self._options.prompts]  # spaces belong to the word after
        completions = generate(
            dataclasses.replace(self._writer, model=model), prompts, max_new_tokens=self._options.new_tokens,
            temperature=self._options.temperature, seed=self._seed,
        )  # fmt: skip
        texts = [completion.text for completion in completions]
        for prompt, text in zip(prompts, texts, strict=True):
            shown = prompt + text.rstrip() if text.strip() else repr(prompt + text)
            say(f"step {step}, a sample:\n{shown}")
        if distributed.is_main():
            with naming(self._path, "write"), self._path.open("a", encoding="utf-8") as file:
                for prompt, text in zip(prompts, texts, strict=True):
                    file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
