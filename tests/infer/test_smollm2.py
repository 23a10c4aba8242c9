"""A trained model end to end: its text, its conversations, and transformers as the oracle of its logits."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers

import llama_jax
from llama_jax import sharding
from tests.builders import hf_config, slow
from tests.material import smollm2_gguf

PROMPT = "The capital of France is"
IDS = [504, 3575, 282, 4649, 314]
GREEDY = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = "The capital of France is Paris."
TEXT = """The quick brown fox jumps over the lazy dog, then goes home to its family in the hills near Lyon.
There it tells a long story about a hen, a wolf and 3 little pigs that built houses of straw, sticks and bricks:

def build(house): return [brick for brick in house if brick != "straw"]"""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_prompt_probability_and_greedy_text(smollm2):
    assert smollm2.tokenizer.encode(PROMPT) == IDS
    probabilities_V = jax.nn.softmax(llama_jax.logits(smollm2, [IDS])[0, -1])
    assert int(probabilities_V.argmax()) == 7042
    assert float(probabilities_V[7042]) == pytest.approx(0.7725, abs=0.001)
    (completion,) = llama_jax.generate(smollm2, [PROMPT], max_new_tokens=24, logprobs=True)
    assert completion.tokens == GREEDY
    assert completion.text == smollm2.tokenizer.decode(GREEDY)
    assert completion.text.startswith(" Paris.\n\nThe")
    assert completion.finish_reason == "length"
    assert np.exp(completion.logprobs[0]) == pytest.approx(0.7725, abs=0.001)


@pytest.mark.parametrize(("mesh", "count"), [slow("tensor=2", 24), slow("fsdp=4,tensor=2", 6)])
def test_a_mesh_that_does_not_divide_its_heads(mesh, count, smollm2):
    """Three kv heads, nine query heads."""
    devices = sharding.make_mesh(smollm2.config, **sharding.parse_mesh(mesh))
    llama = llama_jax.load("smollm2-135m-instruct", mesh=devices, max_seq_len=32)
    (ours,) = llama_jax.generate(llama, [PROMPT], max_new_tokens=count, logprobs=True)
    (expected,) = llama_jax.generate(smollm2, [PROMPT], max_new_tokens=24, logprobs=True)
    assert ours.tokens == GREEDY[:count]
    np.testing.assert_allclose(ours.logprobs, expected.logprobs[:count], rtol=1e-3, atol=1e-4)


def test_logits_of_transformers(smollm2):
    """From the same file through the gguf package; nothing of this library takes part."""
    ids = smollm2.tokenizer.encode(TEXT)[:64]
    assert len(ids) == 64
    model = transformers.LlamaForCausalLM(hf_config(smollm2.config)).eval()
    missing, unexpected = model.load_state_dict(smollm2_state_dict(smollm2.config), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    with torch.no_grad():
        expected_TV = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(llama_jax.logits(smollm2, [ids])[0], expected_TV, atol=1e-3)


def smollm2_state_dict(config) -> dict[str, torch.Tensor]:
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(smollm2_gguf()).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *layer, name = tensor.name.removeprefix("blk.").removesuffix(".weight").split(".")
        if name in ("attn_q", "attn_k"):  # rows of a head in pairs -> in halves
            weight = weight.reshape(-1, config.head_dim // 2, 2, config.embed_dim).swapaxes(1, 2)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        weight = weight.reshape(-1, config.embed_dim) if name in ("attn_q", "attn_k") else weight
        state[f"{prefix}{names[name]}.weight"] = torch.tensor(weight, dtype=torch.float32)
    return state


def test_three_rows_end_for_three_reasons(smollm2):
    """The stop id, a stop string and the count, in one batch; the stop string disturbs no other row."""
    question = smollm2.chat_format.prompt([QUESTION])
    counts: list[int] = []
    stopped, cut, free = llama_jax.generate(
        smollm2, [question, PROMPT, IDS[:3]], max_new_tokens=12, stop=[".\n\nT", "\nx"], logprobs=True,
        on_tokens=counts.append,
    )  # fmt: skip
    assert (stopped.text, stopped.finish_reason) == (ANSWER, "stop")
    assert not set(stopped.tokens) & set(smollm2.tokenizer.stop_ids)
    assert smollm2.tokenizer.decode(stopped.tokens) == ANSWER
    # Tokens and logprobs go up to the one that completed the stop string, the text ends before it.
    assert (cut.text, cut.finish_reason) == (" Paris", "stop")
    assert cut.tokens == GREEDY[:5]
    assert (len(free.tokens), free.finish_reason) == (12, "length")
    assert all(len(c.tokens) == len(c.logprobs) for c in (stopped, cut, free))
    assert sum(counts) >= len(stopped.tokens) + len(cut.tokens) + len(free.tokens)
    (alone,) = llama_jax.generate(smollm2, [IDS[:3]], max_new_tokens=12)
    assert alone.tokens == free.tokens


def test_chat(smollm2):
    answer = llama_jax.chat(smollm2, [QUESTION])
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    pieces = list(llama_jax.chat_stream(smollm2, [QUESTION]))
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 1
    cut = llama_jax.chat(smollm2, [QUESTION], stop=" is")
    assert (cut.text, cut.finish_reason) == ("The capital of France", "stop")
    assert "".join(llama_jax.chat_stream(smollm2, [QUESTION], stop=" is")) == cut.text
    short = llama_jax.chat(smollm2, [QUESTION], max_new_tokens=3)
    assert (len(short.tokens), short.finish_reason) == (3, "length")
    assert ANSWER.startswith(short.text)


TURNS = ("What is the capital of France?", "What is the capital of Italy?", "And of Spain?")


@pytest.mark.slow
def test_a_conversation_equals_fresh_chats(smollm2):
    """The second and third turn prefill only what the cache does not hold."""
    conversation = llama_jax.Conversation(smollm2, max_new_tokens=16)
    for turn in TURNS:
        history = [*conversation.messages, user(turn)]
        answer = "".join(conversation.ask(turn))
        fresh = llama_jax.chat(smollm2, history, max_new_tokens=16)
        assert answer == conversation.completion.text == fresh.text
        assert conversation.completion.tokens == fresh.tokens
        assert conversation.messages == [*history, {"role": "assistant", "content": answer}]
    assert "Paris" in conversation.messages[1]["content"]


def test_a_conversation_prefills_only_what_is_new(smollm2, monkeypatch):
    from llama_jax.infer import chat

    starts = []

    class Spy(chat.Generation):
        def __init__(self, llama, requests, **kwargs):
            starts.append(len(requests[0].held))
            super().__init__(llama, requests, **kwargs)

    monkeypatch.setattr(chat, "Generation", Spy)
    conversation = llama_jax.Conversation(smollm2, max_new_tokens=16)
    for turn in TURNS[:2]:
        "".join(conversation.ask(turn))
    first = smollm2.chat_format.prompt([user(TURNS[0])])
    assert starts[0] == 0
    assert starts[1] >= len(first) + len(smollm2.tokenizer.encode(ANSWER)) - 1


@pytest.fixture(scope="module")
def small(smollm2):
    """A cache of 72 slots."""
    return dataclasses.replace(smollm2, max_seq_len=72)


@pytest.mark.slow
def test_a_cache_that_a_turn_just_fills(small, smollm2):
    """What the second turn adds fits into the 72 slots, but padded to its bucket of 32 it passes their end."""
    conversation = llama_jax.Conversation(small, max_new_tokens=7)
    assert "".join(conversation.ask(TURNS[0])) == ANSWER
    with pytest.raises(ValueError, match=r"has \d+ tokens.*72 slots.*max_seq_len"):
        conversation.ask("What is the capital of Italy? " * 12).__next__()
    assert len(conversation.messages) == 2  # refused, not added
    said = "And that of Germany, in one short word?"
    history = [*conversation.messages, user(said)]
    cached = len(small.chat_format.prompt([QUESTION])) + len(conversation.completion.tokens) - 1
    length = len(small.chat_format.prompt(history))
    assert length <= 72 < cached + 32
    assert 16 < length - cached <= 32
    answer = "".join(conversation.ask(said))
    assert answer
    fresh = llama_jax.chat(smollm2, history, max_new_tokens=7)
    assert (answer, conversation.completion.finish_reason) == (fresh.text, fresh.finish_reason)
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}


def test_stopping_early_keeps_what_was_said(smollm2):
    conversation = llama_jax.Conversation(smollm2, max_new_tokens=40)
    stream = conversation.ask("Tell me a story about a fox.")
    said = next(stream) + next(stream)
    stream.close()
    partial = conversation.messages[-1]
    assert partial["role"] == "assistant"
    assert partial["content"].startswith(said)
    history = [*conversation.messages, user(TURNS[0])]
    assert "".join(conversation.ask(TURNS[0])) == llama_jax.chat(smollm2, history, max_new_tokens=40).text


def test_one_answer_at_a_time(smollm2):
    conversation = llama_jax.Conversation(smollm2, max_new_tokens=8)
    first, second = conversation.ask(TURNS[0]), conversation.ask(TURNS[1])
    said = next(first)
    with pytest.raises(RuntimeError, match="still open.*close"):
        next(second)
    said += "".join(first)
    "".join(conversation.ask(TURNS[2]))
    expected = llama_jax.Conversation(smollm2, max_new_tokens=8)
    assert said == "".join(expected.ask(TURNS[0]))
    "".join(expected.ask(TURNS[2]))
    assert conversation.messages == expected.messages


def test_a_conversation_refuses_nonsense(smollm2):
    with pytest.raises(ValueError, match="at least one message"):
        llama_jax.chat(smollm2, [])
    with pytest.raises(ValueError, match="max_new_tokens"):
        llama_jax.Conversation(smollm2, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        llama_jax.chat(smollm2, [QUESTION], temperature=-1)
    with pytest.raises(TypeError, match="temprature"):
        llama_jax.chat(smollm2, [QUESTION], temprature=1)
