"""Corpora of conversations: shapes, masks, what is cut, and what is refused by its line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llama_jax.data.corpus import open_corpus
from llama_jax.data.masks import report
from llama_jax.data.prepare.orders import orders, orders_corpus
from llama_jax.data.prepare.prepare import prepare
from llama_jax.data.prepare.request import make_request
from llama_jax.data.prepare.shapes import conversation
from llama_jax.data.rows.plan import RowPlan

ASK, TELL = "what is the name of the river?", "it is a long story"
MESSAGES = [{"role": "user", "content": ASK}, {"role": "assistant", "content": TELL}]
SHAPES = {
    "messages": {"messages": MESSAGES},
    "completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "alpaca": {"instruction": ASK, "input": "", "output": TELL},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": TELL}]},
}


def corpus(rows, folder, model, **options):
    """Prepared from JSON lines, by one process."""
    folder.mkdir(exist_ok=True)
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = make_request([path], tokenizer=model, conversations=True, **options)
    prepare(request, folder / "corpus", workers=0)
    return open_corpus(folder / "corpus")


def texts(opened):
    """Of each row the text of what is learned, its last token apart."""
    tokenizer = opened.tokenizer()
    rows = range(len(opened))
    found = []
    for ids, mask in zip(opened.read(rows), opened.read(rows, "loss_mask"), strict=True):
        learned = ids[mask == 1].tolist()
        found.append((tokenizer.decode(learned[:-1]), learned[-1]))
    return found


def test_every_shape_is_the_same_conversation(model, tmp_path):
    opened = corpus(SHAPES.values(), tmp_path, model)
    end = opened.tokenizer().control_tokens["<|im_end|>"]
    assert texts(opened) == [(TELL, end)] * 4
    first, *others = opened.read(range(4))
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert opened.manifest.facts == {"alpaca": 1, "completion": 1, "messages": 1, "sharegpt": 1}
    said = list(report(opened))
    assert said[0] == "rows: 1 of shape messages, 1 of shape completion, 1 of shape alpaca, 1 of shape sharegpt"
    assert f"longest row {len(first)} tokens" in said[1]


def test_parquet_with_the_nulls_of_other_rows(model, tmp_path):
    rows = [{"messages": [{**m, "tool_calls": None, "name": None} for m in MESSAGES], "tools": None}] * 3
    pa.parquet.write_table(pa.Table.from_pylist([*rows, {"messages": MESSAGES, "tools": "[]"}]), tmp_path / "x.parquet")
    request = make_request([tmp_path / "x.parquet"], tokenizer=model, conversations=True)
    prepare(request, tmp_path / "corpus", workers=0)
    assert len({text for text, _ in texts(open_corpus(tmp_path / "corpus"))}) == 1


def test_texts_without_a_chat_format(model, tmp_path):
    """A prompt and a completion as they are; the end of a document is learned."""
    opened = corpus([{"prompt": "the quick", "completion": " brown fox"}], tmp_path, model)
    ((text, end),) = texts(opened)
    assert text == " brown fox"
    assert end == opened.manifest.eos_id
    assert opened.tokenizer().decode(opened.read([0])[0][:-1].tolist()) == "the quick brown fox"


def test_weights_of_messages(model, tmp_path):
    turns = [*MESSAGES, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "dog"}]
    rows = [{"messages": [dict(turns[0]), {**turns[1], key: 0}, *turns[2:]]} for key in ("weight", "train", "training")]
    found = texts(corpus([*rows, {"messages": turns}], tmp_path, model))
    assert [text for text, _ in found] == ["dog"] * 3 + [f"{TELL}dog"]


def test_too_long_rows_lose_whole_turns(model, tmp_path):
    """The system message stays, the answer's end too; a row of one long turn is left out and named."""
    system = {"role": "system", "content": "name"}
    long = [system, *MESSAGES * 4]
    rows = [{"messages": [system, *MESSAGES]}, {"messages": long}, {"messages": [system, *MESSAGES[:1] * 1, {
        "role": "assistant", "content": TELL * 20}]}]  # fmt: skip
    whole = corpus(rows, tmp_path / "whole", model)
    limit = int(whole.lengths[0]) + 5
    cut = corpus(rows, tmp_path / "cut", model, max_tokens=limit)
    assert [int(n) for n in cut.lengths] == [limit - 5] * 2
    np.testing.assert_array_equal(*cut.read([0, 1]))
    assert cut.manifest.facts["cut"] == 1
    assert cut.manifest.skipped == {"too_long": 1}
    plan = RowPlan([cut], seq_len=limit - 1, seed=0, whole=True)
    assert {(p.start, p.stop) for r in range(2) for p in plan.row(r).pieces} == {(0, limit - 6)}
    with pytest.raises(ValueError, match=rf"2 documents are longer .*prepare them again with --max-tokens {limit - 9}"):
        RowPlan([cut], seq_len=limit - 10, seed=0, whole=True)


def test_another_template_is_another_corpus(model, tmp_path):
    """Prepared again after the template was corrected: refused, not taken for the same."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    corpus([SHAPES["messages"]], tmp_path, copy)
    corpus([SHAPES["messages"]], tmp_path, copy)  # as it is
    facts = json.loads((copy / "tokenizer_config.json").read_text())
    facts["chat_template"] = facts["chat_template"].replace("assistant ", "assistant: ")
    (copy / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(FileExistsError, match="prepared from other files or with other options"):
        corpus([SHAPES["messages"]], tmp_path, copy)


BAD = {
    "no answer": ({"messages": MESSAGES[:1]}, "chats.jsonl:2: has no answer to learn"),
    "two shapes": (SHAPES["messages"] | SHAPES["alpaca"], "two shapes, messages and alpaca"),
    "no shape": ({"text": "x"}, "chats.jsonl:2: is not a conversation.* it has 'text'"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, "message 1 has the role 'wizard'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1, of the user, has no content"),
    "weight": ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}]}, "message 2 has weight 0.5: give 0 or 1"),
    "tools": ({"messages": MESSAGES, "tools": "{"}, "its tools are not JSON"),
    "answer first": ({"messages": MESSAGES[1:]}, "the first message is an answer to nothing"),
    "empty": ({"messages": []}, "its messages are empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(case, model, tmp_path):
    row, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        corpus([SHAPES["messages"], row], tmp_path, model)


def test_a_call_of_openai():
    """Null beside tool calls, arguments as a text: what templates take."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "x", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"}, {"role": "assistant", "content": "y"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": None}}],
    }  # fmt: skip
    found = conversation(row)
    assert found.messages[0] == {"role": "user", "content": "x"}
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert found.messages[2]["tool_call_id"] == "1"
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    assert list(found.learned) == [False, True, False, True]


def test_the_command_shows_what_is_learned(model, tmp_path, environment):
    import subprocess
    import sys

    from tests.processes import ROOT

    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(SHAPES["messages"]) + "\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/prepare_data.py", path, tmp_path / "out", "--chat", "--tokenizer", model,
         "--show", "1"], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"assistant \u27e6{TELL}<|im_end|>\u27e7" in done.stdout
    assert "rows: 1 of shape messages" in done.stderr


def test_orders_that_are_made(model, tmp_path):
    """Held out are other names and other orders; a seed gives the same rows; another template is another corpus."""
    train, held_out = orders(300, 40)
    assert (train, held_out) == orders(300, 40)
    answers = [[json.loads(row["messages"][-1]["content"]) for row in rows] for rows in (train, held_out)]
    names, others = ({answer["name"] for answer in part} for part in answers)
    assert not names & others
    keys = [{tuple(answer[key] for key in ("item", "size", "count", "time")) for answer in part} for part in answers]
    assert not keys[0] & keys[1]
    for row, answer in zip(held_out, answers[1], strict=True):
        asked = row["messages"][1]["content"]
        assert answer["name"] in asked
        assert answer["size"] in asked
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    first = orders_corpus(tmp_path, str(copy))
    assert orders_corpus(tmp_path, str(copy)) == first
    facts = json.loads((copy / "tokenizer_config.json").read_text())
    facts["chat_template"] = facts["chat_template"].replace("<|im_end|>{%", "<|im_end|> {%")
    (copy / "tokenizer_config.json").write_text(json.dumps(facts))
    assert orders_corpus(tmp_path, str(copy)) != first
