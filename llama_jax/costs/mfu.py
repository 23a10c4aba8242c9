"""What a step costs, and how much of a machine it uses: FLOPs of a token, and MFU."""

from __future__ import annotations

from llama_jax.config import ModelConfig
from llama_jax.costs.machines import chip_of


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass: what the model needs, whatever is computed again.

    Six for each parameter that is multiplied with (the embedding is looked up), and the products of attention with half
    of the `seq_len` keys, as it is causal; documents packed in one row are not taken off. This is the convention of
    PaLM's appendix B, with causal attention.

    Args:
      config: the model.
      seq_len: tokens in a sequence.
    """
    lookups = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    norms = (2 * config.num_layers + 1) * config.embed_dim
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * seq_len / 2
    return 6.0 * (config.param_count() - lookups - norms) + 3 * attention


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where it is not known (a CPU)."""
    chip = chip_of(device_kind)
    return chip.flops if chip else None


def mfu(config: ModelConfig, seq_len: int, tokens_per_second: float, devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share of all devices' peak that the model's own FLOPs take; None if not known.

    Args:
      config: the model.
      seq_len: tokens in a sequence.
      tokens_per_second: of all devices together.
      devices: how many.
      device_kind: of `jax.Device.device_kind`.
    """
    peak = peak_flops(device_kind)
    return peak and tokens_per_second * training_flops(config, seq_len) / (devices * peak)
