"""What is learned from a corpus of conversations, for people to look at: counts, and rows with the answers marked."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from llama_jax.data.corpus import Corpus
from llama_jax.data.manifest import LOSS_MASK, PAIR, REJECTED
from llama_jax.data.prepare.shapes import PAIR_SHAPES, SHAPES
from llama_jax.text.base import Tokenizer

COUNTED = 1000  # rows, of which the learned tokens are counted


def report(corpus: Corpus, form: str | None = None) -> Iterator[str]:
    """Says what shapes its rows had, how many were cut, and how many tokens of a row are learned."""
    facts = corpus.manifest.facts
    known = (*SHAPES, *PAIR_SHAPES)
    shapes = ", ".join(f"{facts[shape]} of shape {shape}" for shape in known if facts.get(shape))
    yield f"rows: {shapes}"
    if form:
        yield f"the chat format is {form}: give --chat-format {form} to chat.py too, where it is not the model's own"
    if facts.get("cut"):
        yield f"{facts['cut']} rows were longer than --max-tokens, and lost whole turns from the front"
    rows = np.linspace(0, len(corpus) - 1, min(COUNTED, len(corpus))).astype(np.int64)
    learned = np.array([mask.sum() for mask in corpus.read(rows, LOSS_MASK)])
    of = f", of {len(rows)} rows" if len(rows) < len(corpus) else ""
    yield (
        f"learned tokens of a row: {learned.min()} to {learned.max()}, median {int(np.median(learned))}; longest row"
        f" {max(map(int, corpus.lengths[rows]))} tokens{of}"
    )


def show(corpus: Corpus, count: int, file: TextIO | None = None) -> None:
    """Prints the first rows, on stdout by default: answers in colour on a terminal, else between marks."""
    from rich.console import Console
    from rich.text import Text

    tokenizer = corpus.tokenizer()
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    console = Console(file=file or sys.stdout, soft_wrap=True, highlight=False)
    numbers = range(min(count, len(corpus)))
    for number, ids, mask in zip(numbers, corpus.read(numbers), corpus.read(numbers, LOSS_MASK), strict=True):
        line = Text()
        cuts = {0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)}
        second = 0  # where the other answer of a pair begins
        if PAIR in corpus.columns:
            (pair,) = corpus.read([number], PAIR)
            second = int(np.argmax((pair & REJECTED) > 0))
        edges = sorted(cuts | {second})
        for start, stop in itertools.pairwise(edges):
            text = _spelt(tokenizer, ids[start:stop].tolist(), names)
            learned = bool(mask[start])
            if second and start in (0, second):
                line.append("\nrejected: " if start else "chosen: ", style="bold")
            if learned and not console.is_terminal:
                text = f"\u27e6{text}\u27e7"
            line.append(text, style="bold green" if learned else "dim")
        about = f"--- row {number}, {corpus.source(number)}: {int(mask.sum())} of {len(ids)} tokens are learned"
        console.print(Text(about))
        console.print(line)


def _spelt(tokenizer: Tokenizer, ids: list[int], names: dict[int, str]) -> str:
    """Text with its control tokens spelt out."""
    parts: list[str] = []
    plain: list[int] = []
    for token in ids:
        if token in names:
            parts += [tokenizer.decode(plain), names[token]]
            plain = []
        else:
            plain.append(token)
    return "".join([*parts, tokenizer.decode(plain)])
