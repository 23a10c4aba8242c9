"""The place of `config.presets`, and of the readers of the formats' configurations, in 0.1: until 0.3."""

from llama_jax.config.gguf import from_gguf_metadata, to_gguf_metadata
from llama_jax.config.hf import from_hf_config, to_hf_config
from llama_jax.config.meta import from_meta_params, to_meta_params
from llama_jax.config.presets import PRESETS

__all__ = [
    "PRESETS", "from_gguf_metadata", "from_hf_config", "from_meta_params", "to_gguf_metadata", "to_hf_config",
    "to_meta_params",
]  # fmt: skip
