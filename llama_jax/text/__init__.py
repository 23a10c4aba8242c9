"""Tokenizers and chat formats: text to ids and back, without JAX."""
