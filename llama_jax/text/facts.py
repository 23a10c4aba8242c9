"""What the files beside a vocabulary say about it, gathered into one `Facts`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.typing import Fields, JsonObject

TEMPLATE_FOLDER = "additional_chat_templates"  # NAME.jinja: transformers' place for every template but the default
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the first is transformers 5's name for the second


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before its vocabulary splits the rest.

    Attributes:
      content: its text.
      id: its id; None where the files name it without one, so that the vocabulary's or the next free id is meant.
      special: it steers the model: it is not shown in decoded text. Others are words.
      lstrip: spaces before it belong to it.
      rstrip: spaces after it belong to it.
      normalized: it is looked for in the text that the normalizer has been through.
      single_word: it is not found inside a word.
    """

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    single_word: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the files beside a vocabulary say about it; None and empty where they are silent."""

    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)  # the ids among `added_tokens`
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    added_tokens: tuple[AddedToken, ...] = ()  # merged from all files, each content once
    # added_tokens_decoder is there, and what it says of a token replaces what tokenizer.json says
    decoder_decides: bool = False
    rows: int | None = None  # of the model's embedding: a token beyond them is not one
    add_prefix_space: bool | None = None  # does SentencePiece's space come before the start of a text?
    legacy: bool = True  # SentencePiece puts its space before every piece of text between control tokens
    chat_template: str | None = None
    tool_template: str | None = None
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)  # every one, by name


def file_facts(files: Mapping[str, bytes], folder: Path = Path()) -> Facts:
    """Gathers what the files beside a vocabulary say about it.

    Args:
      files: file name to content.
      folder: where they are stored, for error messages.
    """
    config = _read_json(files, "tokenizer_config.json", folder)
    legacy_map = _read_json(files, "special_tokens_map.json", folder)
    decides = "added_tokens_decoder" in config
    # transformers reads special_tokens_map.json only where there is no added_tokens_decoder, and then prefers it.
    sources = (legacy_map, config) if decides else (config, legacy_map)
    named = _named(sources)
    special = {key: _content(value) for key, value in named.items()}
    added = _added_tokens(files, folder, config, named, [*_extras(sources)], decides=decides)
    bos_ids, eos_ids = (
        [i for name in ("generation_config.json", "config.json") for i in _token_ids(files, name, key, folder)]
        for key in ("bos_token_id", "eos_token_id")
    )
    rows = _read_json(files, "config.json", folder).get("vocab_size")
    prefix_space = config.get("add_prefix_space")
    if "tokenizer.json" in files and config.get("tokenizer_class") not in _LLAMA_CLASSES:
        prefix_space = None  # no other class of transformers looks at it
    templates = _templates(files, folder)
    return Facts(
        special_tokens=special,
        added={token.content: token.id for token in added if token.id is not None},
        bos_id=next(iter(bos_ids), None),
        eos_ids=tuple(set(eos_ids)),
        add_bos=config.get("add_bos_token"),
        added_tokens=added,
        decoder_decides=decides,
        rows=rows if type(rows) is int else None,
        add_prefix_space=prefix_space,
        legacy=config.get("legacy") is not False,
        chat_template=templates.get("default") or None,
        tool_template=templates.get("tool_use"),
        templates=templates,
    )


def _named(sources: tuple[JsonObject, ...]) -> JsonObject:
    """Returns the tokens that the files name by a role, as they spell them; the last file decides."""
    named: JsonObject = dict.fromkeys(_ROLES)  # transformers numbers new tokens in this order
    for source in sources:  # an empty name, as in the first conversions of LLaMA, names nothing
        named |= {k: v for k, v in source.items() if k.endswith("_token") and _content(v)}
        named |= {k: v for key in _EXTRA for k, v in _mapping(source.get(key)).items() if _content(v)}
    return {key: value for key, value in named.items() if value is not None}


def with_named_templates(files: dict[str, bytes], named: Mapping[str, bytes]) -> dict[str, bytes]:
    """Puts the templates of files of their own into `tokenizer_config.json`, where every format can carry them.

    Args:
      files: file name to content, of a tokenizer.
      named: name to content of the files of `additional_chat_templates`.
    """
    if not named:
        return files
    config = _read_json(files, "tokenizer_config.json", Path())
    templates = _templates(files, Path()) | {name: data.decode() for name, data in named.items()}
    config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    files = {name: data for name, data in files.items() if name != "chat_template.jinja"}
    return files | {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode()}


def _content(value: Any) -> str:
    """Returns the text of a token, which is one itself or has one; empty where it is none."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _mapping(value: Any) -> Fields:
    return value if isinstance(value, dict) and "content" not in value else {}


def _extras(sources: tuple[JsonObject, ...]) -> Iterator[Any]:
    for source in sources:
        for key in _EXTRA:
            value = source.get(key)
            yield from (token for token in value if _content(token)) if isinstance(value, list) else ()


def _added_tokens(
    files: Mapping[str, bytes],
    folder: Path,
    config: Fields,
    named: Fields,
    extras: list[Any],
    *,
    decides: bool,
) -> tuple[AddedToken, ...]:
    """Merges what the files say of every added token: those with an id first, in the order of ids."""
    tokens = _by_name(named, extras)
    for text, i in _read_json(files, "added_tokens.json", folder).items():
        known = tokens.get(text, AddedToken(text))
        tokens[text] = dataclasses.replace(known, id=_id(i, folder / "added_tokens.json"))
    for key, token in config.get("added_tokens_decoder", {}).items() if decides else ():
        text, i = token["content"], _id(key, folder / "tokenizer_config.json")
        special = bool(token.get("special")) or (text in tokens and tokens[text].special)
        flags = {k: bool(token[k]) for k in _FLAGS if k in token}
        tokens[text] = AddedToken(text, i, special, **{"normalized": not special} | flags)
    with_id = sorted((t for t in tokens.values() if t.id is not None and t.content), key=lambda t: t.id or 0)
    return (*with_id, *(t for t in tokens.values() if t.id is None))


def _by_name(named: Fields, extras: list[Any]) -> dict[str, AddedToken]:
    """Returns the tokens that are named by a role, or listed beside these, by their texts."""
    tokens: dict[str, AddedToken] = {}
    for value in (*named.values(), *extras):
        # transformers takes a token that it is given by name as a special one, found in the raw text.
        said = value if isinstance(value, dict) else {}
        flags = {"normalized": False} | {k: bool(said[k]) for k in _FLAGS if k in said}
        special = value not in extras or said.get("special", True) is not False
        if said or _content(value) not in tokens:
            tokens[_content(value)] = AddedToken(_content(value), special=special, **flags)
    return tokens


def _id(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,10}", str(value)):
        raise ValueError(f"{path}: {value!r:.80} is not the id of a token: correct it")
    return int(value)


def _token_ids(files: Mapping[str, bytes], name: str, key: str, folder: Path) -> list[int]:
    value = _read_json(files, name, folder).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{folder / name}: {key} must be a token's id or a list of ids, got {value!r:.80}: correct it")
    return ids


def _templates(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Returns the chat templates by name; `default` is the one for ordinary chat."""
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"].decode()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = _read_json(files, name, folder).get("chat_template")
        if value in (None, ""):
            continue
        if isinstance(value, dict):
            value = [{"name": key, "template": text} for key, text in value.items()]
        named = value if isinstance(value, list) else [{"name": "default", "template": value}]
        if not all(isinstance(e, dict) and type(e.get("name")) is type(e.get("template")) is str for e in named):
            raise ValueError(
                f"{folder / name}: chat_template must be a text, or a list of objects with the texts name and template,"
                f" got {value!r:.80}: correct it"
            )
        return {entry["name"]: entry["template"] for entry in named}
    return {}


def _read_json(files: Mapping[str, bytes], name: str, folder: Path) -> JsonObject:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{folder / name} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} holds a {type(value).__name__}, not a JSON object: download it again")
    return value
