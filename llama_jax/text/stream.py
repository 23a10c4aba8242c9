"""Text that arrives in pieces: no broken characters, and stop strings that may straddle pieces."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.text.base import Tokenizer


class StreamDecoder:
    """Turns ids into text as they come; the pieces join to exactly `tokenizer.decode(all ids)`.

    Ids become bytes and bytes become characters: a character split over several tokens is held back until it
    is whole, and the cost of a token does not depend on the length of the text before it.

    Args:
      tokenizer: of the ids.
      goes_on: whether other text comes before: then a space at the beginning is text, whatever the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, goes_on: bool = False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_space and not goes_on

    def push(self, ids: Iterable[int]) -> str:
        """Adds ids and returns the text that is now certain; it may be empty."""
        data = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Returns what was held back: U+FFFD if the last character never became whole."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text at the first stop string; text that might become one is held back.

    The string that is completed first stops the text, so the result does not depend on how the text was cut
    into pieces. `found` is the stop string met, or None.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(stops):
            raise ValueError(f"stop strings must be a list of non-empty strings, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Adds text and returns what is certainly before any stop string."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            self._held = ""
            return text[:start]
        longest = max(map(len, self._stops), default=1) - 1
        tails = range(max(0, len(text) - longest), len(text))
        keep = next((i for i in tails if any(stop.startswith(text[i:]) for stop in self._stops)), len(text))
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Returns the text still held back, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held
