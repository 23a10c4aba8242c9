"""Small tokenizers of each kind, with one key of their files after the other: `grid` yields them as folders."""

import base64
import functools
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llama_jax.text.bpe import LLAMA3_REGEX, llama3_control_tokens
from tests.text.helpers import CORPUS, write_folder

Files = dict[str, Any]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ROLES = ("bos_token", "eos_token", "unk_token")
LARGE = ("plain", "words", "added_tokens.json", "padding token", "markers", "additional_special_tokens")
TEMPLATE = "{% for m in messages %}<|think|><|turn|>{{ m.content }}{% endfor %}"


def token(content: str, special: bool = False, **flags: bool) -> Files:
    """An entry of added_tokens_decoder."""
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **plain, **flags}


@functools.cache
def spm(model_type: str, **options: Any) -> bytes:
    """A tokenizer.model: `<unk>` 0, `<s>` 1, `</s>` 2, and bytes unless `byte_fallback` is off."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "hard_vocab_limit": False,
        "remove_extra_whitespaces": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 20), model_writer=model, model_type=model_type,
        **defaults | options,
    )  # fmt: skip
    return model.getvalue()


@functools.cache
def tiktoken() -> bytes:
    """A tokenizer.model as of Llama 3: single bytes, all pairs of them, and as many triples as there is room for."""
    single = [bytes([i]) for i in range(256)]
    pairs = [a + b for a, b in itertools.product(single, single)]
    letters = [bytes([i]) for i in range(32, 127)]
    triples = [a + b + c for a, b, c in itertools.product(letters, letters, letters)]
    ranks = [*single, *pairs, *triples][:128_000]
    return b"".join(base64.b64encode(rank) + b" %d\n" % i for i, rank in enumerate(ranks))


@functools.cache
def tiktoken_as_json() -> bytes:
    """The same ranks as a tokenizer.json, with Llama 3's names after them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    ranks = [base64.b64decode(line.split()[0]) for line in tiktoken().splitlines()]
    known = set(ranks)
    spelt = ["".join(alphabet[byte] for byte in rank) for rank in ranks]
    merges = [
        (s[:i], s[i:])
        for rank, s in zip(ranks, spelt, strict=True)
        for i in range(1, len(s))
        if rank[:i] in known and rank[i:] in known
    ]
    hf = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(spelt)}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    names = {i: name for name, i in reversed(llama3_control_tokens().items())}
    hf.add_special_tokens([AddedToken(names[i], normalized=False) for i in sorted(names)])
    return hf.to_str().encode()


@functools.cache
def byte_level() -> str:
    """A tokenizer.json as of Llama 3."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(CORPUS.splitlines() * 5, trainer)
    return _with_specials(hf)


@functools.cache
def metaspace(form: str) -> str:
    """A tokenizer.json as of Llama 2: `legacy` with a normalizer, `first` with a pre-tokenizer."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm("bpe"))
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    words = [piece for piece, i in ids.items() if i > 258]
    merges = [(w[:k], w[k:]) for w in words for k in range(1, len(w)) if {w[:k], w[k:]} <= ids.keys()]
    hf = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if form == "legacy":
        hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        hf.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hf.decoder = decoders.Sequence(steps)
    return _with_specials(hf)


def _with_specials(hf: tokenizers.Tokenizer) -> str:
    hf.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    hf.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", hf.token_to_id("<s>"))]
    )
    return hf.to_str()


def vocabularies() -> dict[str, Files]:
    """Kind to the files of its vocabulary, and what they call BOS, EOS and the unknown token."""
    names = {"tokenizer_config.json": dict(zip(ROLES, ("<s>", "</s>", "<unk>"), strict=True))}
    llama3 = {"tokenizer_config.json": dict(zip(ROLES, ("<|begin_of_text|>", "<|end_of_text|>"), strict=False))}
    return {
        "SentencePiece BPE": {"tokenizer.model": spm("bpe"), **names},
        "SentencePiece unigram": {"tokenizer.model": spm("unigram"), **names},
        "tiktoken": {"tokenizer.model": tiktoken(), **llama3},
        "byte-level": {"tokenizer.json": byte_level(), **names},
        "metaspace": {"tokenizer.json": metaspace("legacy"), **names},
        "metaspace first": {"tokenizer.json": metaspace("first"), **names},
    }


def size_of(files: Files) -> int:
    """Number of ids of a kind's vocabulary before anything is added."""
    if "tokenizer.json" in files:
        return tokenizers.Tokenizer.from_str(files["tokenizer.json"]).get_vocab_size()
    if files["tokenizer.model"] == tiktoken():
        return 128_256
    return sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size()


def keys(size: int) -> dict[str, Files]:
    """Name to what it adds to each file; `size` is the next free id."""
    words = [
        token("hyperloop"), token("<tool_call>"), token("</think>", lstrip=True), token("xyz", single_word=True),
        token("ab  ", rstrip=True), token("Fox", normalized=True), token("<sep>", True, lstrip=True, rstrip=True),
        token("naïve"),
    ]  # fmt: skip
    decoder = {str(size + i): word for i, word in enumerate(words)}
    markers = [token("<|im_start|>"), token("<|im_end|>"), token("<|think|>"), token("<|turn|>"), token("<|tool|>")]
    extra = ["<x>", {"__type": "AddedToken", **token("<y>")}]
    mask = {"__type": "AddedToken", **token("[MASK]", lstrip=True)}
    return {
        "plain": {},
        "words": {"tokenizer_config.json": {"added_tokens_decoder": decoder}},
        "added_tokens.json": {"added_tokens.json": {"hyperloop": size, "<|im_end|>": size + 1, "Fox": size + 2},
                              "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
        "special_tokens_map.json": {"special_tokens_map.json": {"pad_token": token("<pad>", lstrip=True),
                                                                "sep_token": "<sep>"}},
        "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": extra}},
        "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<image>"}}},
        "padding token": {"tokenizer_config.json": {"pad_token": "[PAD]", "mask_token": mask}},
        "markers": {"tokenizer_config.json": {"added_tokens_decoder": {str(size + i): m for i, m in enumerate(markers)},
                                              "chat_template": TEMPLATE}},
        "spaces": {"tokenizer_config.json": {"clean_up_tokenization_spaces": False, "split_special_tokens": False,
                                             "spaces_between_special_tokens": True, "model_max_length": 5}},
        "empty": {"tokenizer_config.json": {"pad_token": "", "sep_token": None, "additional_special_tokens": [],
                                            "add_eos_token": None}},
    }  # fmt: skip


def more() -> Iterator[tuple[str, Files]]:
    """What is to be said of one kind only."""
    kinds = vocabularies()
    bpe, unigram = kinds["SentencePiece BPE"], kinds["SentencePiece unigram"]
    for kind, vocabulary in (("SentencePiece BPE", bpe), ("metaspace", kinds["metaspace"])):
        for legacy in (True, False):
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": False}
            yield f"{kind}, no prefix, legacy {legacy}", _merged(vocabulary, {"tokenizer_config.json": config})
    configs = [{"legacy": legacy, "add_prefix_space": prefix} for legacy in (True, False) for prefix in (True, None)]
    configs += [{"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
    for config in configs:
        name = f"SentencePiece BPE, {json.dumps(config)}"
        yield name, _merged(_merged(bpe, keys(size_of(bpe))["words"]), {"tokenizer_config.json": config})
    for name, options in {
        "no bytes": {"byte_fallback": False},
        "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
        "extra whitespace": {"remove_extra_whitespaces": True},
        "no prefix": {"add_dummy_prefix": False},
        "digits and symbols": {"split_digits": True, "user_defined_symbols": "fox,<sep>", "control_symbols": "<c>"},
    }.items():
        yield f"SentencePiece BPE, {name}", bpe | {"tokenizer.model": spm("bpe", **options)}
        yield f"SentencePiece unigram, {name}", unigram | {"tokenizer.model": spm("unigram", **options)}
    for kind in ("byte-level", "metaspace"):
        state = json.loads(kinds[kind]["tokenizer.json"])
        pad = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
        state["padding"] = pad | {"pad_token": "<unk>"}
        yield f"{kind}, padding", kinds[kind] | {"tokenizer.json": json.dumps(state)}
        state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        yield f"{kind}, padding and truncation", kinds[kind] | {"tokenizer.json": json.dumps(state)}
        state |= {"padding": None, "truncation": None, "post_processor": None}
        yield f"{kind}, no post-processor", kinds[kind] | {"tokenizer.json": json.dumps(state)}


def grid(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields a name and a folder of every tokenizer; `folder` is where they are written."""
    cases = (
        (f"{kind}, {key}", _merged(vocabulary, files))
        for kind, vocabulary in vocabularies().items()
        for key, files in keys(size_of(vocabulary)).items()
        if kind != "tiktoken" or key in LARGE  # a second each
    )
    for name, files in itertools.chain(cases, more()):
        yield name, write_folder(folder / name, {"config.json": CONFIG | {"vocab_size": 130_000}, **files})


def _merged(vocabulary: Files, files: Files) -> Files:
    merged = dict(vocabulary)
    for name, content in files.items():
        merged[name] = merged.get(name, {}) | content
    return merged
