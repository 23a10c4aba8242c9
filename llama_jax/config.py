"""What a Llama is: the frozen facts of one architecture, and the sizes that follow from them."""

from __future__ import annotations

import dataclasses
import math


class ConfigError(ValueError):
    """A configuration that this library cannot compute exactly; the message names the key and the remedy."""


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"RoPE scaling: {field.name} must be a positive number, got {value!r}")
        if self.original_max_seq_len != int(self.original_max_seq_len):
            raise ConfigError(f"RoPE scaling: original_max_seq_len must be an integer, got {self.original_max_seq_len}")
        if not (self.factor >= 1 and self.high_freq_factor > self.low_freq_factor):
            raise ConfigError(f"RoPE scaling needs factor >= 1 and high_freq_factor > low_freq_factor > 0, got {self}")

    def divisor(self, frequency: float) -> float:
        """What `frequency` (radians per position) is divided by."""
        cycles = self.original_max_seq_len * frequency / (2 * math.pi)
        if cycles > self.high_freq_factor:
            return 1.0
        if cycles < self.low_freq_factor:
            return self.factor
        smooth = (cycles - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return 1 / ((1 - smooth) / self.factor + smooth)


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
      rope_scaling: Llama 3.1's frequency scaling, or None.
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
    rope_scaling: RopeScaling | None
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

    @property
    def num_groups(self) -> int:
        """G: query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    def param_count(self) -> int:
        """Number of parameters, the tied embedding counted once."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.embed_dim * self.mlp_dim
        norms = 2 * self.embed_dim
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return self.num_layers * (attention + mlp + norms) + self.embed_dim + tables

    def replace(self, **changes) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
