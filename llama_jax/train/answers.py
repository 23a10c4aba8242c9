"""How many conversations that are held out a model answers as they are answered there, by its own replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.data.corpus import Corpus
from llama_jax.data.manifest import LOSS_MASK
from llama_jax.infer.generate import generate
from llama_jax.loaded import LoadedLlama
from llama_jax.model import Llama
from llama_jax.train.build import make_model
from llama_jax.train.recipe import Recipe

ROOM = 8  # tokens that a reply may be longer than the answer
SHOWN = 3
BATCH = 32  # replies at a time


class Answers:
    """Replies to the last question of conversations, greedily, and compares token by token.

    Args:
      recipe: how many are compared, `validation.answers`.
      config: of the model.
      corpora: conversations that are held out.
      mesh: of the run.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, corpora: Sequence[Corpus], mesh: jax.sharding.Mesh):
        self._prompts: list[list[int]] = []
        self._answers: list[list[int]] = []
        if not recipe.validation.answers:
            return
        tokenizer = corpora[0].tokenizer()
        with jax.set_mesh(mesh):
            self._writer = LoadedLlama(config, make_model(recipe, config), tokenizer, mesh)  # without weights
        for corpus in corpora:
            rows = np.arange(min(recipe.validation.answers, len(corpus)))
            for ids, mask in zip(corpus.read(rows), corpus.read(rows, LOSS_MASK), strict=True):
                learned = np.flatnonzero(mask)
                start = int(learned[np.flatnonzero(np.diff(learned, prepend=-2) > 1)[-1]])  # of the last answer
                stop = int(learned[-1]) + 1
                self._prompts.append(ids[:start].tolist())
                self._answers.append(ids[start:stop].tolist())

    def __len__(self) -> int:
        return len(self._prompts)

    def __call__(self, model: Llama, say: Callable[[str], None]) -> dict[str, float]:
        """Returns `exact_match`, the share of replies that are the answer and end where it does, and shows a few."""
        writer, right = dataclasses.replace(self._writer, model=model), 0
        for i in range(0, len(self), BATCH):
            prompts, answers = self._prompts[i : i + BATCH], self._answers[i : i + BATCH]
            replies = generate(writer, prompts, max_new_tokens=max(map(len, answers)) + ROOM)
            for n, (reply, answer) in enumerate(zip(replies, answers, strict=True)):
                same = reply.finish_reason == "stop" and list(reply.tokens) == answer[:-1]
                right += same
                if i + n < SHOWN:
                    wanted = self._writer.require_tokenizer().decode(answer[:-1])
                    say(f"a reply: {reply.text!r}: " + ("right" if same else f"the answer is {wanted!r}"))
        return {"exact_match": right / len(self)}
