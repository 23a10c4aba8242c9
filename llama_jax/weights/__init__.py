"""Checkpoints: reading, writing, converting and fetching the weights of every format."""
