"""Small GGUF vocabularies of both kinds, with tokens of every type."""

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# After the ordinary tokens of either vocabulary: what types and names make of them is llama.cpp's doing.
ODD = [
    ("<word>", USER_DEFINED),
    ("  ", USER_DEFINED),
    ("<unk2>", UNKNOWN),  # a second unknown token
    ("</x>", NORMAL),
    ("<|im_end|>", NORMAL),  # ends a turn by its name
    ("unused", UNUSED),
    ("<ctl>", CONTROL),
]
TEXTS = [
    "a<word>the <word> the",
    "the  the<word>  the",
    "the <unk2> then",
    "a</x>the",
    "a<|im_end|>the",
    "unused the",
    "a<ctl>the",
    "the then </s>",
]


def sentencepiece() -> dict[str, Any]:
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    merged = ["th", "the", "▁the", "▁t", "▁▁", "en", "▁then"]
    rows += [(text, -float(i), NORMAL) for i, text in enumerate(merged)]
    rows += [(char, -100.0, NORMAL) for char in "▁abcdefghijklmnopqrstuvwxyz<>|/_2"]
    rows += [(text, 0.0, kind) for text, kind in ODD]
    rows += [(f"[PAD{len(rows) + i}]", 0.0, kind) for i, kind in enumerate((UNUSED, UNKNOWN, USER_DEFINED))]
    tokens, scores, types = map(list, zip(*rows, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def byte_level() -> dict[str, Any]:
    rows = [(char, NORMAL) for char in sorted(bytes_to_unicode().values())]
    merges = ["t h", "th e", "Ġ the", "e n", "Ġ t"]
    rows += [(merge.replace(" ", ""), NORMAL) for merge in merges]
    rows += [("<s>", CONTROL), ("</s>", CONTROL), *ODD]
    rows += [(f"[PAD{len(rows) + i}]", kind) for i, kind in enumerate((UNUSED, UNKNOWN, USER_DEFINED))]
    tokens, types = map(list, zip(*rows, strict=True))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }
