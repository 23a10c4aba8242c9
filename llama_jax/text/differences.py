"""What two tokenizers do differently."""

from __future__ import annotations

from llama_jax.text.base import Tokenizer
from llama_jax.text.samples import sample_texts

# Before and after an added token, which may take spaces, or want a word to end there.
_AROUND = (("a ", " b"), (" ", ""), ("a", "b"), ("", "  c"))


def differences(a: Tokenizer | None, b: Tokenizer | None, *, thorough: bool = False) -> list[str]:
    """Compares two tokenizers.

    Args:
      a: one; None is a checkpoint without a tokenizer.
      b: the other.
      thorough: also every id, and the text of every id encoded again: seconds for 128,000 ids.

    Returns:
      What differs, in words; empty where nothing does.
    """
    if a is None or b is None:
        return [] if a is b else [f"only {'the first' if a else 'the second'} has one"]
    problems, texts = _other_facts(a, b), _texts(a, b)
    if thorough:
        ids = range(min(a.vocab_size, b.vocab_size))
        other = [i for i in ids if a.token_bytes(i) != b.token_bytes(i)]
        if other:
            problems.append(f"{len(other)} ids mean another text, first {other[0]}")
        texts += [a.decode([i]) for i in ids]
    for control in (False, True):
        different = [t for t in texts if a.encode(t, control=control) != b.encode(t, control=control)]
        if different:
            text = different[0]
            one, two = (tokenizer.encode(text, control=control)[:8] for tokenizer in (a, b))
            problems.append(f"{len(different)} of {len(texts)} texts have other ids, first {text!r}: {one} and {two}")
            break
    return problems


def _texts(a: Tokenizer, b: Tokenizer) -> list[str]:
    """Texts to compare: samples, and the added tokens of both between others."""
    added = [*a.control_tokens, *(token.content for token in (*a.added_tokens, *b.added_tokens))]
    return [" ", *sample_texts(), *(x + text + y for text in [*dict.fromkeys(added)][:300] for x, y in _AROUND)]


def _other_facts(a: Tokenizer, b: Tokenizer) -> list[str]:
    """The facts that are not the same."""
    problems = []
    for name in ("vocab_size", "bos_id", "add_bos", "stop_ids", "control_tokens"):
        x, y = getattr(a, name), getattr(b, name)
        if name == "control_tokens":
            x, y = (sorted(tokens.items() - other.items())[:4] for tokens, other in ((x, y), (y, x)))
        if x != y:
            problems.append(f"{name}: {x} and {y}")
    return problems
