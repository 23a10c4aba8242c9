"""Whether a model knows the tokens that a chat format writes: a base model has untrained rows for them."""

from __future__ import annotations

import logging

import numpy as np

from llama_jax.data.corpus import Corpus
from llama_jax.data.manifest import LOSS_MASK
from llama_jax.train.recipe import Recipe
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.params import EMBED, HEAD, ParamSpec

log = logging.getLogger("llama_jax")

DOCUMENTS = 64  # of a corpus, whose control tokens are looked at
SAMPLED = 1000  # rows, whose norms they are compared with
LEAST = 0.25  # of the median norm: rows of Llama 3 8B's end of turn are zero


def check_markers(recipe: Recipe, checkpoint: Checkpoint, corpus: Corpus) -> None:
    """Looks at the rows of the control tokens that a corpus uses, in the embedding table and the head.

    Raises:
      ValueError: some were never trained, and an adapter of the layers alone trains, which cannot change them.
    """
    known = {i: name for name, i in corpus.tokenizer().control_tokens.items()}
    rows = range(min(DOCUMENTS, len(corpus)))
    ids = np.concatenate(corpus.read(rows))
    read, learned = ids, ids[np.concatenate(corpus.read(rows, LOSS_MASK)) > 0]
    asked = [(EMBED, read)] if checkpoint.config.tie_embeddings else [(EMBED, read), (HEAD, learned)]
    found = sorted({
        i for spec, used in asked for i in _untrained(checkpoint, spec, sorted(known.keys() & set(used.tolist())))
    })  # fmt: skip
    if not found:
        return
    names = ", ".join(known[i] for i in found)
    if recipe.adapter:
        raise ValueError(
            f"{recipe.init_from}: its rows of {names} are next to zero, as in a base model, and an adapter of the"
            " layers does not change them: it would learn the answers and not to stop. Begin with the Instruct model"
            " (--init-from), or train all parameters (--adapter.rank 0)"
        )
    log.warning(
        "%s: its rows of %s are next to zero, as in a base model: they are learned here", recipe.init_from, names
    )


def _untrained(checkpoint: Checkpoint, spec: ParamSpec, ids: list[int]) -> list[int]:
    tensor = checkpoint.tensor(spec, None)
    in_columns = checkpoint.format == "native" and spec is HEAD

    def norms(first: int, stop: int) -> np.ndarray:
        part = slice(first, stop)
        block = tensor.read((slice(None), part) if in_columns else (part,)).astype(np.float32)
        return np.linalg.norm(block, axis=0 if in_columns else 1)

    size = checkpoint.config.vocab_size
    middle = size // 2
    median = float(np.median(norms(middle, min(middle + SAMPLED, size))))
    return [i for i in ids if i < size and norms(i, i + 1)[0] < LEAST * median]
