"""Which tokens of a conversation are answers: what a model learns from it, each answer with the token that ends it.

They come from the pieces that the chat format itself writes, not from patterns in the ids: stock templates mark
nothing, and the same text is other tokens in another place. Up to each answer the ids are those of the prompt that the
model gets at that point of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from llama_jax.text.base import Tokenizer
from llama_jax.text.chat import ChatError, ChatFormat, Message, Tools

Parts: TypeAlias = Sequence[str | int]  # of a text: ordinary text, and ids of control tokens
NO_ANSWER = -1


def answers(
    form: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools = None,
    learned: Sequence[bool] | None = None,
) -> tuple[list[int], list[int]]:
    """Returns the ids of a conversation, and for each the number of the message whose answer it is, or NO_ANSWER.

    An answer is the body of an assistant message and the token that ends it. What the prompt for it already has, such
    as the header, is none of it, nor what stands between it and the next message.

    Args:
      form: the chat format.
      tokenizer: of the same checkpoint.
      messages: the conversation.
      tools: as `ChatFormat.prompt` takes them.
      learned: of each message, whether its answer is asked for; None asks for all of the assistant's.

    Raises:
      ChatError: the format cannot hold the conversation; it writes an answer otherwise once another message follows; or
        it ends one with no token that ends generation.
    """
    ids: list[int] = []
    owners: list[int] = []
    done: Parts = ()
    for i, message in enumerate(messages):
        if message.get("role") != "assistant" or (learned is not None and not learned[i]):
            continue
        if not i:
            raise ChatError('the first message is an answer to nothing: leave it out, or give it "weight": 0')
        prompt = form.parts(messages[:i], tools=tools, add_generation_prompt=True)
        answered = form.parts(messages[: i + 1], tools=tools, add_generation_prompt=False)
        _add(tokenizer, ids, owners, _rest(prompt, done, i, form), NO_ANSWER)
        answer = _ended(_rest(answered, prompt, i, form), form, i)
        _add(tokenizer, ids, owners, answer, i)
        done = _joined(prompt, answer)
    whole = form.parts(messages, tools=tools, add_generation_prompt=False)
    _add(tokenizer, ids, owners, _rest(whole, done, len(messages), form), NO_ANSWER)
    return ids, owners


def _add(tokenizer: Tokenizer, ids: list[int], owners: list[int], parts: Parts, owner: int) -> None:
    if ids and ids[-1] in tokenizer.control_tokens.values():
        new = tokenizer.encode_parts([ids[-1], *parts])[1:]
    else:
        new = tokenizer.encode_parts(parts, continues=bool(ids))
    ids += new
    owners += [owner] * len(new)


def _rest(parts: Parts, before: Parts, i: int, form: ChatFormat) -> Parts:
    """What follows `before` in `parts`."""
    n = next((n for n, (a, b) in enumerate(zip(parts, before, strict=False)) if a != b), min(len(parts), len(before)))
    if n == len(before):
        return parts[n:]
    ours, last = (parts[n] if n < len(parts) else ""), before[n]
    if n == len(before) - 1 and isinstance(ours, str) and isinstance(last, str) and ours.startswith(last):
        return [*filter(None, [ours[len(last) :]]), *parts[n + 1 :]]
    raise ChatError(
        f"the {form.name} format writes the conversation before message {i + 1} otherwise than the prompt for that"
        " answer had it, so that no tokens of it can be learned in one row: make a row of each answer, or give the"
        ' answers before the last one "weight": 0; if it is so with one answer, the format has no form to learn from'
    )


def _ended(parts: Parts, form: ChatFormat, i: int) -> Parts:
    """An answer up to the first token that ends generation."""
    for end, part in enumerate(parts, 1):
        if part in form.stop_ids:
            return parts[:end]
    raise ChatError(
        f"the {form.name} format ends answer {i + 1} with no token that ends generation, so that a model would learn to"
        " go on for ever: correct the template or the list of eos_token_id"
    )


def _joined(a: Parts, b: Parts) -> Parts:
    """Both, one after the other, as one text is split."""
    if a and b and isinstance(a[-1], str) and isinstance(b[0], str):
        return [*a[:-1], a[-1] + b[0], *b[1:]]
    return [*a, *b]
