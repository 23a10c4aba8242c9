"""Plans: whether a step fits on a machine that is not there, and how fast it could be."""
