"""Chat formats: a conversation becomes the ids of a prompt, and nothing typed in it becomes a control token.

One formatter for every generation of Llama, and one for the Jinja template a checkpoint ships. A message is a
mapping with `role` and `content`; a content is a string or a list of `{"type": "text", "text": ...}`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from llama_jax.text.base import Tokenizer, any_of, spellings
from llama_jax.text.template import ChatError as ChatError
from llama_jax.text.template import ChatTemplateError as ChatTemplateError
from llama_jax.text.template import render
from llama_jax.typing import Fields

Message = Fields
Tools = Sequence[Any] | None

# What separates turns in formats that spell it as ordinary text; typed in a message, it would forge a turn.
_MARKER = re.compile(r"\[/?INST\]|<</?SYS>>|<\|[\w ]+\|>")
_LLAMA2_MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer")


class ChatFormat(Protocol):
    """Turns a conversation into the ids of a prompt."""

    name: str
    stop_ids: tuple[int, ...]

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation; with `add_generation_prompt` it ends where the reply begins."""
        ...

    def parts(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> Sequence[str | int]:
        """The same as ordinary text and ids, of which `Tokenizer.encode_parts` makes the prompt; ids alone will do."""
        ...


def chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """Chooses the chat format of a checkpoint.

    Args:
      tokenizer: the checkpoint's tokenizer.
      name: "llama2", "llama3", "codellama70b" or "template" force a format, "template:NAME" one of several
        templates. None takes the checkpoint's own template. Where it has none, that is a guess, the format of the
        generation that the vocabulary belongs to, and a warning says so.

    Raises:
      ChatError: there is no such format, or the vocabulary lacks what it needs.
    """
    if name is not None:
        return format_named(name)(tokenizer)
    if tokenizer.chat_template is not None:
        return TemplateChat(tokenizer)
    template, named = tokenizer.tool_template, [name for name in tokenizer.chat_templates if name != "default"]
    guess = guessed_format(tokenizer)
    if named:
        problem = f"has chat templates named {', '.join(named)}, and none is the default"
        remedy = f"choose one with chat_format='template:{named[0]}' (--chat-format)"
    else:
        problem = "has no chat template"
        remedy = (
            "choose one with chat_format= (--chat-format), or use generate if it is a base model, which cannot chat"
        )
    if guess is None and template is None:
        raise ChatError(f"this model {problem}, and its vocabulary is not one of a known chat format: {remedy}")
    if guess is None:
        return TemplateChat(tokenizer, "tool_use")
    warnings.warn(
        f"this checkpoint {problem}: the {guess.name} format is a guess from its vocabulary; {remedy}", stacklevel=3
    )
    return guess if template is None else _GuessWithTools(guess, TemplateChat(tokenizer, "tool_use"))


def guessed_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Returns the chat format of the generation that a vocabulary belongs to; None for any other vocabulary."""
    control = tokenizer.control_tokens
    known = (
        (Llama3Chat, {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= control.keys()),
        (CodeLlama70BChat, "<step>" in control),
        (Llama2Chat, tokenizer.drops_space and {"<s>", "</s>"} <= control.keys()),
    )
    return next((form(tokenizer) for form, fits in known if fits), None)


def format_named(name: str) -> Callable[[Tokenizer], ChatFormat]:
    """Returns the chat format of that name; it takes the checkpoint's tokenizer."""
    formats = {form.name: form for form in (TemplateChat, Llama3Chat, CodeLlama70BChat, Llama2Chat)}
    kind, _, template = name.partition(":")
    if kind == TemplateChat.name and template:
        return lambda tokenizer: TemplateChat(tokenizer, template)
    if name not in formats:
        raise ChatError(
            f"unknown chat format {name!r}: choose one of {', '.join(sorted(formats))}, or template:NAME of several"
        )
    return formats[name]


class _Ids:
    """A format that encodes piece by piece: its parts are ids."""

    def parts(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> Sequence[str | int]:
        """The prompt."""
        return self.prompt(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """See `ChatFormat.prompt`."""
        raise NotImplementedError


class _GuessWithTools:
    """A guessed format, and the template for tools of a checkpoint that has one for nothing else."""

    def __init__(self, guess: ChatFormat, tools: ChatFormat):
        self._guess, self._tools = guess, tools
        self.name = guess.name
        self.stop_ids = tuple(sorted({*guess.stop_ids, *tools.stop_ids}))

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation, in the template where there are tools."""
        form = self._tools if tools else self._guess
        return form.prompt(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def parts(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> Sequence[str | int]:
        """Of the format that `prompt` takes."""
        form = self._tools if tools else self._guess
        return form.parts(messages, tools=tools, add_generation_prompt=add_generation_prompt)


class Llama2Chat(_Ids):
    """Llama 2 Chat and Code Llama Instruct 7B, 13B and 34B.

    `[INST]` and its kin are ordinary text to this tokenizer, so a message that contains them could forge a
    turn. Meta's code withholds the reply to such a message; this refuses it.
    """

    name = "llama2"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._eos = _control_ids(tokenizer, self.name, "</s>")
        self.stop_ids = tokenizer.stop_ids

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation: each turn on its own, with BOS and, once answered, EOS."""
        _no_tools(tools, self.name)
        turns = [(_role(m, ("system", "user", "assistant")), _content(m)) for m in _nonempty(messages)]
        for _, content in turns:
            _refuse_markers(content, _LLAMA2_MARKERS)
        if turns[0][0] == "system":
            (_, system), *turns = turns
            if not turns:
                raise ChatError("the conversation ends after the system message: add a user message")
            turns[0] = (turns[0][0], f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0][1]}")
        for i, (role, _) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise ChatError(f"roles must alternate user, assistant, user, ...: turn {i + 1} is {role!r}")
        if add_generation_prompt and len(turns) % 2 == 0:
            raise ChatError("the last message must be the user's")
        ids: list[int] = []
        for i in range(0, len(turns), 2):
            text = f"[INST] {turns[i][1].strip()} [/INST]"
            answer = [f" {content.strip()} " for _, content in turns[i + 1 : i + 2]]
            ids += self._tokenizer.encode(text + "".join(answer), bos=True) + (self._eos if answer else [])
        return ids


class Llama3Chat(_Ids):
    """Llama 3, 3.1, 3.2 (text) and 3.3.

    Contents are stripped, as in Meta's llama3 repository and in Hugging Face's templates (llama-models does
    not). No system prompt is added and no date; the tool role is written `ipython`.
    """

    name = "llama3"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        markers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        self._bos, self._start, self._end, self._eot = _control_ids(tokenizer, self.name, *markers)
        stops = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self.stop_ids = tuple(tokenizer.control_tokens[s] for s in stops if s in tokenizer.control_tokens)

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation: a header and a content for every message, each encoded on its own."""
        _no_tools(tools, self.name)
        ids = [self._bos]
        for message in _nonempty(messages):
            role = _role(message, ("system", "user", "assistant", "tool", "ipython"))
            content = self._tokenizer.encode(_content(message).strip())
            ids += [*self._header("ipython" if role == "tool" else role), *content, self._eot]
        return ids + (self._header("assistant") if add_generation_prompt else [])

    def _header(self, role: str) -> list[int]:
        encode = self._tokenizer.encode
        return [self._start, *encode(role), self._end, *encode("\n\n")]


class CodeLlama70BChat(_Ids):
    """Code Llama 70B Instruct: sources and destinations, turns separated by `<step>`."""

    name = "codellama70b"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._step = _control_ids(tokenizer, self.name, "<step>")
        self.stop_ids = tuple(sorted({*tokenizer.stop_ids, *self._step}))

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation; an empty system message comes first where there is none."""
        _no_tools(tools, self.name)
        encode = self._tokenizer.encode
        messages = _nonempty(messages)
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        ids = encode("", bos=True)
        for message in messages:
            ids += encode(f" Source: {_role(message, ('system', 'user', 'assistant'))}")
            if content := _content(message).strip():
                ids += encode(f"\n\n {content}")
            ids += self._step
        if add_generation_prompt:
            ids += encode(" Source: assistant\nDestination: user") + encode("\n\n ")
        return ids


class TemplateChat:
    """The Jinja template that a checkpoint ships, rendered as transformers does, in a sandbox.

    transformers encodes the rendered text, so a control string typed in a message becomes a control token.
    Here such strings are hidden behind private-use characters while the template runs. The text is then split
    at the control tokens it still has, which the template wrote, and the rest is encoded as ordinary text.
    """

    name = "template"

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        """Takes the checkpoint's template.

        Args:
          tokenizer: the checkpoint's tokenizer.
          template: the name of one of several templates. None takes the default one, and the one named `tool_use`
            where there are tools.

        Raises:
          ChatError: there is no such template.
        """
        named = tokenizer.chat_templates
        if template is not None:
            own = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template, **named}
            self._source = own.get(template)
            self._tool_source = None
            if self._source is None:
                known = ", ".join(key for key, value in own.items() if value is not None) or "none"
                raise ChatError(f"this checkpoint has no chat template named {template!r}: choose one of {known}")
        elif tokenizer.chat_template is None:
            remedy = f"choose one as template:{next(iter(named))}" if named else "choose llama2, llama3 or codellama70b"
            several = f"has chat templates named {', '.join(named)}, none of them the default" if named else ""
            raise ChatError(f"this checkpoint {several or 'has no chat template'}: {remedy}")
        else:
            self._source, self._tool_source = tokenizer.chat_template, tokenizer.tool_template
        self._tokenizer = tokenizer
        self._control = any_of(spellings(tokenizer.control_tokens))
        self.stop_ids = tokenizer.stop_ids

    def prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes the conversation, to the ids of transformers' `apply_chat_template` if it is harmless."""
        text, parts = self._rendered(messages, tools, add_generation_prompt)
        return self._tokenizer.encode_parts(parts) if text is None else self._tokenizer.encode(text, control=True)

    def parts(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> Sequence[str | int]:
        """The rendered text, split at the control tokens that the template wrote."""
        return self._rendered(messages, tools, add_generation_prompt)[1]

    def _rendered(
        self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool
    ) -> tuple[str | None, Sequence[str | int]]:
        """The text where nothing typed in the conversation is a control token, and its parts."""
        source = (self._tool_source if tools else None) or self._source or ""
        # transformers leaves out keys whose value is None.
        messages = [{k: v for k, v in message.items() if v is not None} for message in _nonempty(messages)]
        # A role is part of the format, not of the text: a known one, or one that the template itself names.
        quoted = re.findall(r"""['"]([\w-]+)['"]""", source)
        for message in messages:
            if message.get("role") not in quoted:
                _role(message, _ROLES)
        data = {"messages": messages, "tools": None if tools is None else list(tools)}
        strings = list(_strings(data))
        markers = set(_MARKER.findall(source)) - self._tokenizer.control_tokens.keys()
        for text in strings:
            _refuse_markers(text, markers)

        mask = _Mask(self._tokenizer.control_tokens, used="".join([source, *strings]))
        constants = {**self._tokenizer.special_tokens, "documents": None}

        def rendered(hide: Callable[[str, str], str]) -> str:
            hidden = _map_strings(hide, data)
            return render(source, **constants, **hidden, add_generation_prompt=add_generation_prompt)

        # Hide control strings only, so that a template that looks at the text sees almost all of it. If it
        # joins pieces of text to a control string all the same, hide all that control strings are made of.
        text = rendered(lambda text, _: self._control.sub(lambda match: mask.hide_edges(match[0]), text))
        if tools and not re.search(r"\btools\b", source):
            warnings.warn(
                "this checkpoint's chat template never mentions tools: they are not in the prompt; leave them out, or"
                " describe them in the system message",
                stacklevel=3,
            )
        parts, safe = (self._tokenizer.split_control(t) for t in (text, rendered(mask.hide)))
        if _ids(parts) != _ids(safe):
            parts = safe
        elif mask.show(text) == text:
            return text, parts
        return None, [mask.show(p) if isinstance(p, str) else p for p in parts]


class _Mask:
    """Swaps the characters of control strings for private-use ones that the conversation lacks, and back."""

    def __init__(self, control: Mapping[str, int], used: str):
        self._names = [name for text in control if (name := text.strip("▁ "))]
        chars = sorted(set("".join(self._names)))
        used = used.lower() + "".join(chars)
        free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in used and f"\\u{ord(c):x}" not in used)
        hidden = dict(zip(chars, free, strict=False))
        if len(hidden) < len(chars):
            raise ChatError("the conversation uses nearly all private-use characters, U+E000 to U+F8FF")
        self._all = str.maketrans(hidden)
        edges = {char for name in self._names for char in (name[0], name[-1])}
        self._edges = str.maketrans({char: hidden[char] for char in edges})
        # A template's tojson(ensure_ascii=true) writes the six characters \ue000 for one.
        self._shown = {code: char for char, code in hidden.items()}
        self._shown |= {f"\\u{ord(code):x}": json.dumps(char)[1:-1] for char, code in hidden.items()}
        self._codes = any_of(self._shown)

    def hide_edges(self, text: str) -> str:
        """Hides what could begin or end a control string."""
        return text.translate(self._edges)

    def hide(self, text: str, key: str) -> str:
        """Hides what could begin or end a control string, and a text that could be the middle of one."""
        # Roles and types are compared with the template's own words: hide no more of them than the edges.
        if key not in ("role", "type") and any(text.strip() in name for name in self._names):
            return text.translate(self._all)
        return self.hide_edges(text)

    def show(self, text: str) -> str:
        """Undoes both."""
        return self._codes.sub(lambda match: self._shown[match[0]], text)


def _map_strings(change: Callable[[str, str], str], value: Any, key: str = "") -> Any:
    """Rebuilds JSON-like data with every string, keys included, replaced by `change(string, its key)`."""
    if isinstance(value, str):
        return change(str(value), key)
    if isinstance(value, Mapping):
        return {change(str(k), "type"): _map_strings(change, item, k) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(change, item) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """Yields every string in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif value is not None and not isinstance(value, bool | int | float):
        raise ChatError(f"messages and tools must be made of JSON values, not of {type(value).__name__}")


def _ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _nonempty(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise ChatError("the conversation is empty: it needs at least one message")
    if not all(isinstance(message, Mapping) for message in messages):
        raise ChatError("every message must be a mapping with `role` and `content`")
    return messages


def _role(message: Message, allowed: Sequence[str]) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in allowed:
        raise ChatError(f"unknown role {role!r}: this chat format knows {', '.join(allowed)}")
    return role


def _content(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(part["text"] for part in content)
    raise ChatError(f"the {message.get('role')} message has no text: its content is {content!r}")


def _refuse_markers(text: str, markers: Iterable[str]) -> None:
    for marker in markers:
        if marker in text:
            raise ChatError(f"a message contains {marker!r}, which separates turns in this chat format: remove it")


def _no_tools(tools: Tools, name: str) -> None:
    if tools:
        raise ChatError(f"the {name} format has no tools: use a checkpoint whose chat template has them")


def _control_ids(tokenizer: Tokenizer, name: str, *tokens: str) -> list[int]:
    missing = [token for token in tokens if token not in tokenizer.control_tokens]
    if missing:
        raise ChatError(f"the vocabulary lacks {', '.join(missing)}, which the {name} chat format needs")
    return [tokenizer.control_tokens[token] for token in tokens]
