"""A byte-level vocabulary in which every split of a text shows, as GGUF metadata."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_jax.text.samples import sample_texts

EXTRA = (
    "DON'T We'Ve i'LL x'S 'Re",
    "AbCdEf ABCdef abcDEF camelCase HTTPServer ÀéÉa",
    "123456789 1234567 12 1.234,567 ١٢٣٤٥ 3 33 333 3333",
    "  \n\n  x\n \n\ty  ",
    "a\n\nb\r\n\r\nc  \n",
    "###!!!///\n\n// _abc __def -x- $5 +1 <=> ^~|`",
    "漢字カナ ひらがな한국어 abc你好",
    "<sentinel:12>IMGIMGABAZ    x  y",
    "x     ",
)
# llama.cpp has no upper and lower case but ASCII's for these, and no digits but ASCII's for the last.
ASCII = ("tekken", "llama4", "gpt-4o", "kanana2", "talkie", "minimax-m2", "superbpe")
WORDS = ("Ġcapital", "Ġ123", "don", "!!")  # merges do not make them: only who takes whole words sees them


def texts() -> list[str]:  # of `ASCII`'s, only those in ASCII
    """Texts in which llama.cpp's spelling of a regex and the model's own mean the same: no letters with marks."""
    return [*(text for text in sample_texts() if text and "\x00" not in text and not _marks(text)), *EXTRA]


def _marks(text: str) -> bool:
    return any(unicodedata.category(char)[0] == "M" or char in "\u2003\u3000\u0085" for char in text)


def metadata(pre: str) -> dict[str, Any]:
    """The vocabulary: all bytes, every pair of bytes in `texts`, and `WORDS`."""
    alphabet = bytes_to_unicode()
    spelt = ["".join(alphabet[byte] for byte in text.encode()) for text in texts()]
    pairs = sorted({text[i : i + 2] for text in spelt for i in range(len(text) - 1)})
    tokens = [*sorted(alphabet.values()), *pairs, *WORDS, "<|end|>"]
    tokens = list(dict.fromkeys(tokens))
    return vocabulary(tokens, [*[1] * (len(tokens) - 1), 3]) | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [f"{pair[0]} {pair[1]}" for pair in pairs],
    }


def vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """The keys of kind `gpt2` that every file has; the last token ends a text."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
