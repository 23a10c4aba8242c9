"""The Llama family in JAX. The public names, each imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.config import ConfigError, LinearScaling, ModelConfig, RopeScaling, YarnScaling
    from llama_jax.config.presets import PRESETS
    from llama_jax.infer.chat import Conversation, chat, chat_stream
    from llama_jax.infer.generate import Completion, generate, logits
    from llama_jax.infer.infill import infill
    from llama_jax.infer.sampling import Sampling
    from llama_jax.loaded import LoadedLlama
    from llama_jax.weights.load import load
    from llama_jax.weights.save import convert, save
    from llama_jax.weights.source import CheckpointError

_HOME = {
    "config": ("ConfigError", "LinearScaling", "ModelConfig", "RopeScaling", "YarnScaling"),
    "infer.chat": ("Conversation", "chat", "chat_stream"),
    "infer.generate": ("Completion", "generate", "logits"),
    "infer.infill": ("infill",),
    "infer.sampling": ("Sampling",),
    "config.presets": ("PRESETS",),
    "loaded": ("LoadedLlama",),
    "weights.load": ("load",),
    "weights.save": ("convert", "save"),
    "weights.source": ("CheckpointError",),
}
_MODULES = {name: f"llama_jax.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "PRESETS", "CheckpointError", "Completion", "ConfigError", "Conversation", "LinearScaling", "LoadedLlama",
    "ModelConfig", "RopeScaling", "Sampling", "YarnScaling", "chat", "chat_stream", "convert", "generate", "infill",
    "load", "logits", "save",
]  # fmt: skip


_SUBMODULES = ("distributed", "sharding")  # of use on their own


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"llama_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
