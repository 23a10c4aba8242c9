"""Conversations that need no download: a spoken coffee order, and its answer as JSON of a fixed schema.

Made from a seed. What is held out has other names and other orders: no customer of it is trained on, and no (item,
size, count, time) either. A model must copy names that it has not seen, make one of many, and read numbers and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.data.manifest import tokenizer_sha256
from llama_jax.data.prepare.chat import chat_id
from llama_jax.data.prepare.prepare import prepare
from llama_jax.data.prepare.request import make_request, read_tokenizer
from llama_jax.files import locked, write_whole
from llama_jax.typing import JsonObject

VERSION = 1  # of this file's choices: another number prepares anew
TRAIN, HELD_OUT = 1600, 200  # rows
SYSTEM = "Answer with JSON only: name, item, size, count, time."
ITEMS = (
    "latte", "espresso", "cappuccino", "mocha", "green tea", "black tea", "hot chocolate", "bagel", "muffin",
    "croissant", "sandwich", "cookie", "lemonade", "orange juice", "salad", "pretzel", "scone", "smoothie", "milkshake",
    "brownie",
)  # fmt: skip
SIZES = ("small", "medium", "large")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDINGS = (
    "Hi, this is {name}. I would like {what} at {time}.",
    "Please prepare {what} for {name}, ready at {time}.",
    "{name} wants {what} at {time}, please.",
    "Could you make {what} for {time}? The name is {name}.",
    "At {time} I will pick up {what}. {name} is my name.",
    "Order for {name}: {what}. Pick-up at {time}.",
)
_STARTS = ("Al", "Be", "Bru", "Ca", "Cor", "Da", "Do", "El", "Fa", "Fe", "Ga", "Gre", "Ha", "Ing", "Ja", "Ka", "Kri",
           "La", "Ma", "Mi", "Na", "Ni", "Or", "Pa", "Pe", "Ra", "Ro", "Sa", "Si", "Ta", "Ti", "Va", "Vi", "Wan", "Yo",
           "Za")  # fmt: skip
_MIDDLES = ("", "bi", "da", "le", "li", "ma", "mo", "na", "ri", "so", "ta", "ve")
_ENDS = ("na", "n", "ra", "s", "to", "nia", "lo", "ne", "rik", "sa", "ndo", "ly")
_FIELDS = ("name", "item", "size", "count", "time")


def orders_corpus(folder: str | Path, tokenizer: str) -> tuple[Path, Path]:
    """Prepares the orders as two corpora for a tokenizer, or finds them where they were prepared before.

    Args:
      folder: where their folder is made.
      tokenizer: a checkpoint, as `load` takes it, with a chat format.

    Returns:
      The folders of the training and the validation corpus.
    """
    files = read_tokenizer(Path(os.path.expanduser(tokenizer)))
    key = hashlib.sha256(f"{VERSION} {tokenizer_sha256(files)[1]} {chat_id(files, None)}".encode()).hexdigest()[:16]
    place = Path(folder) / f"orders-{key}"
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock"):  # of several processes of a run, one prepares
        for name, rows in zip(("train", "validation"), orders(TRAIN, HELD_OUT), strict=True):
            file = place / f"{name}.jsonl"
            if not file.exists():
                write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
            prepare(make_request([file], tokenizer=tokenizer, conversations=True), place / name, workers=0)
    return place / "train", place / "validation"


def orders(train: int, held_out: int, seed: int = 0) -> tuple[list[JsonObject], list[JsonObject]]:
    """Returns so many rows to train on, and to hold out, in the shape `messages`."""
    chosen = random.Random(seed)
    names = [a + b + c for a in _STARTS for b in _MIDDLES for c in _ENDS]
    chosen.shuffle(names)
    return (
        [*_rows(chosen, train, names[:500], lambda part: part != 0)],
        [*_rows(chosen, held_out, names[500:600], lambda part: part == 0)],
    )


def _rows(chosen: random.Random, count: int, names: list[str], keep: Callable[[int], bool]) -> Iterator[JsonObject]:
    while count:
        name, item, size, number = (
            chosen.choice(names),
            chosen.choice(ITEMS),
            chosen.choice(SIZES),
            chosen.randint(1, 9),
        )
        hour, minute = chosen.randint(1, 12), chosen.choice((0, 15, 30))
        if not keep(zlib.crc32(repr((item, size, number, hour, minute)).encode()) % 5):
            continue
        count -= 1
        word = NUMBERS[hour - 1]
        time = {0: f"{word} o'clock", 15: f"quarter past {word}", 30: f"half past {word}"}[minute]
        what = f"{NUMBERS[number - 1]} {size} {item if number == 1 else _plural(item)}"
        values = (name, item, size, number, f"{hour:02d}:{minute:02d}")
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": chosen.choice(WORDINGS).format(name=name, what=what, time=time)},
                {"role": "assistant", "content": json.dumps(dict(zip(_FIELDS, values, strict=True)))},
            ]
        }


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("sh", "ch", "s", "x")) else "s")
