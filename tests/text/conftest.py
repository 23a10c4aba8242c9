import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llama_jax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from tests.material import llama3_tokenizer, smollm2_gguf

CORPUS = """The capital of France is Paris, and the quick brown fox jumps over the lazy dog 12 345 times.
def add(a, b):\treturn a + b  # naïve café, Straße, Москва, 東京, 你好 🦙 [INST] hello [/INST] <<SYS>> user: hi
for (int i = 0; i < n; ++i) { x[i] *= 2.5; } // "quoted" 'text' <|im_start|> and <s> </s> <step> <PRE> <SUF>"""
ALPHABET = [
    *"abcXYZ0123456789.,;:!?'\"()[]{}<>|/_-+=#@",
    *(" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "▁"),
    *("é", "ß", "Ж", "你好", "東", "🦙", "👩‍👩‍👧", "e\u0301", "\u200b", "ﷺ", "\x00", "\x7f", "\ue000"),
    *("The", " capital", " of", "'s", "'LL", "def ", "return", "<|", "|>", "<s>", "[INST]", " việc", "1234567"),
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 24))) for _ in range(count)]


def write_folder(folder: Path, files: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        (folder / name).write_bytes(data)
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    fields = gguf.GGUFReader(smollm2_gguf()).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata) -> Any:
    return tokenizer_from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def llama3() -> Any:
    return load_tokenizer(llama3_tokenizer().parent)


def llama3_vocabulary() -> dict[str, int]:
    """The real ranks, spelt in GPT-2's alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from tiktoken.load import load_tiktoken_bpe

    alphabet = bytes_to_unicode()
    ranks = load_tiktoken_bpe(str(llama3_tokenizer()))
    return {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}


def llama3_merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, in the order of ranks, as Hugging Face's converter makes them."""
    merges = []
    for token in vocabulary:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


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
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
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


def sp_backend(sp: Any, *, legacy: bool) -> tokenizers.Tokenizer:
    """The model as Hugging Face writes it: merges are all splits of a piece, in the order of its id."""
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in ids.items():
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)) and i >= 8:
            merges += [(piece[:k], piece[k:]) for k in range(1, len(piece)) if {piece[:k], piece[k:]} <= ids.keys()]
    merges.sort(key=lambda pair: ids[pair[0] + pair[1]])
    hf = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if legacy:
        hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        hf.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hf.decoder = decoders.Sequence(steps)
    hf.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", "<step>")])
    hf.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf


@pytest.fixture(scope="session")
def sp_folders(sp, tmp_path_factory) -> dict[str, Path]:
    """The model as Hugging Face folders, in both of the forms that Llama 2 checkpoints have."""
    folders = {}
    for name in ("legacy", "metaspace"):
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        folders[name] = write_folder(tmp_path_factory.mktemp(name), {"tokenizer_config.json": config})
        sp_backend(sp, legacy=name == "legacy").save(str(folders[name] / "tokenizer.json"))
    return folders
