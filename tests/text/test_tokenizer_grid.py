"""Every key of a tokenizer's files, for every kind of vocabulary: the ids and texts of transformers.

The differences that are by design are the functions below, one each; `docs/tokenizers.md` has their reasons.
"""

import json
import random

import pytest
from transformers import AutoTokenizer

from llama_jax.text.added import _TURN_TOKENS
from llama_jax.text.differences import differences
from llama_jax.text.export import gguf_metadata, hf_files, with_named_ids
from llama_jax.text.open import read_files, tokenizer_from_files, tokenizer_from_gguf
from llama_jax.text.samples import sample_texts
from tests.text import makers
from tests.text.helpers import load, random_texts, write_folder

SPELLED = ["hyperloop", "<tool_call>", "</think>", "xy", "ab  ", "Fox", "<sep>", "<x>", "<y>", "<image>", "[PAD]"]
SPELLED += ["<|im_start|>", "<|im_end|>", "<|think|>", "<|turn|>", "<|tool|>", "<s>", "</s>", "<unk>", "<pad>"]
SPELLED += ["<|begin_of_text|>", "<|eot_id|>", "<c>", "[MASK]", "naïve"]


def texts() -> list[str]:
    """Two hundred: words and control strings among spaces, random ones, and samples of many scripts."""
    rng = random.Random(0)
    spaces = ("", " ", "  ", "\n", "a", " b ")
    added = ["".join(rng.choice(spaces) + rng.choice(SPELLED) for _ in range(3)) + " end" for _ in range(60)]
    single = [form.format(word) for word in SPELLED for form in ("{}", "a {} b", " {}")]
    return ["", " ", *added, *single, *random_texts(40, seed=5), *random.Random(1).sample(sample_texts(), 40)]


TEXTS = texts()


def oracle(name, folder):
    """transformers' own tokenizer of the folder, with neither padding nor truncation."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if name.startswith("tiktoken"):  # transformers knows no names of Llama 3's control tokens: from tokenizer.json
        files["tokenizer.json"] = makers.tiktoken_as_json()
        del files["tokenizer.model"]
    hf = AutoTokenizer.from_pretrained(write_folder(folder.with_name(f"{folder.name} oracle"), files))
    hf.backend_tokenizer.no_padding()
    hf.backend_tokenizer.no_truncation()
    return hf


def typed_control_stays_text(ours, text):
    """Text never becomes a control token; transformers makes one of it."""
    return any(name.strip("▁ ") in text for name in ours.control_tokens)


def turn_markers_are_hidden(ours, ids):
    """Whatever their flags, the markers that begin and end turns are not shown; nor compared is `<unk>`, see below."""
    hidden = {i for name, i in ours.control_tokens.items() if name in _TURN_TOKENS}
    return [i for i in ids if i not in hidden]


def unknown_is_shown(ours, ids, unk):
    """SentencePiece shows the unknown token as " ⁇ ", and so do we for a tokenizer.model; transformers hides it."""
    assert ours.token_bytes(unk) == " ⁇ ".encode()
    return [i for i in ids if i != unk]


def letters_are_not_bytes(ours, ids, name):
    """In a byte-level vocabulary, transformers shows the letters of an added word as if each were a byte."""
    word = next((token.id for token in ours.added_tokens if token.content == "naïve"), None)
    if word is None or not name.startswith(("byte-level", "tiktoken")):
        return ids
    assert ours.decode([word]) == "naïve"
    return [i for i in ids if i != word]


def a_space_has_a_space_before_it(name, text):
    """`legacy: false`: a first space has SentencePiece's before it, as in transformers 4; in version 5 it is that."""
    return f" {text}" if "SentencePiece" in name and '"legacy": false' in name and text[:1] in (" ", "▁") else text


def is_sentencepieces_own(name, text):
    """Line ends of Windows, and a ▁ in the text, are normalized by SentencePiece in its own way."""
    return ("nmt_nfkc" in name or "extra whitespace" in name) and ("\r\n" in text or "▁" in text)


def bos_of_a_model(name, config):
    """A tokenizer.model puts BOS before a prompt unless told otherwise (Meta, transformers 4); version 5 if told to."""
    return config.get("add_bos_token") is None and name.startswith(("SentencePiece", "tiktoken"))


def test_ids_and_texts_are_those_of_transformers(tmp_path):
    count = 0
    for name, folder in makers.grid(tmp_path):
        hf, ours = oracle(name, folder), load(folder)
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        control = frozenset(ours.control_tokens.values()) - {hf.unk_token_id}
        for text in TEXTS:
            if is_sentencepieces_own(name, text):
                continue
            ids = hf.encode(a_space_has_a_space_before_it(name, text), add_special_tokens=False)
            assert ours.encode(text, control=True) == ids, (name, text)
            typed = ours.encode(text)
            assert control.isdisjoint(typed), (name, text)
            assert typed_control_stays_text(ours, text) or typed == ids, (name, text)
            ids = letters_are_not_bytes(ours, turn_markers_are_hidden(ours, ids), name)
            if "SentencePiece" in name:
                ids = unknown_is_shown(ours, ids, hf.unk_token_id)
            assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True), (name, text)
        # transformers 5 appends EOS where add_eos_token says so; a prompt of ours does not end before the reply.
        prompt = [i for i in hf.encode("a b") if i != hf.eos_token_id]
        if not bos_of_a_model(name, config):
            assert ours.encode("a b", bos=ours.add_bos) == prompt, name
        assert ours.add_bos or not bos_of_a_model(name, config)
        assert (ours.bos_id, hf.eos_token_id in ours.stop_ids) == (hf.bos_token_id, True), name
        assert ours.vocab_size == len(hf), name
        count += 1
    assert count >= 60


@pytest.mark.slow
def test_converted_tokenizers_give_the_same_ids_or_it_is_said(tmp_path):
    """As `tokenizer.json` and in GGUF; the ids that are the same are transformers', by the test above."""
    exact = 0
    for name, folder in makers.grid(tmp_path):
        if name.startswith("tiktoken") and name != "tiktoken, words":  # 5 seconds each: one stands for them
            continue
        ours = load(folder)
        files = with_named_ids(read_files(folder), ours)
        as_gguf = tokenizer_from_gguf(gguf_metadata(files, ours.vocab_size))
        for converted in (tokenizer_from_files(hf_files(files)), as_gguf):
            assert (converted.vocab_size, converted.bos_id) == (ours.vocab_size, ours.bos_id), name
            assert set(ours.stop_ids) <= set(converted.stop_ids), name
            same = all(converted.encode(text, control=True) == ours.encode(text, control=True) for text in TEXTS)
            assert same or differences(ours, converted), name
            exact += same
    assert exact >= 110, exact
