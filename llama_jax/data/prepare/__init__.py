"""From text to corpora on disk."""
