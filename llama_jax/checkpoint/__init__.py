"""Checkpoints on disk, by Orbax; only this package imports it."""
