"""Training: the loss, and what will use it."""
