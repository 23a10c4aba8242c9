"""What a Llama is: the frozen facts of one architecture, and the sizes that follow from them."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.typing import JsonObject


class ConfigError(ValueError):
    """A configuration that this library cannot compute exactly; the message names the key and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of RoPE scaling. Each knows its inverse frequencies, their divisors, and the factor of cosines and sines.
# ---------------------------------------------------------------------------------------------------------------------


def _check_positive(scaling: AnyRopeScaling, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"RoPE scaling: {name} must be a positive number, got {value!r}")
    length = getattr(scaling, "original_max_seq_len", 1)
    if length != int(length):
        raise ConfigError(f"RoPE scaling: original_max_seq_len must be an integer, got {length}")


def float32(x: float) -> float:
    """Returns the nearest float32. Sums, products and quotients of two float32 may be rounded through float64."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, the rest blended.

    Source: Meta's `apply_scaling` and the paper's 128K stage. It acts on frequencies, not on positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self):
        _check_positive(self, *(field.name for field in dataclasses.fields(self)))
        if not (self.factor >= 1 and self.high_freq_factor > self.low_freq_factor):
            raise ConfigError(f"RoPE scaling needs factor >= 1 and high_freq_factor > low_freq_factor > 0, got {self}")

    @property
    def cos_sin_factor(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def divisor(self, frequency: float) -> float:
        """Returns the divisor of `frequency` (radians per position)."""
        cycles = self.original_max_seq_len * frequency / (2 * math.pi)
        if cycles > self.high_freq_factor:
            return 1.0
        if cycles < self.low_freq_factor:
            return self.factor
        smooth = (cycles - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return 1 / ((1 - smooth) / self.factor + smooth)

    def divisors(self, head_dim: int, theta: float) -> list[float]:
        """Returns the divisor of each pair's frequency, [H / 2]."""
        return [self.divisor(theta ** (-2 * i / head_dim)) for i in range(head_dim // 2)]

    def frequencies(self, powers: Sequence[float], theta: float) -> list[float]:
        """Returns radians per position of each pair, rounded to float32 where Meta and transformers round.

        Args:
          powers: theta ** (2 i / H) in float32, [H / 2].
          theta: RoPE's base.
        """
        del theta
        plain = [float32(1 / power) for power in powers]
        return [float32(f / float32(self.divisor(f))) for f in plain]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every position is divided by `factor` (DeepSeek-Coder, Llamas of 16k and 32k tokens)."""

    factor: float

    def __post_init__(self):
        _check_positive(self, "factor")

    @property
    def cos_sin_factor(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def divisors(self, head_dim: int, theta: float) -> list[float]:
        """Returns the divisor of each pair's frequency, [H / 2]."""
        del theta
        return [float(self.factor)] * (head_dim // 2)

    def frequencies(self, powers: Sequence[float], theta: float) -> list[float]:
        """Returns radians per position of each pair; arguments as `RopeScaling.frequencies`."""
        del theta
        return [float32(float32(1 / power) / float32(self.factor)) for power in powers]


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies of less than `beta_slow` turns in the original context are divided by `factor`, of more than
    `beta_fast` kept, the rest blended by their index; queries and keys are multiplied by `attention_factor`.

    Attributes:
      factor: of the context.
      original_max_seq_len: the context before it was stretched.
      attention_factor: factor of cosines and sines; `yarn_attention_factor` gives the usual one.
      beta_fast: turns above which a frequency is kept.
      beta_slow: turns below which it is divided.
      truncate: whether the bounds of the blend are rounded to whole indices.
    """

    factor: float
    original_max_seq_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        names = (field.name for field in dataclasses.fields(self) if field.name != "truncate")
        _check_positive(self, *names)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"RoPE scaling: truncate must be true or false, got {self.truncate!r}")
        if not (self.factor >= 1 and self.beta_fast >= self.beta_slow):
            raise ConfigError(f"RoPE scaling needs factor >= 1 and beta_fast >= beta_slow > 0, got {self}")

    @property
    def cos_sin_factor(self) -> float:
        """Factor of cosines and sines."""
        return self.attention_factor

    def divisors(self, head_dim: int, theta: float) -> list[float]:
        """Returns the divisor of each pair's frequency, [H / 2]."""
        kept = [1 - blend for blend in self._blends(head_dim, theta)]
        return [1 / (keep + (1 - keep) / self.factor) for keep in kept]

    def frequencies(self, powers: Sequence[float], theta: float) -> list[float]:
        """Returns radians per position of each pair; arguments as `RopeScaling.frequencies`."""
        found = []
        for power, blend in zip(powers, self._blends(2 * len(powers), theta), strict=True):
            kept = float32(1 - blend)
            divided = float32(1 / float32(float32(self.factor) * power))
            plain = float32(1 / power)
            found.append(float32(float32(divided * float32(1 - kept)) + float32(plain * kept)))
        return found

    def _blends(self, head_dim: int, theta: float) -> list[float]:
        """Returns how far each pair is divided, from 0 to 1, in float32 as transformers has it."""
        low, high = self._bounds(head_dim, theta)
        width = float32(high - low) or float32(0.001)
        indices = range(head_dim // 2)
        return [min(max(float32(float32(i - float32(low)) / width), 0.0), 1.0) for i in indices]

    def _bounds(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Returns the indices between which the blend rises from 0 to 1."""

        def index(turns: float) -> float:
            cycles = self.original_max_seq_len / (turns * 2 * math.pi)
            return head_dim * math.log(cycles) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)


AnyRopeScaling = RopeScaling | LinearScaling | YarnScaling


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's `attention_factor` where a checkpoint does not say one: 0.1 ln(factor) + 1, or the quotient of two such
    numbers where it says both `mscale` and `mscale_all_dim`."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1)


# How our own files name a kind; Llama 3.1's has no name.
_KINDS: dict[str | None, type[AnyRopeScaling]] = {None: RopeScaling, "linear": LinearScaling, "yarn": YarnScaling}


def scaling_to_json(scaling: AnyRopeScaling) -> JsonObject:
    """Returns a scaling as our own files have it: its kind, if not Llama 3.1's, and its fields."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(scaling, kind))
    return ({} if kind is None else {"kind": kind}) | dataclasses.asdict(scaling)


def scaling_from_json(content: Any, where: str) -> AnyRopeScaling:
    """Returns the scaling of `scaling_to_json`.

    Raises:
      ConfigError: not such an object, or with impossible numbers.
    """
    values = dict(content) if isinstance(content, Mapping) else {}
    name = values.pop("kind", None)
    if not isinstance(name, str | None) or name not in _KINDS:
        raise ConfigError(f"{where}: rope_scaling is of the unknown kind {name!r}, not linear or yarn")
    names = [field.name for field in dataclasses.fields(_KINDS[name])]
    if set(values) != set(names) or not all(isinstance(value, (int, float)) for value in values.values()):
        raise ConfigError(f"{where}: rope_scaling must be null or give numbers for {', '.join(names)}")
    return _KINDS[name](**values)


# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one Llama.

    Attributes:
      vocab_size: V, rows of the embedding table.
      embed_dim: D, width of the residual stream (HF `hidden_size`, Meta `dim`).
      mlp_dim: F, width inside the gated MLP (HF `intermediate_size`).
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; N is a multiple of K.
      head_dim: H, size of one head; even, because RoPE rotates pairs.
      norm_eps: added to the mean square in RMSNorm.
      rope_theta: RoPE's base.
      rope_scaling: how RoPE's frequencies are scaled: Llama 3.1's way, linear or YaRN; None where they are not.
      max_seq_len: longest sequence that the checkpoint was made for, in tokens.
      tie_embeddings: whether the output head is the embedding table.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: AnyRopeScaling | None
    max_seq_len: int
    tie_embeddings: bool

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "embed_dim",
            "mlp_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**30:
                raise ConfigError(f"{name} must be a positive integer below 2**30, got {value!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ConfigError(f"YaRN needs rope_theta > 1, got {self.rope_theta}")

    @property
    def num_groups(self) -> int:
        """G: query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of each layer: it selects class and parameters when a model is made. See `model.layers`."""
        return ("plain",) * self.num_layers

    def param_count(self) -> int:
        """Returns the number of parameters, the tied embedding counted once."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.embed_dim * self.mlp_dim
        norms = 2 * self.embed_dim
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return self.num_layers * (attention + mlp + norms) + self.embed_dim + tables

    def replace(self, **changes) -> ModelConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
