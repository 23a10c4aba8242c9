import dataclasses
import random

import pytest

from llama_jax import generate
from llama_jax.text.stream import StopStrings, StreamDecoder
from tests.builders import tiny_config
from tests.infer.helpers import random_llama
from tests.text.helpers import CORPUS, load, random_texts


@pytest.fixture(params=["smollm2", "llama3", "sp_tokenizer", "legacy", "metaspace"])
def tokenizer(request):
    if request.param in ("legacy", "metaspace"):
        return load(request.getfixturevalue("sp_folders")[request.param])
    return request.getfixturevalue(request.param)


def test_pieces_join_to_decode(tokenizer):
    rng = random.Random(0)
    streams = [tokenizer.encode(text) for text in random_texts(200, seed=5)]
    streams += [rng.choices(range(tokenizer.vocab_size), k=40) for _ in range(200)]
    streams += [rng.choices(range(min(300, tokenizer.vocab_size)), k=40) for _ in range(200)]  # bytes, mostly
    for ids in streams:
        stream, pieces = StreamDecoder(tokenizer), []
        while ids_left := ids[sum(n for n, _ in pieces) :]:
            n = rng.randrange(1, 4)
            pieces.append((len(ids_left[:n]), stream.push(ids_left[:n])))
        whole = tokenizer.decode(ids)
        assert "".join(piece for _, piece in pieces) + stream.finish() == whole
        if "\ufffd" not in whole:
            assert all("\ufffd" not in piece for _, piece in pieces)


def test_characters_and_spaces_survive_token_by_token(tokenizer):
    text = "Hi 🦙 你好 ﷺ,  two spaces\n\n the end "
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push([i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert any(piece == "" for piece in pieces)  # held back until the character is whole


def test_a_continuation_keeps_its_space(tokenizer):
    text = "The end of a sentence, and more."
    ids = tokenizer.encode(text)
    for k in range(1, len(ids)):
        assert tokenizer.decode(ids[:k]) + StreamDecoder(tokenizer, goes_on=True).push(ids[k:]) == text


def test_a_completion_goes_on_from_its_prompt(sp_tokenizer):
    """Of a text with the space between, of ids without what came before."""
    config = tiny_config(vocab_size=sp_tokenizer.vocab_size)
    llama = dataclasses.replace(random_llama(config), tokenizer=sp_tokenizer)
    texts = [chr(ord("a") + i) for i in range(26)]
    ids = [sp_tokenizer.encode(text, bos=sp_tokenizer.add_bos) for text in texts]
    completions = generate(llama, [*texts, *ids], max_new_tokens=8)
    for text, prompt, of_text, of_ids in zip(texts, ids, completions[:26], completions[26:], strict=True):
        assert of_text.tokens == of_ids.tokens
        assert text + of_text.text == sp_tokenizer.decode([*prompt, *of_text.tokens])
        assert of_ids.text == sp_tokenizer.decode(of_ids.tokens)
    assert any(completion.text.startswith(" ") for completion in completions[:26])


@pytest.mark.timing
def test_cost_per_token_does_not_grow(smollm2, within):
    ids = smollm2.encode(CORPUS) * 500
    stream = StreamDecoder(smollm2)
    with within(100e-6 * len(ids)):
        for i in ids:
            stream.push([i])


@pytest.mark.parametrize(
    ("stops", "text", "kept", "found"),
    [
        ([], "abc", "abc", None),
        (["\nUser:"], "hi\nUser: x", "hi", "\nUser:"),
        (["\nUser:"], "hi\nUse", "hi\nUse", None),
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # completed first
        (["aab"], "aaab", "a", "aab"),
        (["END", "E"], "ENEND", "", "E"),
        (["b", "ab"], "ab", "", "ab"),
    ],
)
def test_stop_strings_do_not_depend_on_the_pieces(stops, text, kept, found):
    for size in range(1, len(text) + 1):
        stop = StopStrings(stops)
        pieces = [stop.push(text[i : i + size]) for i in range(0, len(text), size)]
        assert ("".join(pieces) + stop.finish(), stop.found) == (kept, found)


def test_stop_strings_hold_back_no_more_than_needed():
    stop = StopStrings(["</end>"])
    assert [stop.push(c) for c in "a<b</"] == ["a", "", "<b", "", ""]
    with pytest.raises(ValueError, match="non-empty"):
        StopStrings([""])
