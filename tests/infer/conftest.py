"""The real model, loaded once for all tests of a run."""

import pytest

import llama_jax


@pytest.fixture(scope="session")
def smollm2() -> llama_jax.LoadedLlama:
    return llama_jax.load("smollm2-135m-instruct", mesh="tensor=1")
