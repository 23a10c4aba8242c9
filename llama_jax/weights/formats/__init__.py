"""The formats of checkpoints, one object each: the only place that knows them all."""

from __future__ import annotations

from llama_jax.weights.formats.base import FormatObject
from llama_jax.weights.formats.gguf import GGUF
from llama_jax.weights.formats.hf import HF
from llama_jax.weights.formats.meta import META
from llama_jax.weights.formats.native import NATIVE

# In the order in which a folder is asked: one that holds several is the first of them.
FORMATS: dict[str, FormatObject] = {format.name: format for format in (NATIVE, META, HF, GGUF)}
