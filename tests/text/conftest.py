import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llama_jax.text.open import load_tokenizer, tokenizer_from_gguf
from llama_jax.weights.gguf_file import read_gguf
from tests.material import llama3_tokenizer, smollm2_gguf
from tests.text.helpers import CORPUS, llama3_merges, llama3_vocabulary, load, sp_backend, write_folder


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    return read_gguf(smollm2_gguf()).metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata) -> Any:
    return tokenizer_from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def llama3() -> Any:
    return load_tokenizer(llama3_tokenizer().parent)


@pytest.fixture(scope="session")
def llama3_parts(llama3) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    vocabulary = llama3_vocabulary()
    names = {i: name for name, i in reversed(llama3.control_tokens.items())}
    return vocabulary, llama3_merges(vocabulary), {names[i]: i for i in sorted(names)}


@pytest.fixture(scope="session")
def llama3_folder(llama3_parts, tmp_path_factory) -> Path:
    """The vocabulary of Llama 3 as a Hugging Face folder."""
    vocabulary, merges, control = llama3_parts
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    regex = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(regex, "isolated"), byte_level])
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    hf.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128_000)]
    )
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    folder = tmp_path_factory.mktemp("llama3")
    hf.save(str(folder / "tokenizer.json"))
    generation = {"eos_token_id": [128_001, 128_008, 128_009]}
    return write_folder(folder, {"tokenizer_config.json": config, "generation_config.json": generation})


@pytest.fixture(scope="session")
def sp_model() -> bytes:
    """A small SentencePiece model trained with LLaMA's settings, and Code Llama's extra pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def sp(sp_model) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=sp_model)


@pytest.fixture(scope="session")
def sp_tokenizer(sp_model, tmp_path_factory) -> Any:
    return load(write_folder(tmp_path_factory.mktemp("sp"), {"tokenizer.model": sp_model}))


@pytest.fixture(scope="session")
def sp_metadata(sp) -> dict[str, Any]:
    size = range(sp.vocab_size())
    kinds = [(sp.is_unknown, 2), (sp.is_control, 3), (sp.is_byte, 6), (lambda i: 3 <= i < 8, 4)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in size],
        "tokenizer.ggml.token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in size],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def sp_folders(sp, tmp_path_factory) -> dict[str, Path]:
    """The model as Hugging Face folders, in both of the forms that Llama 2 checkpoints have."""
    folders = {}
    for name in ("legacy", "metaspace"):
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        folders[name] = write_folder(tmp_path_factory.mktemp(name), {"tokenizer_config.json": config})
        sp_backend(sp, legacy=name == "legacy").save(str(folders[name] / "tokenizer.json"))
    return folders
