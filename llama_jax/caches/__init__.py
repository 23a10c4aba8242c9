"""Caches of keys and values: the protocol, and one kind a file."""

from llama_jax.caches.base import KVCache, LayerCache, grow, insert_row, layers_of, nbytes, num_slots, rewind

__all__ = ["KVCache", "LayerCache", "grow", "insert_row", "layers_of", "nbytes", "num_slots", "rewind"]
