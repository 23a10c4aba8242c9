"""What a run reads: its corpora, the order of their rows, and what must be the same when it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from pathlib import Path

from llama_jax.data.corpus import Corpus, changed_facts, check_tokenizer, open_corpus
from llama_jax.data.manifest import PAIR
from llama_jax.data.rows.plan import WINDOW, RowPlan
from llama_jax.train.objective import objective_of
from llama_jax.train.preferences import REFERENCE
from llama_jax.train.recipe import Recipe
from llama_jax.train.reference import referenced
from llama_jax.typing import JsonObject

log = logging.getLogger("llama_jax")


STDLIB = "stdlib:"  # and the size of its vocabulary
ORDERS = "orders:"


@dataclasses.dataclass(frozen=True)
class Corpora:
    """What a run reads.

    Attributes:
      train: the corpora that it trains on.
      validation: those that are held out.
    """

    train: list[Corpus]
    validation: list[Corpus]

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, the same in all corpora."""
        from llama_jax.text.open import read_files

        return read_files(self.train[0].path)


def open_corpora(recipe: Recipe, output: Path) -> Corpora:
    """Opens the corpora of a recipe, and checks that they are of one tokenizer.

    Args:
      recipe: of the run.
      output: its folder, which keeps what the reference of DPO says of them.

    Raises:
      FileNotFoundError: one is not there.
      ValueError: one is damaged, or they do not go together.
    """
    if not recipe.data.train:
        raise ValueError("data.train is empty: give folders that scripts/prepare_data.py wrote")
    train = [open_corpus(_folder(name, 0, recipe.init_from)) for name in recipe.data.train]
    validation = [open_corpus(_folder(name, 1, recipe.init_from)) for name in recipe.data.validation]
    for corpus in (*train, *validation):
        check_tokenizer(corpus, sha256=train[0].manifest.tokenizer_sha256)
        if not corpus.manifest.documents:
            raise ValueError(f"{corpus.path}: holds no document: prepare it from files that are not empty")
        if PAIR in corpus.columns and PAIR not in objective_of(recipe).columns:
            raise ValueError(
                f"{corpus.path}: holds pairs of answers, of which objective {recipe.objective} would learn both: give"
                " --objective dpo, or prepare conversations with --chat"
            )
        for column in set(objective_of(recipe).columns) - {*corpus.columns, REFERENCE}:
            raise ValueError(
                f"{corpus.path}: has no column {column}, which the objective {recipe.objective} needs: prepare it from"
                f" {'pairs of answers, with --pairs' if column == PAIR else 'conversations, with --chat'}"
            )
    if REFERENCE in objective_of(recipe).columns:
        return Corpora(referenced(train, output, "train"), referenced(validation, output, "validation"))
    return Corpora(train, validation)


def _folder(name: str, which: int, model: str) -> Path:
    if name == ORDERS:
        from llama_jax.data.prepare.orders import orders_corpus
        from llama_jax.files import cache_folder

        if not model:
            raise ValueError(f"{name}: is made for the tokenizer of a checkpoint: give --init-from")
        return orders_corpus(cache_folder() / "data", model)[which]
    if not name.startswith(STDLIB):
        return Path(os.path.expanduser(name))
    from llama_jax.data.prepare.stdlib import stdlib_corpus
    from llama_jax.files import cache_folder

    size = name.removeprefix(STDLIB)
    if not size.isdecimal():
        raise ValueError(f"{name!r}: write stdlib: and the size of its vocabulary, such as stdlib:2048")
    return stdlib_corpus(cache_folder() / "data", int(size))[which]


def row_plan(recipe: Recipe, corpora: Corpora) -> RowPlan:
    """The order of all rows.

    Raises:
      ValueError: the weights do not fit.
    """
    weights = recipe.data.weights or [float(corpus.manifest.tokens) for corpus in corpora.train]
    if len(weights) != len(corpora.train):
        raise ValueError(
            f"data.weights has {len(weights)} numbers for {len(corpora.train)} corpora: give one each, or none"
        )
    whole = objective_of(recipe).whole
    return RowPlan(corpora.train, seq_len=recipe.batch.seq_len, seed=recipe.seed, weights=weights, whole=whole)


def what_is_read(recipe: Recipe, corpora: Corpora) -> JsonObject:
    """What the order of the rows depends on: a run that resumes must have the same."""
    return {
        "seed": recipe.seed,
        "seq_len": recipe.batch.seq_len,
        "window": WINDOW,
        "weights": [weight / sum(recipe.data.weights) for weight in recipe.data.weights],
        "corpora": facts_of(corpora.train),
    }


def facts_of(corpora: list[Corpus]) -> list[JsonObject]:
    """What identifies each corpus, wherever it is stored."""
    names = ("documents", "tokens", "tokenizer_sha256", "fingerprint", "content")
    return [{name: getattr(corpus.manifest, name) for name in names} for corpus in corpora]


def measured_on(recipe: Recipe, corpora: Corpora) -> str:
    """A name of what validation measures: losses of the same can be compared."""
    texts = [corpus.manifest.content or corpus.manifest.fingerprint for corpus in corpora.validation]
    tokenizers = [corpus.manifest.tokenizer_sha256 for corpus in corpora.validation]
    facts = [texts, tokenizers, recipe.validation.documents, recipe.batch.seq_len]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12] if corpora.validation else ""


def changed_reads(before: JsonObject, recipe: Recipe, corpora: Corpora) -> list[str]:
    """Says what the order of the rows depended on and now is something else, a phrase for each.

    Args:
      before: what `what_is_read` returned when the rows were counted.
      recipe: what is asked for now.
      corpora: of the recipe.
    """
    now = what_is_read(recipe, corpora)
    if _same_weights(before.get("weights") or [], now["weights"], len(corpora.train)):
        before = before | {"weights": now["weights"]}
    found = [f"{key} = {before.get(key)}, and now it is {now[key]}" for key in now if before.get(key) != now[key]]
    if before.get("corpora") == now["corpora"]:
        return found
    found = [phrase for phrase in found if not phrase.startswith("corpora = ")]
    then = before.get("corpora") or []
    if len(then) != len(corpora.train):
        return [*found, f"corpora: {len(then)}, and now {len(corpora.train)}"]
    changed = [
        (corpus.path, changed_facts(a, b)) for corpus, a, b in zip(corpora.train, then, now["corpora"], strict=True)
    ]
    return found + [f"corpora of other content: {path} has {why}" for path, why in changed if why]


def _same_weights(before: list[float], now: list[float], corpora: int) -> bool:
    """Whether weights of a mixture, each the sum's share, mix alike: those of one corpus always do."""
    alike = len(before) == len(now) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(before, now, strict=True))
    return alike or corpora == 1
