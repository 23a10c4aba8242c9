"""Objectives that compare two answers to one prompt: DPO and its relatives, as Llama 3 was aligned.

A document holds both answers, each after the prompt (`data.manifest.PAIR`). A model sees them as two sequences; what is
compared are the sums of their tokens' log-probabilities. The reference is the model without its adapter, or, where all
parameters train, what a column of the corpus keeps of the model that the run began with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from llama_jax.data.manifest import ENDS, LOSS_MASK, PAIR, POSITION, REJECTED
from llama_jax.model import Llama
from llama_jax.model.adapt import without_adapter
from llama_jax.train.losses import token_nll
from llama_jax.train.recipe import Preference

SHORTEST = 4  # tokens of a pair: more of them are in no row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Of each pair, float32 [B, P], 0 where there is none.

    Attributes:
      chosen: log-probability of the better answer.
      rejected: of the other one.
      chosen_tokens: how many tokens that is the sum of.
      rejected_tokens: likewise.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sums over pairs, float32 scalars.

    Attributes:
      loss: of the comparison.
      nll: of the better answers' tokens, in nats.
      tokens: how many these are.
      pairs: how many there are.
      accurate: in how many the better answer has the greater reward.
      chosen_reward: beta times how much more probable the better answers are than in the reference, in nats.
      rejected_reward: of the others.
      chosen_logp: log-probabilities of the better answers.
      rejected_logp: of the others.
    """

    loss: jax.Array
    nll: jax.Array
    tokens: jax.Array
    pairs: jax.Array
    accurate: jax.Array
    chosen_reward: jax.Array
    rejected_reward: jax.Array
    chosen_logp: jax.Array
    rejected_logp: jax.Array


def _smoothed(margin: jax.Array, smoothing: float) -> jax.Array:
    return (1 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)


def _dpo(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """Rafailov et al. 2023, arXiv 2305.18290; with smoothing, conservative DPO."""
    margin = beta * ((model.chosen - base.chosen) - (model.rejected - base.rejected))
    return _smoothed(margin, options.label_smoothing)


def _dpo_norm(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """Of means over tokens, as Tulu 3 has it (arXiv 2411.15124)."""
    chosen = (model.chosen - base.chosen) / model.chosen_tokens
    rejected = (model.rejected - base.rejected) / model.rejected_tokens
    return _smoothed(beta * (chosen - rejected), options.label_smoothing)


def _ipo(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """Azar et al. 2023, arXiv 2310.12036, of means over tokens as TRL takes them."""
    chosen = (model.chosen - base.chosen) / model.chosen_tokens
    rejected = (model.rejected - base.rejected) / model.rejected_tokens
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def _hinge(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """SLiC, arXiv 2305.10425."""
    margin = beta * ((model.chosen - base.chosen) - (model.rejected - base.rejected))
    return jax.nn.relu(1 - margin)


def _simpo(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """Meng et al. 2024, arXiv 2405.14734: without a reference."""
    chosen, rejected = model.chosen / model.chosen_tokens, model.rejected / model.rejected_tokens
    return jax.nn.softplus(options.gamma - beta * (chosen - rejected))


def _orpo(model: Answers, base: Answers, beta: float, options: Preference) -> jax.Array:
    """Hong et al. 2024, arXiv 2403.07691: the odds ratio, beside the loss of the better answer."""
    chosen, rejected = model.chosen / model.chosen_tokens, model.rejected / model.rejected_tokens
    odds = (chosen - rejected) - (_log_not(chosen) - _log_not(rejected))
    return beta * jax.nn.softplus(-odds)


def _log_not(logp: jax.Array) -> jax.Array:
    """The logarithm of 1 - p; finite where p is 1 to rounding."""
    return jnp.log(-jnp.expm1(jnp.minimum(logp, -1e-6)))


COMPARED: Mapping[str, Callable[[Answers, Answers, float, Preference], jax.Array]] = {
    "dpo": _dpo, "dpo-norm": _dpo_norm, "ipo": _ipo, "hinge": _hinge, "simpo": _simpo, "orpo": _orpo,
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "orpo")
REFERENCE = "reference"  # the column, see `train.reference`
NORMALISED = ("dpo-norm", "ipo", "simpo", "orpo")  # compare means over tokens
BETA = {"dpo-norm": 5.0, "simpo": 2.0}  # of the others 0.1
NLL_WEIGHT = {"dpo": 0.2, "dpo-norm": 0.2, "orpo": 1.0}  # of the others 0


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """The mean over pairs of a comparison, and the mean loss of the better answers' tokens.

    Attributes:
      name: of the comparison, in COMPARED.
      options: its numbers.
      reference: the column with the log-probability of each token in the reference; empty takes the model without its
        adapter.
    """

    name: str
    options: Preference
    reference: str = ""
    whole: bool = True

    @property
    def beta(self) -> float:
        """As given, or the objective's own."""
        return BETA.get(self.name, 0.1) if self.options.beta is None else self.options.beta

    @property
    def columns(self) -> tuple[str, ...]:
        """What is learned, which answer a token is of, and what the reference says."""
        return (LOSS_MASK, PAIR, *filter(None, [self.reference]))

    def count(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Pairs with something to compare, and tokens of the better answers."""
        learned, compared, rejected = self._masks(batch)
        found = _answers(compared, compared, rejected, batch["segment_ids"])
        return {
            "pairs": _real(found).sum(dtype=jnp.float32),
            "tokens": jnp.where(rejected, 0, learned).sum(dtype=jnp.float32),
        }

    def sums(self, model: Llama, batch: Mapping[str, jax.Array]) -> Comparison:
        """Compares the answers of each pair of a microbatch."""
        logp_BT = self.log_probabilities(model, batch)
        if self.name in WITHOUT_REFERENCE:
            base_BT = jnp.zeros_like(logp_BT)
        elif self.reference:
            base_BT = batch[self.reference].astype(jnp.float32)
        else:
            base_BT = jax.lax.stop_gradient(self.log_probabilities(without_adapter(model), batch))
        learned_BT, compared_BT, rejected_BT = self._masks(batch)
        ours, base = (_answers(x, compared_BT, rejected_BT, batch["segment_ids"]) for x in (logp_BT, base_BT))
        real_BP = _real(ours)
        # Where there is no pair the numbers are those of one, so that no division has a gradient that is not finite.
        some = Answers(*map(jnp.float32, (-1, -1, 1, 1)))
        ours, base = (jax.tree.map(lambda x, y: jnp.where(real_BP, x, y), own, some) for own in (ours, base))
        better_BT = jnp.where(rejected_BT, 0, learned_BT)
        beta = self.beta
        rewards = [beta * (ours.chosen - base.chosen), beta * (ours.rejected - base.rejected)]
        if self.name in NORMALISED:
            rewards = [rewards[0] / ours.chosen_tokens, rewards[1] / ours.rejected_tokens]

        def total(x_BP: jax.Array) -> jax.Array:
            return jnp.where(real_BP, x_BP, 0).sum(dtype=jnp.float32)

        return Comparison(
            loss=total(COMPARED[self.name](ours, base, beta, self.options)),
            nll=-jnp.where(better_BT > 0, better_BT * logp_BT, 0).sum(),
            tokens=better_BT.sum(),
            pairs=real_BP.sum(dtype=jnp.float32),
            accurate=total(rewards[0] > rewards[1]),
            chosen_reward=total(rewards[0]),
            rejected_reward=total(rewards[1]),
            chosen_logp=total(ours.chosen),
            rejected_logp=total(ours.rejected),
        )  # fmt: skip

    def log_probabilities(self, model: Llama, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Of each target, float32 [B, T]; the two answers of a pair do not see each other."""
        segments_BT, pair_BT = batch["segment_ids"], batch[PAIR]
        position_BT, second_BT = pair_BT >> POSITION, (pair_BT & REJECTED) > 0  # of the target
        inside_BT = position_BT > 0  # else the token is the last of the first answer, and its target begins the second
        segments_BT = jnp.where(segments_BT > 0, 2 * segments_BT - 1 + (inside_BT & second_BT), 0)
        positions_BT = jnp.where(inside_BT, position_BT - 1, batch["positions"])
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT=positions_BT, segment_ids_BT=segments_BT)
        return -token_nll(model, x_BTD, batch["targets"])

    def _masks(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which targets are learned and which are compared, float32, and which are of the other answer."""
        learned = jnp.where(batch["segment_ids"] > 0, batch[LOSS_MASK], 0).astype(jnp.float32)
        compared = learned if self.options.ends else jnp.where((batch[PAIR] & ENDS) > 0, 0, learned)
        return learned, compared, (batch[PAIR] & REJECTED) > 0

    def minimised(self, sums: Comparison, count: Mapping[str, jax.Array]) -> jax.Array:
        """The comparison, and the better answers' loss by its weight."""
        weight = self.options.nll_weight
        weight = NLL_WEIGHT.get(self.name, 0.0) if weight is None else weight
        return sums.loss / count["pairs"] + weight * sums.nll / count["tokens"]

    def metrics(self, sums: Comparison, count: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """`loss` (what is minimised), and of a pair on average: rewards, their margin, how often that is positive,
        log-probabilities."""
        pairs = count["pairs"]
        return {
            "loss": self.minimised(sums, count), "preference_loss": sums.loss / pairs,
            "chosen_nll": sums.nll / count["tokens"], "accuracy": sums.accurate / pairs,
            "margin": (sums.chosen_reward - sums.rejected_reward) / pairs, "chosen_reward": sums.chosen_reward / pairs,
            "rejected_reward": sums.rejected_reward / pairs, "chosen_logp": sums.chosen_logp / pairs,
            "rejected_logp": sums.rejected_logp / pairs, "tokens": sums.tokens, "pairs": sums.pairs,
        }  # fmt: skip


def _answers(logp: jax.Array, mask: jax.Array, rejected: jax.Array, segments: jax.Array) -> Answers:
    """Sums over [..., T] by pair: comparisons and sums of one fused loop, where a scatter would need another layout."""
    number_P = jnp.arange(1, segments.shape[-1] // SHORTEST + 2)
    own = segments[..., None] == number_P

    def of(x: jax.Array, side: bool) -> jax.Array:
        x = jnp.where(mask > 0, x, 0)
        return jnp.where(own & (rejected == side)[..., None], x[..., None], 0).sum(axis=-2)

    return Answers(of(mask * logp, False), of(mask * logp, True), of(mask, False), of(mask, True))


def _real(found: Answers) -> jax.Array:
    """Which are pairs: both answers have something to compare."""
    return (found.chosen_tokens > 0) & (found.rejected_tokens > 0)
