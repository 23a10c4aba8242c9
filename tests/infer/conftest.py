"""The real model, loaded once for all tests of a run."""

import pytest

import llama_jax
from tests.builders import one_device


@pytest.fixture(scope="session")
def smollm2() -> llama_jax.LoadedLlama:
    """On one device, with one size of cache for every call: tests share its compiled programs."""
    return llama_jax.load("smollm2-135m-instruct", mesh=one_device(), max_seq_len=256)
