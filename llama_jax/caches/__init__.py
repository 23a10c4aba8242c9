"""Caches of keys and values, one kind a file."""
