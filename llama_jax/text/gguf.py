"""The tokenizer in a GGUF file's metadata: its vocabulary, its special ids, its chat templates."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llama_jax.text.added import STOP_TOKENS
from llama_jax.text.base import BaseTokenizer
from llama_jax.text.bpe import CHAR_TO_BYTE, BPETokenizer, byte_level_backend
from llama_jax.text.facts import AddedToken, Facts
from llama_jax.text.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.text.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelType,
    Piece,
    SentencePieceTokenizer,
    Spec,
    write_model,
)
from llama_jax.typing import Fields, Foreign

# tokenizer.ggml.model -> the kind of SentencePiece model; "gpt2" is byte-level BPE, and of others there is no Llama.
_SENTENCEPIECE = {"llama": ModelType.BPE, "t5": ModelType.UNIGRAM}
_NONE = (None, "none", "no_vocab")
# tokenizer.ggml.<role>_token_id -> what a chat template calls it.
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id", "eos_token_ids")  # the last is ollama's: a list
_KEYS = "tokenizer.ggml."
COMPUTED = frozenset(
    [f"{_KEYS}{role}_token_id" for role in _NAMED]
    + [f"{_KEYS}{key}" for key in _ENDS]
    + [f"{_KEYS}{key}" for key in ("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token")]
    + [f"{_KEYS}{key}" for key in ("add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")]
    + ["tokenizer.chat_template"]
)
# Keys that change neither ids nor text here, with the reason.
NEUTRAL = {
    f"{_KEYS}add_eos_token": "a prompt is to be continued: EOS never follows it",
    f"{_KEYS}token_type_count": "token types of BERT's input",
    f"{_KEYS}seperator_token_id": "nothing here separates two texts",
    f"{_KEYS}mask_token_id": "nothing here is masked",
    **{
        f"{_KEYS}{name}_token_id": "infill tokens are found by their names"
        for name in ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle")
    },
    "tokenizer.chat_templates": "the names of the templates, which have keys of their own",
    "tokenizer.huggingface.json": "says again what the other keys say",
}
_PLACEHOLDER = re.compile(r"\[PAD(\d+)\]|<dummy(\d+)>")
_BRACKETED = re.compile(r"[<\[{].+[>\]}]", re.DOTALL)


class Vocabulary(NamedTuple):
    """The tokens of a GGUF file, each with a spelling of its own, without what only fills up the embedding's rows.

    Attributes:
      tokens: spellings.
      types: SentencePiece's numbers.
      texts: id to the bytes that it adds to the text, where its spelling does not tell.
    """

    tokens: list[str]
    types: list[int]
    texts: dict[int, bytes]


def tokenizer_from_gguf(metadata: Fields) -> BaseTokenizer | None:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Args:
      metadata: key to value; arrays may be lists or numpy arrays.

    Returns:
      The tokenizer, or None where the file has none.

    Raises:
      ValueError: it is of a kind that no Llama has, or damaged; names the key.
    """
    kind = metadata.get(f"{_KEYS}model")
    if kind in _NONE:
        return None
    if kind != "gpt2" and kind not in _SENTENCEPIECE:
        raise ValueError(
            f"tokenizer.ggml.model {kind!r} is not supported: a Llama has {', '.join(_SENTENCEPIECE)} or gpt2"
        )
    _warn_of_unread(metadata)
    vocabulary = read_vocabulary(metadata)
    facts = _facts(metadata, vocabulary)
    if kind in _SENTENCEPIECE:
        # Words are found in the raw text, before SentencePiece sees the rest of it.
        hidden = [UNUSED if kind == USER_DEFINED else kind for kind in vocabulary.types]
        return _SentencePiece(_model(metadata, vocabulary._replace(types=hidden)), facts, vocabulary)
    return _ByteLevel(_backend(metadata, vocabulary), facts, vocabulary, add_bos=_pre_tokenizer(metadata).add_bos)


def model_from_gguf(metadata: Fields) -> bytes:
    """Writes GGUF metadata of kind `llama` or `t5` as a serialized SentencePiece model, a `tokenizer.model`."""
    return _model(metadata, read_vocabulary(metadata))


def backend_from_gguf(metadata: Fields) -> Foreign:
    """Builds the `tokenizers.Tokenizer` that GGUF metadata of kind `gpt2` describes."""
    return _backend(metadata, read_vocabulary(metadata))


def is_sentencepiece(metadata: Fields) -> bool:
    """Tells whether a GGUF file's vocabulary is SentencePiece's."""
    return metadata.get(f"{_KEYS}model") in _SENTENCEPIECE


def read_vocabulary(metadata: Fields) -> Vocabulary:
    """Reads the tokens of a GGUF file and their types."""
    tokens = _strings(metadata, "tokens")
    types = [int(kind) for kind in _array(metadata, "token_type", len(tokens))]
    while tokens and _is_placeholder(len(tokens) - 1, tokens[-1], types[-1]):
        tokens.pop()
    types = types[: len(tokens)]
    sentencepiece = is_sentencepiece(metadata)
    unknown = _unknown(metadata, types) if sentencepiece else None
    roles = {i for key in (*_ENDS, *(f"{role}_token_id" for role in _NAMED)) for i in _ids(metadata, key, len(tokens))}
    texts: dict[int, bytes] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if i == unknown:
            types[i] = UNKNOWN
        elif kind == UNKNOWN or _is_placeholder(i, token, kind):
            types[i] = CONTROL  # it has a place in the vocabulary and no text
        elif kind == NORMAL and (token in STOP_TOKENS or (i in roles and _BRACKETED.fullmatch(token))):
            types[i] = CONTROL
        elif kind == UNUSED:
            texts[i] = b""
        elif kind == BYTE and not sentencepiece:
            texts[i] = _byte(token)
        tokens[i] = tokens[i] or f"[EMPTY{i}]"
    _rename_doubles(tokens, types, texts, sentencepiece=sentencepiece)
    return Vocabulary(tokens, types, texts)


def _is_placeholder(i: int, token: str, kind: int) -> bool:
    """Tells whether a token only fills a row: `[PAD331]` and its kin, whatever their type, and empty ones."""
    number = _PLACEHOLDER.fullmatch(token)
    return not token or (number is not None and (kind == UNUSED or i == int(number[1] or number[2])))


def _byte(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.encode()


def _unknown(metadata: Fields, types: list[int]) -> int:
    """Returns the id of the unknown token: the one that is named, else the first of that type, else 0."""
    return next(iter(_ids(metadata, "unknown_token_id", len(types))), types.index(UNKNOWN) if UNKNOWN in types else 0)


def _rename_doubles(tokens: list[str], types: list[int], texts: dict[int, bytes], *, sentencepiece: bool) -> None:
    """Gives each of several tokens of one spelling its own; text becomes the last of them, an added one first."""
    if len(set(tokens)) == len(tokens):
        return
    owner: dict[str, int] = {}
    for i, token in enumerate(tokens):
        first = owner.setdefault(token, i)
        if first == i:
            continue
        owner[token], loser = (first, i) if _rank(types[first]) > _rank(types[i]) else (i, first)
        warnings.warn(
            f"the GGUF file has the token {token!r} twice, with ids {first} and {i}: text becomes {owner[token]}",
            stacklevel=2,
        )
        if types[loser] in (NORMAL, USER_DEFINED):
            texts[loser] = token.replace("▁", " ").encode() if sentencepiece else _spelt(token)
        tokens[loser], types[loser] = f"[DOUBLE{loser}]", CONTROL


def _rank(kind: int) -> int:
    return (UNUSED, NORMAL, BYTE, USER_DEFINED, CONTROL, UNKNOWN).index(kind) if NORMAL <= kind <= BYTE else 0


def _spelt(token: str) -> bytes:
    try:
        return token.translate(CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:  # not in GPT-2's alphabet, so it stands for itself
        return token.encode()


def _facts(metadata: Fields, vocabulary: Vocabulary) -> Facts:
    tokens, types, _ = vocabulary
    size = len(_array(metadata, "tokens"))
    ids = {role: next(iter(_ids(metadata, f"{role}_token_id", size, warn=True)), None) for role in _NAMED}
    special = {
        name: tokens[i]
        for role, name in _NAMED.items()
        if (i := ids[role]) is not None and i < len(tokens) and types[i] not in (NORMAL, UNUSED)
    }
    templates = dict(_templates(metadata))
    add_bos = metadata.get(f"{_KEYS}add_bos_token", False if metadata[f"{_KEYS}model"] == "t5" else None)
    named = [AddedToken(text, tokens.index(text), special=True, normalized=False) for text in special.values()]
    words: list[AddedToken] = []
    if is_sentencepiece(metadata):  # the other kind's vocabulary has its own
        spelt = zip(_array(metadata, "tokens"), types, strict=False)
        words = [AddedToken(text, i, normalized=False) for i, (text, kind) in enumerate(spelt) if kind == USER_DEFINED]
    return Facts(
        special_tokens=special,
        added_tokens=tuple({token.content: token for token in (*words, *named)}.values()),
        bos_id=ids["bos"],
        eos_ids=tuple(i for key in _ENDS for i in _ids(metadata, key, size, warn=key != "eos_token_id")),
        add_bos=None if add_bos is None else bool(add_bos),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        templates=templates,
    )


def _ids(metadata: Fields, key: str, size: int, *, warn: bool = False) -> list[int]:
    """Returns the ids under `tokenizer.ggml.<key>`, those that are tokens."""
    value: Any = metadata.get(f"{_KEYS}{key}")
    values: Any = value.tolist() if hasattr(value, "tolist") else value
    values = values if isinstance(values, list | tuple) else [] if values is None else [values]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise ValueError(f"tokenizer.ggml.{key} must be the id of a token, got {values!r:.80}: convert the model again")
    outside = [i for i in values if not 0 <= i < size]
    if outside and warn:
        warnings.warn(f"tokenizer.ggml.{key} {outside[0]} is outside the {size} tokens, left out", stacklevel=2)
    return [i for i in values if 0 <= i < size]


def _templates(metadata: Fields) -> Iterator[tuple[str, str]]:
    """Yields names and texts of the chat templates; `default` is the one without a name."""
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.chat_template")
        if name == key or name == "s" or not (name == "" or name.startswith(".")):
            continue
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, got {value!r:.80}: convert the model again")
        if value:
            yield name.removeprefix(".") or "default", value


def _warn_of_unread(metadata: Fields) -> None:
    """Names the keys of the tokenizer that nothing here reads, unless their value is a neutral one."""
    known = COMPUTED | NEUTRAL.keys()
    unread = [
        key
        for key, value in metadata.items()
        if key.startswith("tokenizer.") and key not in known and not key.startswith("tokenizer.chat_template.")
        and (bool(len(value)) if hasattr(value, "__len__") else bool(value))
    ]  # fmt: skip
    if unread:
        warnings.warn(
            f"the GGUF file says of its tokenizer what is not known here, left out: {', '.join(unread)}", stacklevel=3
        )


def _array(metadata: Fields, key: str, length: int | None = None) -> list[Any]:
    """Returns the array under `tokenizer.ggml.<key>` as a list, of `length` where that is given."""
    values = metadata.get(f"{_KEYS}{key}")
    if values is None:
        raise ValueError(f"the GGUF file has no tokenizer.ggml.{key}: convert the model again")
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if length is not None and len(values) != length:
        raise ValueError(f"tokenizer.ggml.{key} has {len(values)} entries, not {length}: the file is damaged")
    return values


def _strings(metadata: Fields, key: str) -> list[str]:
    values = _array(metadata, key)
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"tokenizer.ggml.{key} must be texts, got {wrong!r:.80}: convert the model again")
    return values


# ---------------------------------------------------------------------------------------------------------------------


def _model(metadata: Fields, vocabulary: Vocabulary) -> bytes:
    tokens, types, _ = vocabulary
    scores = _array(metadata, "scores", len(_array(metadata, "tokens")))
    charsmap = metadata.get(f"{_KEYS}precompiled_charsmap")
    spec = Spec(
        kind=_SENTENCEPIECE[metadata[f"{_KEYS}model"]],
        add_prefix=bool(metadata.get(f"{_KEYS}add_space_prefix", True)),
        remove_spaces=bool(metadata.get(f"{_KEYS}remove_extra_whitespaces", False)),
        charsmap=b"" if charsmap is None else bytes(int(byte) & 255 for byte in charsmap),
    )
    return write_model(map(Piece, tokens, map(float, scores), types), spec)


def _pre_tokenizer(metadata: Fields) -> Foreign:
    name = metadata.get(f"{_KEYS}pre")
    if not name:
        name = "llama-bpe" if "<|begin_of_text|>" in _array(metadata, "tokens") else "default"
        if name == "default":
            warnings.warn(
                "the GGUF file has no tokenizer.ggml.pre: its text is split as llama.cpp does by default, which few"
                " models do; convert the model again",
                stacklevel=3,
            )
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre {name!r} is not supported: {', '.join(sorted(PRE_TOKENIZERS))}")
    return PRE_TOKENIZERS[name]


def _backend(metadata: Fields, vocabulary: Vocabulary) -> Foreign:
    from tokenizers import AddedToken, models

    tokens, types, _ = vocabulary
    merges = [_pair(merge) for merge in _strings(metadata, "merges") if merge]
    pre = _pre_tokenizer(metadata)
    if pre.whole_words:  # no word is spelt so: what is unused is never taken whole
        unused = _unmerged([t for t, kind in zip(tokens, types, strict=True) if kind == UNUSED], merges)
        tokens = [f"[UNUSED{i}]" if token in unused else token for i, token in enumerate(tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words)  # pyright: ignore
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    return byte_level_backend(model, pre.regexes, added)


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge[1:].partition(" ")  # the first part may begin with a space
    return merge[:1] + first, second


def _unmerged(tokens: Iterable[str], merges: list[tuple[str, str]]) -> set[str]:
    """Returns the tokens that no merge takes or makes."""
    tokens = set(tokens)
    return tokens and tokens - {text for a, b in merges for text in (a, b, a + b)}


class _SentencePiece(SentencePieceTokenizer):
    """The vocabulary of a GGUF file of kind `llama` or `t5`."""

    def __init__(self, model: bytes, facts: Facts, vocabulary: Vocabulary):
        super().__init__(model, facts, source="the GGUF file's tokenizer")
        self._own_texts = vocabulary.texts

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        text = self._own_texts.get(token)
        return super().token_bytes(token) if text is None else text


class _ByteLevel(BPETokenizer):
    """The vocabulary of a GGUF file of kind `gpt2`."""

    def __init__(self, backend: Foreign, facts: Facts, vocabulary: Vocabulary, *, add_bos: bool):
        added = backend.get_added_tokens_decoder()
        super().__init__(backend, facts, added=added, byte_level=True, drops_space=False, add_bos=add_bos)
        self._own_texts = vocabulary.texts

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one id adds to the text: none for a special token."""
        text = self._own_texts.get(token)
        return super().token_bytes(token) if text is None else text
