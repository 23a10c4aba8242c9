"""Checkpoints in: what lies on disk, under whose names, and how it reaches the devices."""
