"""Random text, folders to load, and the reference tokenizers, built without llama_jax."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_jax.text.base import Tokenizer
from llama_jax.text.open import load_tokenizer
from tests.material import llama3_tokenizer

CORPUS = """The capital of France is Paris, and the quick brown fox jumps over the lazy dog 12 345 times.
def add(a, b):\treturn a + b  # naïve café, Straße, Москва, 東京, 你好 🦙 [INST] hi [/INST] <<SYS>> user:
for (int i = 0; i < n; ++i) { x[i] *= 2.5; } // "quoted" 'text' <|im_start|> <s> </s> <step> <PRE>"""
ALPHABET = [
    *"abcXYZ0123456789.,;:!?'\"()[]{}<>|/_-+=#@",
    *(" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "▁"),
    *("é", "ß", "Ж", "你好", "東", "🦙", "👩‍👩‍👧", "e\u0301", "\u200b", "ﷺ", "\x00", "\x7f", "\ue000"),
    *(
        "The",
        " capital",
        "'s",
        "'LL",
        "def ",
        "return",
        "<|",
        "|>",
        "<s>",
        "</s>",
        "<step>",
        "[INST]",
        " việc",
        "1234567",
    ),
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


def llama3_vocabulary() -> dict[str, int]:
    """The real ranks, spelt in GPT-2's alphabet."""
    alphabet = bytes_to_unicode()
    ranks = load_tiktoken_bpe(str(llama3_tokenizer()))
    return {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}


def llama3_merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of every token into two, in the order of ranks, as Hugging Face's converter makes them."""
    merges = []
    for token in vocabulary:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


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
    # Flags as one converter or another wrote them.
    flags = {"<unk>": {}, "<s>": {"normalized": True}, "</s>": {"rstrip": True}, "<step>": {"lstrip": True}}
    hf.add_special_tokens([AddedToken(t, **{"special": True, "normalized": False} | flags[t]) for t in flags])
    hf.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf


def smollm2_oracle(metadata) -> PreTrainedTokenizerFast:
    """SmolLM2's own pre-tokenizer, by hand: transformers' GGUF import leaves out the splitting of digits."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    hf = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    hf.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:17]])
    return PreTrainedTokenizerFast(
        tokenizer_object=hf,
        bos_token=tokens[1],
        eos_token=tokens[2],
        unk_token=tokens[0],
        pad_token=tokens[2],
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
