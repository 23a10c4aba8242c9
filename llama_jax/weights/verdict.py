"""Decides what a checkpoint is where its files disagree: for load, chat, logits, convert, verify, train, plan.

Names lose the prefixes of wrappers. A stored output head is used, whatever the configuration says about tying. Tensors
that a Llama does not compute with are left out, and a warning names them. Everything else that is missing or foreign is
refused, and `diagnose` names the files' real kind.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.config import keys as config_keys
from llama_jax.typing import Fields
from llama_jax.weights import diagnose, params
from llama_jax.weights.source import CheckpointError, Tensor, common_dtype

log = logging.getLogger("llama_jax")

# Parts of a name that wrappers put in, anywhere: torch.compile, DDP, FSDP, activation checkpointing, Fabric.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Parts that a larger module puts before the whole model: PEFT after merging, Lightning, TRL, trainers.
OUTER = {"base_model", "model", "pretrained_model", "_model", "policy", "actor", "student", "net", "transformer"}
# How each format's embedding table ends, and what stands before it.
ROOTS: dict[params.Format, tuple[str, str]] = {
    "hf": ("embed_tokens.weight", "model."),
    "meta": ("tok_embeddings.weight", ""),
}
SAMPLE = 64  # rows of two tables that are compared first: heads that differ do so in nearly every row


class Harmless(NamedTuple):
    """A kind of tensor that no result depends on.

    Attributes:
      what: a name for several of them.
      names: a regular expression for the whole name.
      test: what else must hold.
      silent: whether it is so common that no warning is due.
    """

    what: str
    names: str
    test: Callable[[Tensor], bool] = lambda tensor: True
    silent: bool = False


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype.kind in "iub"


_ROTARY = r"(.*[._])?(rotary_emb|rotary_pos_emb|rotary_embedding|rotary|rope)\."
_COUNTED = "step|steps|epochs?|iterations?|iter|num_updates|num_batches_tracked|step_count|loss|lr|tokens_seen|seen"
HARMLESS = (
    Harmless("RoPE tables, which the configuration gives", params.NO_PARAMETERS.pattern, silent=True),
    Harmless(
        "RoPE tables, which the configuration gives",
        _ROTARY + r"_?(original_inv_freq|inv_freq|(cos|sin)(_cached?)?|cos_sin_cache|freqs(_cis|_cos|_sin)?|cache)"
        r"|(.*\.)?(freqs_cis|freqs_cos|freqs_sin|rope_cache|(cos|sin)_cached?|cos_sin_cache|inv_freq|rotary_freqs)",
    ),
    Harmless(
        "causal masks",
        r"(.*\.)?(attn|self_attn|attention)\.(bias|mask)|(.*\.)?(masked_bias|causal_mask|attn_mask|attention_mask)",
        lambda tensor: len(tensor.shape) != 1 or _size(tensor) == 1,  # [.., T, T] or a number: a bias has one dimension
    ),
    Harmless("position ids", r"(.*\.)?position_ids", _is_integer),
    Harmless("counters", r".*", lambda tensor: _size(tensor) == 1 and _is_integer(tensor)),
    Harmless("counters", rf"(.*[._])?({_COUNTED})", lambda tensor: _size(tensor) == 1),
    Harmless(
        "tensors of a trainer's state",
        r"(optimizer|optim|optimizer_states?|lr_scheduler|scheduler|grad_scaler|ema|ema_model)\..*"
        r"|.*\.(exp_avg|exp_avg_sq|max_exp_avg_sqs?|momentum_buffer)",
    ),
    Harmless(
        "tensors of heads that the next token does not depend on",
        r"(v_head|value_head|reward_head|score|classifier|medusa_heads?)\..*",
    ),
)


@dataclasses.dataclass(frozen=True)
class Settled:
    """The decision about a checkpoint.

    Attributes:
      config: as its tensors have it.
      tensors: stored name -> tensor, without what was left out.
      left_out: sentences on what was left out.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def settle(
    path: Path,
    format: params.Format,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    said: Fields | None = None,
    notes: Iterable[str] = (),
    left_out: Iterable[str] = (),
    absent: Mapping[str, str] | None = None,
) -> Settled:
    """Decides what a checkpoint is; one warning says where that differs from its files.

    Reads no weights, except where a tied model stores an output head too: then the head and the table, in pieces, until
    they differ.

    Args:
      path: for messages.
      format: whose names the tensors have.
      config: as the files have it.
      tensors: all of the files'.
      said: the content of config.json, params.json or GGUF's metadata, for the diagnosis.
      notes: sentences of the reader.
      left_out: sentences on what the reader has left out already.
      absent: tensors that an index names and no file has -> the file that it names.

    Raises:
      CheckpointError: tensors are missing, foreign, or not of the configured sizes; names the files' real kind.
    """
    notes, out = list(notes), list(left_out)
    kept = dict(tensors)
    config, said_of_tie = _tied_or_not(config, kept, format)
    notes += said_of_tie
    dropped = _without_harmless(config, kept, format)
    _check_vocabulary(path, config, kept, format)
    params.check(
        kept, config, format, path, lambda: diagnose.tensors(tensors, config, format, said or {}, absent or {})
    )
    aloud = [*notes, *(f"left out: {text}" for text in out)]
    aloud += [f"left out: {sentence}" for sentence, silent in dropped if not silent]
    out += [sentence for sentence, _ in dropped]
    if aloud:
        log.warning("%s: %s", path, "; ".join(aloud))
    return Settled(config, kept, (*out, *_left_out_keys(format, said or {})))


def _left_out_keys(format: params.Format, said: Fields) -> tuple[str, ...]:
    """Returns sentences on keys of the configuration that were not used."""
    ignored = config_keys.ignored_keys(format, said)
    return (f"keys of the configuration that no Llama uses: {', '.join(ignored)}",) if ignored else ()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def unwrapped(tensors: Mapping[str, Tensor], format: params.Format) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors under their names without wrappers, and sentences about that.

    Args:
      tensors: stored name -> tensor.
      format: "hf" or "meta".
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    tail, inner = ROOTS[format]
    prefixes = {name.removesuffix(tail) for name in plain.values() if name == tail or name.endswith(f".{tail}")}
    (prefix,) = prefixes if len(prefixes) == 1 else (None,)  # none or several: not one model in a wrapper
    if prefix is not None and set(prefix.split(".")) <= {*OUTER, ""}:
        plain = {name: _without(text, prefix, inner, params.head_name(format)) for name, text in plain.items()}
    if len(set(plain.values())) < len(plain) or all(name == text for name, text in plain.items()):
        return dict(tensors), []  # two would have one name: then these are not a wrapper's
    first = next(name for name, text in plain.items() if name != text)
    note = f"its names are those of a wrapped model: {first!r} is read as {plain[first]!r}, and so on"
    return {plain[name]: dataclasses.replace(x, name=plain[name]) for name, x in tensors.items()}, [note]


def _without(name: str, prefix: str, inner: str, head: str) -> str:
    """Returns a name with `inner` in place of a larger module's prefix; the output head stands outside of `inner`."""
    outer, _, rest = name.rpartition(head)
    if not rest and name.endswith(head) and set(outer.split(".")) <= {*OUTER, ""}:
        return head
    return inner + name.removeprefix(prefix) if name.startswith(prefix) else name


def _without_harmless(config: ModelConfig, tensors: dict[str, Tensor], format: params.Format) -> list[tuple[str, bool]]:
    """Removes tensors that no result depends on; returns a sentence for each kind, and whether it needs no warning."""
    if config.num_layers > len(tensors):
        return []  # params.check refuses it
    needed = params.expected(config, format).keys() | {params.head_name(format)}
    needed |= {"rope_freqs.weight"} if format == "gguf" else set()  # which the configuration was made of
    found: dict[tuple[str, bool], list[str]] = {}
    for name in [name for name in tensors if name not in needed]:
        kind = next((k for k in HARMLESS if re.fullmatch(k.names, name) and k.test(tensors[name])), None)
        if kind is not None:
            del tensors[name]
            found.setdefault((kind.what, kind.silent), []).append(name)
    return [(f"{counted(which)}: {what}", silent) for (what, silent), which in found.items()]


def counted(which: list[str]) -> str:
    """Returns names in short."""
    return repr(which[0]) if len(which) == 1 else f"{len(which)} tensors, first {which[0]!r}"


# ---------------------------------------------------------------------------------------------------------------------
# The output head, and the vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def _tied_or_not(
    config: ModelConfig, tensors: dict[str, Tensor], format: params.Format
) -> tuple[ModelConfig, list[str]]:
    """Returns the configuration with the head that is stored, and sentences about it."""
    embed, head = (tensors.get(name) for name in (params.embed_name(format), params.head_name(format)))
    if not config.tie_embeddings or head is None:
        return config, []
    if embed is None and format != "native":
        name = params.embed_name(format)
        tensors[name] = dataclasses.replace(tensors.pop(params.head_name(format)), name=name)
        return config, [f"the output head {head.name!r} is stored alone, and is the embedding table too"]
    if embed is None or same_tensor(embed, head, across=format == "native"):
        return config, []
    note = (
        f"its configuration ties the output head to the embedding table, but {head.name!r} is another: the stored head"
        " is used, and the model is not tied"
    )
    return config.replace(tie_embeddings=False), [note]


def same_tensor(a: Tensor, b: Tensor, *, across: bool = False) -> bool:
    """Returns whether two tensors hold the same numbers, whatever their dtypes.

    A sample of rows decides where they differ; only where it agrees, all are read, in pieces of `params.PIECE` bytes.

    Args:
      a: one.
      b: the other; [D, V] where a is [V, D], if `across`.
    """
    if a.shape != (b.shape[::-1] if across else b.shape) or not _comparable(a, b):
        return False
    if not a.shape or 0 in a.shape:
        return np.array_equal(a.read(), b.read())
    count = a.shape[0]

    def rows(start: int, stop: int, step: int = 1) -> bool:
        part = slice(start, stop, step)
        x, y = a.read((part,)), b.read((slice(None), part)).T if across else b.read((part,))
        if _one_place(x) == _one_place(y):  # one storage: torch saves a tied head so
            return True
        common = x.dtype if x.dtype == y.dtype else common_dtype((x.dtype, y.dtype))
        x, y = (np.ascontiguousarray(z.astype(common, copy=False)).reshape(-1).view(np.uint8) for z in (x, y))
        return np.array_equal(x, y)

    high = max(1, params.PIECE * count // (math.prod(a.shape) * max(a.dtype.itemsize, b.dtype.itemsize)))
    return rows(0, count, max(1, count // SAMPLE)) and all(
        rows(start, min(start + high, count)) for start in range(0, count, high)
    )


def _comparable(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype or {a.dtype.name, b.dtype.name} <= set(params.FLOATS)


def _one_place(x: np.ndarray) -> tuple[Any, ...]:
    return x.dtype, x.strides, x.__array_interface__["data"]


def _check_vocabulary(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], format: params.Format) -> None:
    """Refuses tables of other sizes by name: a grown vocabulary leaves them behind."""
    embed, head = (tensors.get(name) for name in (params.embed_name(format), params.head_name(format)))
    if embed is None or len(embed.shape) != 2 or embed.shape[1:] != (config.embed_dim,):
        return  # params.check says so
    rows = embed.shape[0]
    other = head.shape[-1 if format == "native" else 0] if head is not None and head.shape else None
    if head is not None and not config.tie_embeddings and other not in (None, rows):
        raise CheckpointError(
            f"{path}: the embedding table {embed.name!r} has {rows} rows, and the output head {head.name!r} {other}:"
            " one of the two was resized alone; resize both to the vocabulary (transformers: resize_token_embeddings)"
        )
    if rows != config.vocab_size:
        raise CheckpointError(
            f"{path}: the embedding table {embed.name!r} has shape {list(embed.shape)}, but the configuration says"
            f" vocab_size {config.vocab_size}: if tokens were added or rows padded after it was written, let it say"
            f" {rows}; else weights and configuration do not belong together"
        )
