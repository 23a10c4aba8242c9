"""What a model is: its architecture, the released ones, and how each format spells them. Standard library only."""

from llama_jax.config.model import (
    AnyRopeScaling,
    ConfigError,
    LinearScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
    float32,
    scaling_from_json,
    scaling_to_json,
    yarn_attention_factor,
)

__all__ = [
    "AnyRopeScaling", "ConfigError", "LinearScaling", "ModelConfig", "RopeScaling", "YarnScaling", "float32",
    "scaling_from_json", "scaling_to_json", "yarn_attention_factor",
]  # fmt: skip
