import re

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from llama_jax.text.open import load_tokenizer, tokenizer_from_gguf
from tests.text.helpers import CORPUS, load, random_texts, smollm2_oracle, write_folder

LLAMA3_GOLDEN = {
    "Hello world": [9906, 1917],
    " Hello": [22691],
    "\n\n": [271],
    "The capital of France is": [791, 6864, 315, 9822, 374],
    "1234567": [4513, 10961, 22],
    "你好🦙": [57668, 53901, 9468, 99, 247],
    "I'm we'LL": [40, 2846, 584, 6, 4178],
    "a\tb  c\n\n d": [64, 2282, 220, 272, 271, 294],
    "system": [9125],
    "user": [882],
    "assistant": [78191],
    "ipython": [23799, 4690],
    " việc": [100769],  # one of 588 tokens that no sequence of merges reaches
    "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29],
}


def test_llama3_golden_ids(llama3):
    for text, ids in LLAMA3_GOLDEN.items():
        assert llama3.encode(text) == ids
        assert llama3.decode(ids) == text
    assert llama3.encode("This is a test sentence.", bos=True) == [128000, 2028, 374, 264, 1296, 11914, 13]
    assert llama3.encode("a<|eot_id|>b", control=True) == [64, 128009, 65]
    assert (llama3.vocab_size, llama3.bos_id, llama3.add_bos) == (128256, 128000, True)
    assert llama3.stop_ids == (128001, 128008, 128009)
    names = {
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|step_id|>": 128005,
    }
    names |= {"<|python_tag|>": 128010, "<|reserved_special_token_247|>": 128255, "<|image|>": 128011}
    assert names.items() <= llama3.control_tokens.items()


@pytest.mark.timing
def test_llama3_long_input_is_fast_and_whole(llama3, within):
    for text in ("a" * 60_000, " " * 60_000 + "x", "word " * 100_000):
        with within(5):
            ids = llama3.encode(text)
        assert llama3.decode(ids) == text
    assert llama3.encode("x" * 25_000 + "yz") == llama3.encode("x" * 25_000) + llama3.encode("yz")


def test_llama3_is_the_same_as_tokenizer_json_and_gguf(llama3, llama3_folder, llama3_parts):
    vocabulary, merges, control = llama3_parts
    hf = load(llama3_folder)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*vocabulary, *control],
        "tokenizer.ggml.token_type": [1] * 128_000 + [3] * 256,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128001,
    }
    gguf = tokenizer_from_gguf(metadata)
    for other in (hf, gguf):
        for text in [*LLAMA3_GOLDEN, *random_texts(3000, seed=1)]:
            ids = llama3.encode(text)
            assert other.encode(text) == ids, text
            assert other.decode(ids) == text
        assert (other.bos_id, other.add_bos, other.stop_ids) == (128000, True, (128001, 128008, 128009))
        assert other.vocab_size == 128256


def test_sentencepiece_is_the_library(sp, sp_tokenizer, sp_metadata):
    gguf = tokenizer_from_gguf(sp_metadata)
    control = set(sp_tokenizer.control_tokens.values())
    for text in random_texts(10_000, seed=2):
        ids = sp.encode(text)
        if not control.isdisjoint(ids):
            continue
        for tokenizer in (sp_tokenizer, gguf):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == sp.decode(ids) == text.replace("▁", " ")
    for tokenizer in (sp_tokenizer, gguf):
        assert tokenizer.control_tokens["<s>"] == 1
        assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.encode("")) == (1, True, [])
        assert tokenizer.stop_ids[0] == 2
        hello = sp.encode("Hello")
        assert tokenizer.decode([1, *hello, 2, 1, *hello]) == "Hello Hello"


def test_sentencepiece_without_prefix_in_gguf(sp_metadata):
    tokenizer = tokenizer_from_gguf(sp_metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("the")[0] != tokenizer.encode(" the")[0]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


@pytest.mark.parametrize("form", ["legacy", "metaspace"])
def test_sentencepiece_as_tokenizer_json(sp, sp_folders, form):
    sp_folder = sp_folders[form]
    tokenizer = load(sp_folder)
    oracle = tokenizers.Tokenizer.from_file(str(sp_folder / "tokenizer.json"))
    plain = set(range(8, sp.vocab_size()))
    for text in random_texts(3000, seed=3):
        ids = sp.encode(text)
        # Metaspace puts no prefix before a text that starts with a space: " a" is "a" to it.
        same = form == "legacy" or text[0] not in " ▁"
        if same and "▁" not in text and plain.issuperset(ids):
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == text
        with_control = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, control=True) == with_control, text
        if not re.search(r"(^|>)[ ▁]+<s>", text):  # the prefix is lost between a control token and " <s>"
            assert tokenizer.encode_parts(tokenizer.split_control(text)) == with_control, text
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.vocab_size) == (1, True, sp.vocab_size())
    assert 2 in tokenizer.stop_ids


def test_code_llama_infill(sp, sp_tokenizer):
    pre, suf, mid = (sp.piece_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID"))
    before, after = (
        sp.encode("def f"),
        sp.encode("\n  return")[1:],
    )  # a newline is a byte piece, the prefix a piece
    assert sp_tokenizer.infill_prompt("def f", "\n  return") == [1, pre, *before, suf, *after, mid]
    spm = [1, pre, suf, *after, mid, *before]
    assert sp_tokenizer.infill_prompt("def f", "\n  return", suffix_first=True) == spm


def test_infill_needs_its_tokens(llama3):
    with pytest.raises(ValueError, match="no infill tokens"):
        llama3.infill_prompt("a", "b")


def test_smollm2_is_transformers(smollm2, smollm2_metadata):
    oracle = smollm2_oracle(smollm2_metadata)
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    for text in [*CORPUS.splitlines(), *random_texts(1000, seed=4)]:
        ids = oracle.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert smollm2.encode(text) == ids, text
        assert smollm2.decode(ids) == oracle.decode(ids)
        assert smollm2.encode(text, control=True) == oracle.encode(text, add_special_tokens=False)
    assert (smollm2.bos_id, smollm2.add_bos, smollm2.stop_ids, smollm2.vocab_size) == (
        1,
        False,
        (0, 2),
        49152,
    )


@pytest.mark.timing
def test_smollm2_builds_fast(smollm2_metadata, within):
    with within(2):  # 0.16 s on two cores
        tokenizer_from_gguf(smollm2_metadata)


def test_added_tokens_that_are_text_stay_text(tmp_path):
    """A run of spaces with an id of its own is text; `<|...|>` is a control token whatever its flag says."""
    hf = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abĠ<|imend>_")}, merges=[]))
    hf.pre_tokenizer, hf.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    hf.add_tokens([AddedToken("    ", special=False), AddedToken("<|im_end|>", special=False)])
    hf.add_special_tokens([AddedToken("<a>", special=True, rstrip=True, lstrip=True)])
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    spaces, end, a = (hf.token_to_id(text) for text in ("    ", "<|im_end|>", "<a>"))
    text = "a    b<|im_end|> <a>  b"
    assert tokenizer.encode(text, control=True) == hf.encode(text).ids
    assert {end, a}.isdisjoint(tokenizer.encode(text))
    assert spaces in tokenizer.encode(text)
    assert tokenizer.decode(hf.encode(text).ids) == "a    bb"
    assert tokenizer.control_tokens == {"<|im_end|>": end, "<a>": a}


def test_every_pre_tokenizer_of_gguf_splits_as_llama_cpp(smollm2_metadata):
    text = "abc 12345  don't!!\n\n x"
    split = {
        "gpt-2": ["abc", " 12345", " ", " don", "'t", "!!", "\n\n", " x"],
        "smollm": ["abc", " ", "1", "2", "3", "4", "5", " ", " don", "'t", "!!", "\n\n", " x"],
        "llama-bpe": ["abc", " ", "123", "45", " ", " don", "'t", "!!\n\n", " x"],
        "qwen2": ["abc", " ", "1", "2", "3", "4", "5", " ", " don", "'t", "!!\n\n", " x"],
        "default": ["abc", " ", "123", "45", " ", " don", "'", "t", "!!", "\n\n", " x"],
    }
    # A pre-token merged on its own: no pre-tokenizer to split it.
    merge = smollm2_oracle(smollm2_metadata).backend_tokenizer
    merge.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for pre, words in split.items():
        tokenizer = tokenizer_from_gguf(smollm2_metadata | {"tokenizer.ggml.pre": pre})
        assert tokenizer.encode(text) == [i for word in words for i in merge.encode(word).ids], pre


def test_folder_without_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    assert tokenizer_from_gguf({}) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json is not a readable"),
        ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}, "merges": []}}}, "decoder"),
        ({"tokenizer.model": b"\x00garbage"}, "neither a SentencePiece model nor a tiktoken file"),
        ({"tokenizer.model": b""}, "neither"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "has 2 ranks"),
        ({"tokenizer.model": b"IQ== 0\nI=== 1\n"}, "damaged"),
        (
            {"tokenizer.model": b"IQ== 0\n", "tokenizer_config.json": "[]"},
            "tokenizer_config.json holds a list",
        ),
        ({"tokenizer.model": b"IQ== 0\n", "config.json": "{"}, "config.json is not valid JSON"),
        *(
            ({"tokenizer.model": b"IQ== 0\n", name: {"eos_token_id": value}}, f"{name}: eos_token_id must be")
            for name in ("config.json", "generation_config.json")
            for value in ("2", [1, None], -1, True, 1.0, {}, 2**31)
        ),
        *(
            ({"tokenizer.model": b"IQ== 0\n", name: {"chat_template": value}}, f"{name}: chat_template must be")
            for name in ("tokenizer_config.json", "chat_template.json")
            for value in (5, False, {"default": 5}, ["x"], [{"name": "default"}], [{"name": "a", "template": None}])
        ),
    ],
)
def test_damaged_folders(tmp_path, files, message):
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "kimi-k2"}, "'kimi-k2' is not supported: a.x-4.0, bailingmoe"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["no such"]}, "tokenizer.ggml.merges do not fit"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries, not 49152"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id must be the id of a token, got ['x']"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template must be a text, got 5"),
    ],
)
def test_damaged_gguf(smollm2_metadata, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer_from_gguf(smollm2_metadata | change)


def test_bad_ids_and_surrogates(smollm2, llama3, sp_tokenizer):
    for tokenizer in (smollm2, llama3, sp_tokenizer):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"token id {bad} is outside"):
                tokenizer.decode([bad])
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
