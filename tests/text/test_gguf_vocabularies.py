"""GGUF vocabularies against llama.cpp 0.5.0 (its answers stand here as constants), tokenizers and sentencepiece."""

import hashlib
import json

import pytest
import sentencepiece
import tokenizers
from gguf.constants import Keys
from tokenizers import Regex, models, pre_tokenizers

from llama_jax.text import export
from llama_jax.text.gguf import COMPUTED, NEUTRAL, tokenizer_from_gguf
from llama_jax.text.pre_tokenizers import PRE_TOKENIZERS
from tests.text import gguf_material, pre_tokenizer_material
from tests.text.helpers import load, random_texts, write_folder
from tests.text.test_export import sentencepiece_model

# sha256 of llama.cpp's ids of all texts -> the names that split alike.
LLAMA_CPP = {
    "01c7020a1c71": "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 minicpm5",
    "d3b05e32a747": "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "a065ff1cd726": "gpt-2 mpt olmo jais trillion granite-docling phi-2 gigachat a.x-4.0 mellum exaone4",
    "cc73b1710329": "qwen2 stablelm2 hunyuan megrez deepseek-r1-qwen kormo solar-open grok-2 qwen35"
    " bailingmoe bailingmoe2 llada-moe ufakzeka",
    "431e6c6a6816": "smaug-bpe dbrx chatglm-bpe jais-2",
    "9a64e9e03024": "tekken",
    "5984f1cf0773": "llama4 gpt-4o kanana2 talkie minimax-m2",
    "6e30a86314ae": "deepseek-llm",
    "a785fa13fa73": "deepseek-coder",
    "6f4d91e3f276": "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    "8c6fee3583cd": "falcon",
    "aeddbb3053ac": "poro-chat bloom gpt3-finnish",
    "5a7ade858eca": "viking",
    "e6e2e4e97d5c": "chameleon",
    "e90f05650792": "superbpe",
    "b87e3ac3364f": "seed-coder",
    "1f34c29cb307": "exaone-moe",
    "3ec8fc9e0caf": "laguna",
    "b50cf0f02749": "default",
}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex: str, behavior: str = "isolated", *, invert: bool = False):
    return pre_tokenizers.Split(Regex(regex), behavior, invert)


# As the models' own tokenizer.json has it: some with parts that are no regexes.
PUBLISHED = {
    "llama-bpe": [split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), BYTES],
    "qwen2": [split(QWEN), BYTES],
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "tekken": [split(CASED), BYTES],
    "deepseek-coder": [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[一-龥ࠀ-一가-\ud7ff]+"),
        pre_tokenizers.Digits(individual_digits=True),
        BYTES,
    ],
    "viking": [split(" ?[^(\\s|.,!?…。，、।۔،)]+"), pre_tokenizers.Digits(individual_digits=True), BYTES],
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pre_tokenizer_material.texts()


@pytest.mark.parametrize("digest", LLAMA_CPP)
def test_pre_tokenizers_give_llama_cpps_ids(digest, texts):
    for pre in LLAMA_CPP[digest].split():
        tokenizer = tokenizer_from_gguf(pre_tokenizer_material.metadata(pre))
        told = [t for t in texts if t.isascii()] if pre in pre_tokenizer_material.ASCII else texts
        ids = json.dumps([tokenizer.encode(text) for text in told])
        assert hashlib.sha256(ids.encode()).hexdigest()[:12] == digest, pre


def test_every_pre_tokenizer_is_checked():
    assert sorted(" ".join(LLAMA_CPP.values()).split()) == sorted(PRE_TOKENIZERS)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_published_pre_tokenizers_and_back(pre, texts):
    """The model's own tokenizer.json becomes a GGUF file of that name, with the library's ids."""
    metadata = pre_tokenizer_material.metadata(pre)
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=PRE_TOKENIZERS[pre].whole_words)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[pre])
    backend.decoder = tokenizers.decoders.ByteLevel()
    written = export.gguf_metadata({"tokenizer.json": backend.to_str().encode()}, len(vocab) + 2)
    assert written["tokenizer.ggml.pre"] == pre
    tokenizer = tokenizer_from_gguf(written)
    for text in [*texts, *random_texts(200, seed=31), "Ng\u0303 e\u0301 क्षत्रिय ÀÉ ǅx"]:
        assert tokenizer.encode(text) == backend.encode(text).ids, text


# llama.cpp's tokens of gguf_material.TEXTS, special ones recognised.
TOKENS = {
    "llama": [
        ["▁", "a", "<word>", "▁the", "▁", "<word>", "▁", "▁the"],
        ["▁the", "  ", "▁the", "<word>", "  ", "▁the"],
        ["▁the", "▁", "<unk2>", "▁", "▁then"],
        ["▁", "a", "<", "/", "x", ">", "the"],
        ["▁", "a", "<|im_end|>", "▁the"],
        ["▁", "u", "n", "u", "s", "e", "d", "▁the"],
        ["▁", "a", "<ctl>", "▁the"],
        ["▁the", "▁then", "▁", "</s>"],
    ],
    "gpt2": [
        ["a", "<word>", "the", "Ġ", "<word>", "Ġthe"],
        ["the", "  ", "the", "<word>", "  ", "the"],
        ["the", "Ġ", "<unk2>", "Ġthe", "n"],
        ["a", "<", "/", "x", ">", "the"],
        ["a", "<|im_end|>", "the"],
        ["u", "n", "u", "s", "e", "d", "Ġthe"],
        ["a", "<ctl>", "the"],
        ["the", "Ġthe", "n", "Ġ", "</s>"],
    ],
}
SHOWN = {"<word>": "<word>", "  ": "  ", "</x>": "</x>"}  # the other odd tokens add no text


@pytest.mark.parametrize("metadata", [gguf_material.sentencepiece(), gguf_material.byte_level()])
def test_types_of_tokens(metadata, tmp_path):
    kind, tokens = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_from_gguf(metadata)
    for text, expected in zip(gguf_material.TEXTS, TOKENS[kind], strict=True):
        assert [tokens[i] for i in tokenizer.encode(text, control=True)] == expected, text
        plain = [tokens[i] for i in tokenizer.encode(text)]
        assert not {"<ctl>", "<unk2>", "</s>", "<|im_end|>", "unused"} & set(plain)
    odd = range(tokens.index("<word>"), tokens.index("<ctl>") + 1)
    assert [tokenizer.token_bytes(i).decode() for i in odd] == [SHOWN.get(tokens[i], "") for i in odd]
    assert tokenizer.stop_ids == (tokens.index("</s>"), tokens.index("<|im_end|>"))
    assert tokenizer.vocab_size == len(tokens) - 3  # the rest are padding, whatever their types
    again = load(write_folder(tmp_path, export.hf_files_from_gguf(metadata)))
    for text in gguf_material.TEXTS:
        if "unused" not in text:
            assert again.encode(text, control=True) == tokenizer.encode(text, control=True), text
    assert (again.vocab_size, again.stop_ids) == (tokenizer.vocab_size, tokenizer.stop_ids)


@pytest.mark.parametrize("metadata", [gguf_material.sentencepiece(), gguf_material.byte_level()])
@pytest.mark.parametrize("outside", [-1, 2**32 - 1, 999])
@pytest.mark.parametrize("role", ["padding", "eos", "bos", "eot"])
def test_ids_that_are_no_tokens_are_left_out(metadata, outside, role):
    key = f"tokenizer.ggml.{role}_token_id"
    with pytest.warns(
        UserWarning, match=f"{key} {outside} is outside the {len(metadata['tokenizer.ggml.tokens'])} tok"
    ):
        tokenizer = tokenizer_from_gguf(metadata | {key: outside})
    assert outside not in tokenizer.stop_ids
    assert tokenizer.encode("the") == tokenizer_from_gguf(metadata).encode("the")


def test_every_end_stops():
    metadata = gguf_material.sentencepiece()
    ends = [2, metadata["tokenizer.ggml.tokens"].index("<ctl>")]
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.eos_token_ids": ends})
    assert set(ends) <= set(tokenizer.stop_ids)
    written = export.gguf_metadata(export.hf_files_from_gguf(metadata), 320, stop_ids=tokenizer.stop_ids)
    assert tokenizer_from_gguf(written).stop_ids == tokenizer.stop_ids


@pytest.mark.parametrize("role", ["padding", "bos", "unknown"])
def test_a_role_makes_no_ordinary_token_special(role):
    """Files name ordinary tokens for what they do not have, such as id 0 for padding."""
    metadata = gguf_material.byte_level()
    letter = metadata["tokenizer.ggml.tokens"].index("a")
    tokenizer = tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{role}_token_id": letter})
    assert tokenizer.encode("a") == [letter]
    assert tokenizer.decode([letter]) == "a"


def test_tokens_of_one_spelling():
    for metadata in (gguf_material.sentencepiece(), gguf_material.byte_level()):
        tokens = list(metadata["tokenizer.ggml.tokens"])
        first, second = tokens.index("</x>"), tokens.index("<ctl>")
        tokens[second] = tokens[first]
        types = list(metadata["tokenizer.ggml.token_type"])
        types[first] = types[second] = 4
        changed = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        with pytest.warns(UserWarning, match=f"'</x>' twice, with ids {first} and {second}: text becomes {second}"):
            tokenizer = tokenizer_from_gguf(changed)
        assert second in tokenizer.encode("a</x>")
        assert tokenizer.decode([first, second]) == "</x></x>"
        tokens[second] = "<ctl>"
        tokens[first] = ""
        tokenizer = tokenizer_from_gguf(changed | {"tokenizer.ggml.tokens": tokens})
        assert tokenizer.decode([first, second]) == "<ctl>"


def test_every_key_is_computed_or_neutral():
    """Every key of the gguf package, so that a new one cannot pass unread."""
    keys = {value for name, value in vars(Keys.Tokenizer).items() if not name.startswith("_")}
    told = {"tokenizer.ggml.add_sep_token", "tokenizer.rwkv.world", "tokenizer.chat_template.{name}"}
    assert keys - told <= COMPUTED | NEUTRAL.keys()
    metadata = gguf_material.byte_level()
    for key in ("tokenizer.ggml.add_sep_token", "tokenizer.rwkv.world", "tokenizer.ggml.suppress_tokens"):
        with pytest.warns(UserWarning, match=f"not known here, left out: {key}"):
            tokenizer_from_gguf(metadata | {key: [1]})
        tokenizer_from_gguf(metadata | {key: False})


def test_templates_by_name():
    named = {"tokenizer.chat_template.rag": "rag", "tokenizer.chat_template.tool_use": "tools"}
    metadata = gguf_material.byte_level() | named | {"tokenizer.chat_templates": ["rag", "tool_use"]}
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.chat_template, tokenizer.tool_template) == (None, "tools")
    files = export.hf_files_from_gguf(metadata)
    written = export.gguf_metadata(files, tokenizer.vocab_size)
    assert {key: written[key] for key in named} == named


def test_a_file_without_pre_tokenizer_is_a_guess():
    metadata = gguf_material.byte_level()
    del metadata["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match=r"has no tokenizer\.ggml\.pre"):
        tokenizer_from_gguf(metadata)


def test_padding_gives_no_text_in_any_format(tmp_path):
    """More rows than tokens; fewer rows than tokens, where those beyond were added."""
    model = sentencepiece_model(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()}
    original = load(write_folder(tmp_path / "original", files))
    for rows in (size + 4, size):
        metadata = export.gguf_metadata(files, rows)
        assert len(metadata["tokenizer.ggml.tokens"]) == rows
        tokenizer = tokenizer_from_gguf(metadata)
        assert tokenizer.vocab_size == original.vocab_size == size
        assert tokenizer.encode("[PAD102] x") == original.encode("[PAD102] x")
    added = files | {"added_tokens.json": json.dumps({"[PAD]": size, "<word>": size + 1}).encode()}
    metadata = export.gguf_metadata(added, size + 1)
    assert metadata["tokenizer.ggml.tokens"][size:] == ["[PAD]"]
    with pytest.raises(ValueError, match=f"the model's embedding only {size - 1} rows"):
        export.gguf_metadata(added, size - 1)


def test_a_byte_tokenizer_without_merges():
    metadata = gguf_material.byte_level() | {"tokenizer.ggml.merges": []}
    files = export.hf_files_from_gguf(metadata)
    written = export.gguf_metadata(files, len(metadata["tokenizer.ggml.tokens"]))
    assert written["tokenizer.ggml.merges"] == [""]  # the gguf package writes no empty list; llama.cpp wants the key
    assert [tokenizer_from_gguf(written).encode(text) for text in ("the", "é")] == [
        [metadata["tokenizer.ggml.tokens"].index(char) for char in chars] for chars in ("the", "Ã©")
    ]
