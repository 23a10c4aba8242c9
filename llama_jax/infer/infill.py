"""`infill`: the text between a prefix and a suffix, with models that were trained to write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.infer.generate import Completion, ContinuedText, generate

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama


def infill(
    llama: LoadedLlama, gaps: Sequence[tuple[str, str]], *, suffix_first: bool = False, **options: Any
) -> list[Completion]:
    """Writes the text between each prefix and its suffix. Code Llama 7B and 13B were trained to.

    Args:
      llama: of `load`.
      gaps: pairs (prefix, suffix); either may be empty. They run as one batch.
      suffix_first: the order suffix, prefix, middle (the paper's SPM), which suits prefixes that end within a word. The
        default is prefix, suffix, middle (PSM), as in Meta's code.
      **options: of `generate`.

    Returns:
      One Completion for each gap, in order: `prefix + completion.text + suffix` is the whole text. Where its
      `finish_reason` is not "stop" the middle is cut short and does not lead to the suffix.

    Raises:
      ValueError: the vocabulary has no infill tokens, a gap is no pair of texts, or as for `generate`.
    """
    tokenizer = llama.require_tokenizer()
    for gap in gaps:
        if isinstance(gap, str) or len(gap) != 2 or not all(isinstance(text, str) for text in gap):
            raise ValueError(f"a gap must be a pair of texts (prefix, suffix), got {gap!r:.60}")
    prompts = [ContinuedText(tokenizer.infill_prompt(*gap, suffix_first=suffix_first)) for gap in gaps]
    return generate(llama, prompts, **options)
