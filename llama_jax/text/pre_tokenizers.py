"""How byte-level vocabularies split a text into words before they merge: the names of `tokenizer.ggml.pre`.

The names are llama.cpp's (llama-vocab.cpp). The regexes are those of the models' own tokenizer.json where llama.cpp
has them otherwise: it spells some in a dialect without \\p{Lu} or possessive quantifiers, docs/tokenizers.md says what
differs. Names that are not here belong to other architectures, or split text by more than regexes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """How a text is split.

    Attributes:
      regexes: they split it one after the other.
      whole_words: a word that is a token is taken as it is, whatever the merges make of it.
      add_bos: what llama.cpp takes for `tokenizer.ggml.add_bos_token` where a file does not say.
    """

    regexes: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = LLAMA3_REGEX.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_MARKS}|{_SPACES}"
_GPT4O = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_DIGITS = r"\p{N}"
_POINTS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PORO = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3 = rf"{_ASCII_MARKS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_BICAMERAL = (  # the letters of scripts that have a lower case
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_BICAMERAL}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _POINTS,
)
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    _DIGITS,
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2_REGEX,
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED_CODER = LLAMA3_REGEX.replace("{1,3}", "{1}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2 = LLAMA3_REGEX.removesuffix(r"\s+(?!\S)|\s+") + "|".join(
    [rf"\s{{{2**i}}}(?!\S)" for i in range(9, 1, -1)] + [r"\s{1,2}(?!\S)", r"\s{1}"]
)


def _named(names: str, *regexes: str, whole_words: bool = False, add_bos: bool = False) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(regexes, whole_words, add_bos))


# tokenizer.ggml.pre -> how it splits. Of names that split alike, the first is what we write.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        LLAMA3_REGEX,
        whole_words=True,
        add_bos=True,
    ),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _DIGITS, GPT2_REGEX),
    **_named("gpt-2 mpt olmo jais trillion granite-docling phi-2 gigachat a.x-4.0 mellum exaone4", GPT2_REGEX),
    **_named("qwen2 stablelm2 hunyuan megrez deepseek-r1-qwen kormo solar-open grok-2", _QWEN2),
    **_named("qwen35", _QWEN35),
    **_named("smaug-bpe dbrx chatglm-bpe", LLAMA3_REGEX),
    **_named("tekken", _TEKKEN, whole_words=True, add_bos=True),
    **_named("llama4 gpt-4o kanana2 talkie minimax-m2", _GPT4O),
    **_named("deepseek-llm", *_DEEPSEEK_LLM, r"\p{N}+"),
    **_named("deepseek-coder", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _POINTS, _DIGITS),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", r"\p{N}{1,3}", _KANA, _DEEPSEEK3),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2_REGEX, "[0-9][0-9][0-9]"),
    **_named("poro-chat bloom gpt3-finnish", _PORO),
    **_named("viking", _PORO, _DIGITS),
    **_named("chameleon", *_CHAMELEON, add_bos=True),
    **_named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **_named("bailingmoe bailingmoe2 llada-moe", _BAILING),
    **_named("seed-coder", _SEED_CODER),
    **_named("exaone-moe", _EXAONE_MOE),
    **_named("jais-2", _JAIS2),
    **_named("minicpm5", r"\p{N}{1,3}", LLAMA3_REGEX.replace("{1,3}", "+"), whole_words=True),
    **_named("laguna", r"[^\n]+|[\n]+", _QWEN2),
    **_named("ufakzeka", _QWEN2.removeprefix(_CONTRACTIONS + "|")),
    **_named("default", r"[\p{P}$+<=>^~|]+", GPT2_REGEX, r"\p{N}+", "[0-9][0-9][0-9]"),
}
