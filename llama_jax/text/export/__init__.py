"""A checkpoint's tokenizer in the spelling of another format, with the same ids.

*Tokenizer files* are a mapping of file name to content: Hugging Face's files, and Meta's `tokenizer.model`.
transformers wants a `tokenizer.json`, Meta's code a `tokenizer.model`, llama.cpp metadata in the GGUF file."""

from llama_jax.text.export.gguf import gguf_metadata, gguf_warnings
from llama_jax.text.export.hf import hf_files, hf_files_from_gguf, hf_warnings, with_named_ids
from llama_jax.text.export.meta import meta_files

__all__ = [
    "gguf_metadata",
    "gguf_warnings",
    "hf_files",
    "hf_files_from_gguf",
    "hf_warnings",
    "meta_files",
    "with_named_ids",
]
