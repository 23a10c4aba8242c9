"""Training data: from text to prepared corpora, and from these to the rows of a run."""
