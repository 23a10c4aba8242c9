"""Texts to compare two tokenizers by."""

from __future__ import annotations

import string


def sample_texts() -> list[str]:
    """Returns some two hundred texts of many scripts and oddities, to compare two tokenizers by."""
    phrases = _PHRASES.strip().splitlines()
    spaces = [f"a{space * n}b{space * n}" for space in _SPACES for n in (1, 2, 3, 4, 7, 16)]
    numbers = ["0123456789"[: n + 1] * (n // 5 + 1) for n in range(10)]
    marks = [mark for char in string.punctuation for mark in (char, f" {char}{char}x")]
    return ["", *phrases, *(phrase[::-1] for phrase in phrases), *spaces, *numbers, *marks, *_CODE]


_SPACES = (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000")
_CODE = (
    'def f(x: int) -> str:\n    return f\'{x!r:>8}\'\n\n\nclass A(B):\n\t"""Doc."""\n',
    "for (int i = 0; i < n; ++i) { a[i] *= 2.5e-3f; }  // done\n#include <stdio.h>\n",
    "SELECT \"name\", COUNT(*) FROM t WHERE x <> 'y' GROUP BY 1;\n",
    '{"key": [1, null, true, "\\u00e9"], "b": {}}\r\n',
    "<div class='a'>&amp;&nbsp;</div>\n<!-- x -->",
    "\\begin{align} E &= mc^2 \\\\ \\end{align} $\\alpha_1$",
)
_PHRASES = """
The capital of France is Paris, isn't it? I'm sure we'LL see; they'd've said so.
À l'été, l'œuvre naïve coûte 5 €. Straße über Größe. Señor, ¿qué pasó?
Dziękuję, żółć. Příliš žluťoučký kůň. İstanbul'da ığdır. Þórður, Ærøskøbing.
Tiếng Việt: việc này rất quan trọng. Ng\u0303 e\u0301 o\u0302\u0323 a\u030a
Съешь же ещё этих мягких французских булок. Україна: їжак, ґанок.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ λόγος.
السلام عليكم، كيف حالك؟ العربيَّة ١٢٣٤٥ ﷺ
שלום עולם, מה שלומך? בְּרֵאשִׁית
नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १२३
สวัสดีชาวโลก วันนี้อากาศดีมาก ๑๒๓
வணக்கம் உலகம். ಕನ್ನಡ ಭಾಷೆ. বাংলা ভাষা। ગુજરાતી
你好，世界！今天天气怎么样？繁體中文：龍馬精神。𠮷野家
こんにちは世界。カタカナとひらがな、漢字ヲ混ゼル。ｶﾞｷﾞｸﾞ
안녕하세요, 세계! 오늘 날씨가 좋네요. \u1112\u1161\u11ab\u1100\u1173\u11af
გამარჯობა მსოფლიო. Բարեւ աշխարհ. ሰላም ልዑል። ភាសាខ្មែរ မြန်မာ
🦙 👩‍👩‍👧‍👦 👍🏽 🇫🇷🇯🇵 ❤️ 1️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ☺☻
x\u200by\u200dz\ufeffw\u00ad \u202eabc\u202c \x00\x07\x1b[0m\x7f\u0085 \ufffd\ue000\U0010fffd
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ xᵢ² ≠ ½ Ⅷ ① ﬁ ﬀ Å Ω
3.14159 1,234,567.89 0xDEADBEEF 1e-10 12:34:56 2024-07-23 +49 (0)30 ١٢ Ⅻ ²³
https://user@example.com:8080/path/?q=a%20b&c=#frag C:\\Users\\x a_b-c.d/e
<|begin_of_text|><|start_header_id|>user<|end_header_id|> hi<|eot_id|><|python_tag|>
<s>[INST] <<SYS>> be brief <</SYS>> hello [/INST] hi </s><unk><pad><0x0A><step>
<PRE> def f <SUF> return <MID> <EOT>▁<PRE>▁▁a▁b <|im_start|>system<|im_end|><|endoftext|>
ALL CAPS AND camelCaseWords snake_case_words kebab-case-words aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
abababababababa 哈哈哈哈哈哈哈 !!!!!!?????......------______=====~~~~
"""
