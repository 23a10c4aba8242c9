"""Conversions with tokenizers that a format cannot say: what it can is exact, what it cannot is said, weights pass."""

import json

import pytest
import sentencepiece
import tokenizers
from gguf import GGUFReader
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.save import convert
from tests.builders import slow, tiny_config, write_hf
from tests.text.helpers import random_texts, write_folder
from tests.text.test_export import sentencepiece_model

LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}


def byte_tokenizer(normalizer=None) -> bytes:
    """All bytes, no merges, and Llama 3's kind of special tokens."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"]
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[(names[0], 256)])
    return backend.to_str().encode()


def checkpoint(folder, files, rows):
    write_hf(folder, tiny_config(vocab_size=rows))
    return write_folder(folder, files)


def test_no_merges(tmp_path):
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    hf = checkpoint(tmp_path / "hf", {"tokenizer.json": byte_tokenizer(), "tokenizer_config.json": config}, 260)
    assert convert(hf, tmp_path / "x.gguf", to="gguf").warnings == []
    expected = tokenizers.Tokenizer.from_buffer(byte_tokenizer())
    tokenizer = open_checkpoint(tmp_path / "x.gguf").tokenizer
    for text in random_texts(50, seed=41):
        assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [slow("bpe"), "unigram"])
def test_a_right_tokenizer_of_another_kind(kind, tmp_path):
    """OpenLLaMA's kind: SentencePiece's own normalization, and its own removal of spaces."""
    model = sentencepiece_model(model_type=kind)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    folder = checkpoint(tmp_path / "it", {"tokenizer.model": model, "tokenizer_config.json": LLAMA2}, sp.vocab_size())
    for to in ("hf", "meta", "gguf"):
        report = convert(folder, tmp_path / to, to=to)
        tokenizer = open_checkpoint(tmp_path / to).tokenizer
        for text in [*random_texts(100, seed=42), "ﬁ Ⅷ ① ｶﾞ  Å   x "]:
            if not any(name in text for name in ("<s>", "</s>", "<unk>")):
                assert tokenizer.encode(text) == sp.encode(text), (to, text)
        words = {"hf": "only tokenizer.model", "gguf": "llama.cpp does not read precompiled_charsmap and remove_extra"}
        if to in words and (to, kind) != ("gguf", "unigram"):  # llama.cpp reads them of a unigram model
            assert words[to] in report.warnings[0]
        else:
            assert not any("tokenizer" in warning for warning in report.warnings)
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == model
    field = GGUFReader(tmp_path / "gguf").fields["tokenizer.ggml.precompiled_charsmap"]
    assert bytes(field.contents()) in model


def test_weights_pass_without_their_tokenizer(tmp_path):
    """llama.cpp has no name for this tokenizer: the file has none, and a warning says so."""
    files = {"tokenizer.json": byte_tokenizer(normalizers.Lowercase()), "tokenizer_config.json": {}}
    hf = checkpoint(tmp_path / "hf", files, 260)
    report = convert(hf, tmp_path / "x.gguf", to="gguf")
    assert (
        "the tokenizer was left out, the file holds only weights: tokenizer.json has normalizer" in report.warnings[0]
    )
    assert open_checkpoint(tmp_path / "x.gguf").tokenizer is None
    for to in ("hf", "meta"):
        convert(hf, tmp_path / f"to {to}", to=to)
        assert (tmp_path / f"to {to}" / "tokenizer.json").read_bytes() == files["tokenizer.json"]


def test_more_rows_than_tokens(tmp_path):
    """Padding adds no text in any format, and no format calls the tokenizer another one."""
    model = sentencepiece_model(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    folder = checkpoint(tmp_path / "it", {"tokenizer.model": model, "tokenizer_config.json": LLAMA2}, size + 12)
    for to in ("gguf", "hf", "meta"):
        report = convert(folder, tmp_path / to, to=to)
        assert not any("tokenizer" in warning for warning in report.warnings)
        assert open_checkpoint(tmp_path / to).tokenizer.vocab_size == size
    words = folder / "added_tokens.json"
    words.write_text(json.dumps({"<word>": size + 2, "[EXTRA]": size + 12}))
    report = convert(folder, tmp_path / "word.gguf", to="gguf")  # the last one has no row
    tokenizer = open_checkpoint(tmp_path / "word.gguf").tokenizer
    assert tokenizer.decode(tokenizer.encode("a<word>b")) == open_checkpoint(folder).tokenizer.decode(
        open_checkpoint(folder).tokenizer.encode("a<word>b")
    )
    assert size + 2 in tokenizer.encode("a<word>b")


def test_a_chat_template_that_was_made_is_said(tmp_path):
    """Files without any template, such as Meta's, tell no base model from one that chats."""
    model = sentencepiece_model(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    folder = checkpoint(tmp_path / "it", {"tokenizer.model": model}, size)
    for to in ("hf", "gguf"):
        assert "the source has no chat template" in convert(folder, tmp_path / to, to=to).warnings[0]
        assert open_checkpoint(tmp_path / to).tokenizer.chat_template is not None
