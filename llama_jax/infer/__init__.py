"""Running a model: sampling, prefill and decode, conversations."""
