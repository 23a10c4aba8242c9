"""Compares two checkpoints of any formats: configuration, tokenizer, weights, logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import distributed, sharding
from llama_jax.progress import SMALL, progress
from llama_jax.text.chat import ChatError, TemplateChat, guessed_format
from llama_jax.text.differences import differences
from llama_jax.text.samples import sample_texts
from llama_jax.typing import PyTree
from llama_jax.weights import params
from llama_jax.weights.checkpoint import Checkpoint
from llama_jax.weights.compare import Difference, compare_parameter
from llama_jax.weights.load import read_model
from llama_jax.weights.open import open_checkpoint

POSITIONS = 8704  # past the 8192 from which Llama 3.1's RoPE scaling counts
LAST = 64  # positions whose logits are compared


@dataclasses.dataclass(frozen=True)
class Logits:
    """How far the logits of b are from those of a, in float32, at the last positions of one long text.

    Attributes:
      positions: length of the text.
      max_abs: largest |b - a|.
      kl: mean Kullback-Leibler divergence of b from a, in nats.
      top1: share of positions at which both have the same most likely token.
    """

    positions: int
    max_abs: float
    kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
      config: field -> its values in a and in b, where they differ.
      tokenizer: what differs, in words; empty where ids, control tokens and chat prompts are the same.
      weights: the worst of each kind of parameter; empty where shapes differ.
      logits: None if they were not asked for or shapes differ.
      left_out: what the readers of a and of b did not use of their files, in words: it was not compared either.
    """

    config: dict[str, tuple[object, object]]
    tokenizer: list[str]
    weights: list[Difference]
    logits: Logits | None
    left_out: list[str] = dataclasses.field(default_factory=list)

    def problems(self, tolerance: float) -> list[str]:
        """What differs, in words: configuration and tokenizer at all, weights and logits by more than `tolerance`.

        Args:
          tolerance: bound on |difference| of every weight and logit, and on each parameter's relative error.
        """
        found = [f"{name} is {a} and {b}" for name, (a, b) in self.config.items()]
        found += [f"tokenizer: {text}" for text in self.tokenizer]
        if not self.weights:
            found.append("the weights have other shapes")
        # `not <=`, because NaN is neither below nor above.
        found += [d.name for d in self.weights if not (d.max_abs <= tolerance and d.relative <= tolerance)]
        if self.logits and not self.logits.max_abs <= tolerance:
            found.append("logits")
        return found


def compare(
    a: str | Path,
    b: str | Path,
    *,
    positions: int = POSITIONS,
    mesh: str | None = None,
    with_logits: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compares two checkpoints.

    Args:
      a: the reference; whatever `load` takes.
      b: the other.
      positions: length of the text whose last logits are compared, at most the models' context.
      mesh: devices for the logits, as for `load`.
      with_logits: whether to compute them; else no model is loaded.
      say: called with a word about what is being done.

    Raises:
      CheckpointError: one of them cannot be read.
      ConfigError: one of them is no model that this library computes.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    ours, theirs = dataclasses.asdict(first.config), dataclasses.asdict(second.config)
    config = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    left_out = [f"left out of the first: {text}" for text in first.left_out]
    left_out += [f"left out of the second: {text}" for text in second.left_out]
    say("comparing tokenizers")
    tokenizer = _compare_tokenizers(first, second)
    if params.expected(first.config, "hf") != params.expected(second.config, "hf"):
        return Comparison(config, tokenizer, [], None, left_out)
    say("comparing weights")
    weights = compare_weights(first, second)
    logits = _compare_logits(first, second, positions, mesh, say) if with_logits else None
    return Comparison(config, tokenizer, weights, logits, left_out)


def compare_weights(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """The worst difference of each kind of parameter, over all layers."""
    worst: dict[str, Difference] = {}
    with progress("Comparing", sum(tensor.nbytes for tensor in a.tensors.values()), least=SMALL) as advance:
        for row, layer in params.parameters(a.config):
            found = compare_parameter(a, b, row, layer)
            before = worst.get(row.ours)
            if before is None or (found.max_abs, not found.same_bits) > (before.max_abs, not before.same_bits):
                worst[row.ours] = found
            advance(a.tensor(row, layer).nbytes)
    return list(worst.values())


def _compare_tokenizers(a: Checkpoint, b: Checkpoint) -> list[str]:
    problems = differences(a.tokenizer, b.tokenizer, thorough=True)
    if a.tokenizer and b.tokenizer:
        texts = zip(("user", "assistant", "user"), sample_texts(), strict=False)
        messages = [{"role": role, "content": text} for role, text in texts]
        if _prompt(a.tokenizer, messages) != _prompt(b.tokenizer, messages):
            problems.append("the same conversation becomes another chat prompt")
    return problems


def _prompt(tokenizer: Any, messages: Sequence[Any]) -> list[int] | None:
    try:
        chat = guessed_format(tokenizer) if tokenizer.chat_template is None else TemplateChat(tokenizer)
        return None if chat is None else chat.prompt(messages)
    except ChatError:  # no chat format
        return None


def _compare_logits(
    a: Checkpoint, b: Checkpoint, positions: int, mesh: str | None, say: Callable[[str], None]
) -> Logits:
    positions = min(positions, a.config.max_seq_len, b.config.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, a.config.vocab_size, (1, positions), np.int32)
    if a.tokenizer is not None:
        ids = [i for text in sample_texts() for i in a.tokenizer.encode(text) if i < a.config.vocab_size]
        tokens = np.resize(np.asarray(ids, np.int32), (1, positions))
    found = []
    for checkpoint in (a, b):
        say(f"computing logits of {checkpoint.path} at {positions} tokens")
        found.append(np.asarray(_last_logits(checkpoint, tokens, mesh), np.float64)[0])
    x, y = found
    with np.errstate(invalid="ignore"):  # of damaged models: NaN, which is not within any tolerance
        log_p, log_q = (z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (x, y))
        return Logits(
            positions,
            max_abs=float(np.abs(y - x).max()),
            kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))),
            top1=float(np.mean(x.argmax(-1) == y.argmax(-1))),
        )


def _last_logits(checkpoint: Checkpoint, tokens_BT: np.ndarray, mesh: str | None) -> np.ndarray:
    """Float32 [1, LAST, V]; the model is gone afterwards."""
    devices = sharding.mesh_of(checkpoint.config, mesh)
    model = read_model(checkpoint, devices, dtype="float32")
    with jax.set_mesh(devices):
        rows = sharding.pad_batch(1)
        padded_BT = np.broadcast_to(tokens_BT, (rows, tokens_BT.shape[1]))
        on_device = distributed.put(padded_BT, model.rules.sharding(("batch", "seq"), padded_BT.shape))
        return distributed.fetch(_last(model, on_device))[0]


@jax.jit
def _last(model: PyTree, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = model.hidden(tokens_BT)
    batch, _, embed = jax.typeof(x_BTD).sharding.spec
    x_BTD = jax.reshard(x_BTD, jax.P(batch, None, embed))  # the last ones may all be on one device
    return model.logits(x_BTD[:, -LAST:])
