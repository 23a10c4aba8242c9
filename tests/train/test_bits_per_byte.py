"""Bits a byte: the bytes that count are those of the tokens that are predicted, as SentencePiece itself says."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import jax
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama_jax.data.corpus import open_corpus
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.train_tokenizer import train_tokenizer
from llama_jax.data.rows.loader import RowReader
from llama_jax.data.rows.plan import SequentialPlan
from llama_jax.train.objective import Pretrain
from llama_jax.train.validation import Validator
from tests.builders import tiny_config
from tests.data.test_prepare import make_texts, write_lines
from tests.infer.helpers import random_llama
from tests.train.corpora import write_corpus

VOCAB = 384
ROUNDING = 1e-5  # sums of a thousand float32 losses, in an order that the compiler chooses; one byte more is 1e-3
TEXTS = [
    "a", "b", "", " ", "  two spaces", "é", "🦙 and more", "ünder", "plain words here", "\n", "naïve " * 40, "x" * 90,
    *make_texts(3),
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(make_texts(50), VOCAB))
    return folder


@pytest.fixture(scope="module")
def uniform():
    """A model whose logits are all 0: each token costs log2 of the vocabulary, in bits."""
    llama = random_llama(tiny_config(vocab_size=VOCAB, num_layers=1), stacked=True)
    llama.model.lm_head.set_value(jax.numpy.zeros_like(llama.model.lm_head.get_value()))
    return llama


def measured(llama, *corpora, documents=0) -> dict[str, float]:
    return Validator(corpora, objective=Pretrain(), seq_len=32, documents=documents, mesh=llama.mesh)(llama.model)


@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece(tmp_path, vocabulary, uniform, bos):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(make_request([path], tokenizer=vocabulary, bos=bos), tmp_path / "corpus", workers=0)
    sp, pairs, nbytes = SentencePieceProcessor(model_file=str(vocabulary / "tokenizer.model")), 0, 0
    for text in filter(None, TEXTS):
        pieces = sp.encode(text, out_type=str)
        assert pieces[0].startswith("▁")  # of which SentencePiece adds one, which is not in the text
        first = 0 if bos else len(pieces[0][1:].replace("▁", " ").encode())
        pairs += len(pieces) + bos  # and EOS
        nbytes += len(text.encode()) - first
    found = measured(uniform, open_corpus(tmp_path / "corpus"))
    assert found["validation_loss"] == pytest.approx(math.log(VOCAB), rel=ROUNDING)
    assert found["validation_bits_per_byte"] == pytest.approx(pairs * math.log2(VOCAB) / nbytes, rel=ROUNDING)


def test_by_hand(tmp_path, uniform):
    """Of "a" and "b" nothing but the end is predicted."""
    (tmp_path / "tokenizer").mkdir()
    model = train_tokenizer([*make_texts(50), "a b " * 9999], VOCAB)
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(model)
    vocabulary = tmp_path / "tokenizer"
    for name, texts in (("none", ["a", "b"]), ("some", ["a", "ab", "12"])):
        path = write_lines(tmp_path / f"{name}.jsonl", texts)
        prepare(make_request([path], tokenizer=vocabulary, bos=False), tmp_path / name, workers=0)
    none, some = open_corpus(tmp_path / "none"), open_corpus(tmp_path / "some")
    assert [len(ids) for ids in none.read([0, 1])] == [2, 2]  # a letter and EOS
    assert measured(uniform, none).keys() == {"validation_loss"}
    # "12": the space, 1, 2 (digits stand alone), so both bytes are predicted.
    first = [some.tokenizer().decode(ids[:1]) for ids in some.read(range(3))]
    assert (first[0], first[2]) == ("a", "")
    nbytes = 2 + len("ab") - len(first[1])
    pairs = sum(len(ids) - 1 for ids in some.read(range(3)))
    expected = pairs * math.log2(VOCAB) / nbytes
    assert measured(uniform, some)["validation_bits_per_byte"] == pytest.approx(expected, rel=ROUNDING)
    both = measured(uniform, none, some)
    assert both["validation_bits_per_byte"] == pytest.approx((2 + pairs) * math.log2(VOCAB) / nbytes, rel=ROUNDING)
    assert both["validation_bits_per_byte/some"] == pytest.approx(expected, rel=ROUNDING)


def test_the_bytes_of_the_targets_that_have_a_loss(tmp_path):
    """Tokens that are bytes, documents cut across rows: the count over the loader's own arrays."""
    llama = random_llama(tiny_config(num_layers=1), stacked=True)
    lengths = (1, 2, 3, 31, 32, 33, 34, 64, 65, 66, 200)
    corpus = open_corpus(write_corpus(tmp_path / "corpus", [[7] * n for n in lengths]))
    plan = SequentialPlan(corpus, seq_len=32)
    predicted = int((RowReader(plan)(range(len(plan)))["segment_ids"] > 0).sum())
    assert predicted == sum(lengths) - len(lengths)
    found = measured(llama, corpus)  # a byte each, of which as many are predicted
    assert found["validation_bits_per_byte"] == pytest.approx(found["validation_loss"] / math.log(2), rel=ROUNDING)


def test_an_unknown_first_token(tmp_path, uniform):
    """Without bytes to fall back on, é is the unknown token, whatever it spells: é has two bytes."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd xyz x y z"] * 20), model_writer=model, vocab_size=20, model_type="bpe",
        add_dummy_prefix=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(model.getvalue())
    path = write_lines(tmp_path / "a.jsonl", ["éa", "aé"])
    prepare(make_request([path], tokenizer=tmp_path / "tokenizer", bos=False), tmp_path / "corpus", workers=0)
    corpus = open_corpus(tmp_path / "corpus")
    assert [ids[0] == 0 for ids in corpus.read([0, 1])] == [True, False]
    pairs = sum(len(ids) - 1 for ids in corpus.read([0, 1]))
    found = measured(uniform, corpus)["validation_bits_per_byte"]
    assert found == pytest.approx(pairs * math.log2(VOCAB) / (1 + 2), rel=ROUNDING)
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text())["bytes"] == 6


def test_a_space_that_a_byte_level_tokenizer_adds(tmp_path, uniform):
    """By add_prefix_space the first token has a space that no text has: of "ab", " a" and "b", b is predicted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Ġa", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    path = write_lines(tmp_path / "a.jsonl", ["ab", "b", "a é"])
    prepare(make_request([path], tokenizer=tmp_path / "tokenizer", bos=False), tmp_path / "corpus", workers=0)
    corpus = open_corpus(tmp_path / "corpus")
    spelt = [[tokenizer.id_to_token(int(i)) for i in ids] for ids in corpus.read(range(3))]
    assert spelt == [[*tokens, "<|endoftext|>"] for tokens in (["Ġa", "b"], ["Ġ", "b"], ["Ġa", "Ġ", "Ã", "©"])]
    found = measured(uniform, corpus)["validation_bits_per_byte"]
    assert found == pytest.approx((2 + 2 + 4) * math.log2(VOCAB) / (1 + 1 + 3), rel=ROUNDING)
