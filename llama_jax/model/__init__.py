"""The model: `Llama` and its parts, as Flax modules."""

from llama_jax.model.llama import Llama, flatten_heads, random_keys

__all__ = ["Llama", "flatten_heads", "random_keys"]
