"""Rows of conversations in the shapes that people have them in, as one shape: messages, tools, and what is learned.

    messages      {"messages": [{"role": ..., "content": ...}], "tools": [...]}: OpenAI, TRL, Hugging Face
    completion    {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    alpaca        {"instruction": ..., "input": ..., "output": ..., "system": ...}
    sharegpt      {"conversations": [{"from": "human", "value": ...}]}

Of two answers to one prompt, the better one and another (`pairs`):

    preference    {"prompt": ..., "chosen": ..., "rejected": ...}: texts, or lists of messages
    implicit      {"chosen": [...], "rejected": [...]}: conversations that begin alike; or texts with "Human:" turns
    openai        {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}

A message's `weight` (OpenAI: 0 or 1), `train` or `training` (axolotl) says whether its answer is learned.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.typing import Fields, JsonObject

# Of ShareGPT's, and of other neighbours': name -> the name that chat templates know.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "model": "assistant", "assistant": "assistant", "bot": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", "developer": "developer",
    "ipython": "ipython",
}  # fmt: skip
_LEARNED = ("weight", "train", "training")  # keys of a message; they are no part of the prompt


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
      messages: with role and content, and what a template may use besides.
      tools: schemas; None without.
      learned: of each message, whether its answer is learned; those of others than the assistant are not.
      other: of a pair, the messages with the answer that is not preferred; they begin as `messages`.
      other_learned: of each of these.
      asked: of a pair, how many messages are the prompt of both.
      shape: that the row had.
      plain: whether the texts are taken as they are, without a chat format: a prompt and its completion.
    """

    messages: Sequence[JsonObject]
    tools: Sequence[Any] | None
    learned: Sequence[bool]
    plain: bool = False
    other: Sequence[JsonObject] | None = None
    other_learned: Sequence[bool] = ()
    asked: int = 0
    shape: str = ""

    def to_json(self) -> str:
        """Returns the row as text, of which `from_json` makes the same."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))


def shape_of(record: Fields, *, pairs: bool = False) -> str:
    """Returns the name of a row's shape.

    Args:
      record: the row.
      pairs: whether it has two answers.

    Raises:
      ValueError: it has none, or two.
    """
    there = {name for name, value in record.items() if value is not None}
    wanted = PAIR_SHAPES if pairs else SHAPES
    found = [name for name, (needed, _) in wanted.items() if needed <= there]
    if pairs and "preference" in found:
        found.remove("implicit")  # it has a prompt besides
    if len(found) == 1:
        return found[0]
    has = ", ".join(map(repr, list(record)[:20])) or "nothing"
    if found:
        raise ValueError(f"is a row of two shapes, {' and '.join(found)}: leave the fields of one out; it has {has}")
    shapes = "; ".join(" and ".join(sorted(needed)) for needed, _ in wanted.values())
    others = [name for name, (needed, _) in (SHAPES if pairs else PAIR_SHAPES).items() if needed <= there]
    what = "a pair of answers" if pairs else "a conversation"
    hint = (
        f"; it is {'a conversation: leave --pairs out' if pairs else 'a pair of answers: give --pairs'}"
        if others
        else ""
    )
    raise ValueError(f"is not {what}, as it has none of these: {shapes}; it has {has}{hint}")


def conversation(record: Fields, *, pairs: bool = False) -> Conversation:
    """Returns the conversation of a row.

    Args:
      record: the row.
      pairs: whether it has two answers to one prompt.

    Raises:
      ValueError: it has no shape, or is wrong in it; the message says what, and not where.
    """
    shape = shape_of(record, pairs=pairs)
    _, read = (PAIR_SHAPES if pairs else SHAPES)[shape]
    found = read({name: value for name, value in record.items() if value is not None})
    if not any(found.learned):
        raise ValueError("has no answer to learn: no assistant message, or all have weight 0")
    return dataclasses.replace(found, shape=shape)


def _messages(record: Fields) -> Conversation:
    return _of_messages(_list(record, "messages"), record)


def _sharegpt(record: Fields) -> Conversation:
    turns = []
    for turn in _list(record, "conversations"):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise ValueError("a turn of its conversations lacks 'from' or 'value'")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turns.append({"role": turn["from"], "content": turn["value"], **rest})
    system = record.get("system")
    return _of_messages([{"role": "system", "content": system}, *turns] if system else turns, record)


def _completion(record: Fields) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError("its completion is empty")
        texts = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return Conversation(texts, None, [False, True], plain=True)
    before, after = _list(record, "prompt"), _list(record, "completion")
    found = _of_messages([*before, *after], record)
    return dataclasses.replace(found, learned=[one and i >= len(before) for i, one in enumerate(found.learned)])


def _alpaca(record: Fields) -> Conversation:
    texts = {name: record.get(name, "") for name in ("system", "instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"its {name} is a {type(text).__name__}, not a text")
    asked = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    system = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    return _of_messages([*system, *turns], record)


# Name -> the fields that a row of it has, and its reader.
SHAPES: dict[str, tuple[frozenset[str], Callable[[Fields], Conversation]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "completion": (frozenset({"prompt", "completion"}), _completion),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
}


def _preference(record: Fields) -> Conversation:
    prompt, chosen, rejected = (_messages_or_text(record[name]) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if not (chosen and rejected):
            raise ValueError("one of its two answers is empty")
        if chosen == rejected:
            raise ValueError("its chosen and rejected answers are the same")
        texts = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": x}] for x in (chosen, rejected)]
        learned = [False, True]
        return Conversation(texts[0], None, learned, plain=True, other=texts[1], other_learned=learned, asked=1)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _pair(_whole(asked, chosen), _whole(asked, rejected), record)


def _messages_or_text(value: Any) -> Any:
    """A list of messages, also one that is written as JSON; else the text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, list) and found and all(isinstance(x, dict) for x in found) else value
    if not isinstance(value, str | list | tuple) or (not isinstance(value, str) and not value):
        raise ValueError(f"its prompt or an answer is {value!r:.40}: give a text, or a list of messages")
    return value if isinstance(value, str) else list(value)


def _whole(asked: list[Any], answer: Any) -> list[Any]:
    """The prompt and an answer; some files repeat the prompt in front of the answer, and its system message."""
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in answer]
    if roles[0] in ("assistant", "gpt", "tool"):
        return [*asked, *answer]
    said = [_said(message) for message in answer]
    if any(said[i : i + len(asked)] == [_said(message) for message in asked] for i in range(len(answer))):
        return answer
    raise ValueError(
        f"an answer begins with a message of the {roles[0]}, and does not repeat its prompt: give the whole prompt in"
        " 'prompt', or leave it out"
    )


def _said(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    return message.get("role"), content.strip() if isinstance(content, str) else content


def _implicit(record: Fields) -> Conversation:
    chosen, rejected = (_messages_or_text(record[name]) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = map(_turns_of_text, (chosen, rejected))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("one of its answers is a text and the other a list of messages")
    return _pair(chosen, rejected, record)


def _turns_of_text(text: str) -> list[JsonObject]:
    """The messages of a dialogue in Anthropic's spelling: "\n\nHuman: ...\n\nAssistant: ..."."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):[ ]?", text)
    if len(parts) < 5 or parts[0].strip():
        raise ValueError(
            'is two texts without a prompt: give "prompt" too, lists of messages, or dialogues of Human: and Assistant:'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _openai(record: Fields) -> Conversation:
    given = record["input"]
    if not isinstance(given, Mapping):
        raise ValueError("its input is not an object with messages")
    prompt = _list(given, "messages")
    chosen, rejected = ([*prompt, *_list(record, name)] for name in ("preferred_output", "non_preferred_output"))
    return _pair(chosen, rejected, {**record, "tools": given.get("tools", record.get("tools"))})


def _pair(chosen: list[Any], rejected: list[Any], record: Fields) -> Conversation:
    """Of two conversations; what they have in common at the beginning is the prompt of both."""
    asked = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
    if asked < 0:
        raise ValueError("its chosen and rejected answers are the same, or one is the beginning of the other")
    if not asked:
        raise ValueError("its two answers have no prompt in common")
    found, other = (_of_messages(messages, record) for messages in (chosen, rejected))
    for which, one in (("chosen", found), ("rejected", other)):
        if one.messages[-1]["role"] != "assistant":
            raise ValueError(f"its {which} answer ends with a message of the {one.messages[-1]['role']}")
    learned, other_learned = ([one and i >= asked for i, one in enumerate(x.learned)] for x in (found, other))
    if not (any(learned) and any(other_learned)):
        raise ValueError("has an answer that is not learned: all of its messages have weight 0")
    return dataclasses.replace(found, learned=learned, other=other.messages, other_learned=other_learned, asked=asked)


PAIR_SHAPES: dict[str, tuple[frozenset[str], Callable[[Fields], Conversation]]] = {
    "preference": (frozenset({"prompt", "chosen", "rejected"}), _preference),
    "implicit": (frozenset({"chosen", "rejected"}), _implicit),
    "openai": (frozenset({"input", "preferred_output", "non_preferred_output"}), _openai),
}


def _of_messages(messages: Sequence[Any], record: Fields) -> Conversation:
    found = [_message(message, i) for i, message in enumerate(messages, 1)]
    learned = [
        message["role"] == "assistant" and _is_learned(original, i)
        for i, (message, original) in enumerate(zip(found, messages, strict=True), 1)
    ]
    return Conversation(found, _tools(record.get("tools")), learned)


def _message(message: Any, number: int) -> JsonObject:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted({*ROLES}))
        raise ValueError(f"message {number} has the role {role!r}: write one of {known}")
    found = {key: value for key, value in _without_nulls(message).items() if key not in _LEARNED}
    found["role"] = ROLES[role]
    calls = found.get("tool_calls")
    if "content" not in found:
        if not calls:
            raise ValueError(f"message {number}, of the {found['role']}, has no content")
        found["content"] = ""  # OpenAI writes null beside tool calls
    if isinstance(calls, list):
        found["tool_calls"] = [_call(call) for call in calls]
    return found


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, as templates take them; OpenAI writes them as JSON in a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _is_learned(message: Fields, number: int) -> bool:
    given = {name: message[name] for name in _LEARNED if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"message {number} has {name} {value!r}: give 0 or 1")
    return all(given.values())


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"its tools are not JSON ({error})") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"its tools are a {type(tools).__name__}, not a list of schemas")
    return _without_nulls(tools) or None


def _without_nulls(value: Any) -> Any:
    """The same without null fields: tables fill in the fields of other rows, and a template would show them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _list(record: Fields, name: str) -> list[Any]:
    value = record[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"its {name} are not JSON ({error})") from None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"its {name} are {'empty' if not value else 'a ' + type(value).__name__}, not a list")
    return list(value)
