"""The scripts as a user runs them: a process each, results on stdout, one line of error on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.builders import slow
from tests.processes import ROOT, SHORT


def objects(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def fox_and_wolf(run, model) -> list[dict]:
    """Two prompts of generate.py --json."""
    prompts = ("--prompt", "the quick brown", "--prompt", "it is a wolf")
    return objects(run("generate.py", *prompts, "--model", model, *SHORT, "--json"))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (
            "generate.py",
            ("--prompt", "--prompts-file", "--json", "--logprobs", "--stop", "--mesh", "--top-p", "--seed"),
        ),
        ("bench.py", ("--batch", "--against", "--mesh", "--dtype", "--json", "--convert")),
        ("convert.py", ("--to", "--dtype", "--shards", "--max-shard-size", "--quantize", "--overwrite", "--no-verify")),
        ("verify.py", ("--tolerance", "--json", "--no-logits", "--positions", "--mesh")),
        ("chat.py", ("--system", "--max-new-tokens", "--mesh", "--dtype", "--temperature", "--chat-format")),
    ],
)
def test_help(run, script, options):
    text = run(script, "--help").stdout
    for option in options:
        assert option in text
    assert ("--chat-format" in text) == (script == "chat.py")  # it has no effect on the others


def test_json_is_one_object_a_prompt(fox_and_wolf):
    assert [result["prompt"] for result in fox_and_wolf] == ["the quick brown", "it is a wolf"]
    for result in fox_and_wolf:
        assert list(result) == ["prompt", "text", "tokens", "finish_reason"]
        assert result["text"]
        assert 1 <= len(result["tokens"]) <= 8
        assert result["finish_reason"] == ("length" if len(result["tokens"]) == 8 else "stop")


@pytest.mark.slow
def test_prompts_from_jsonl_and_stdin(run, model, tmp_path, fox_and_wolf):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": result["prompt"]}) + "\n" for result in fox_and_wolf))
    options = ("--model", model, *SHORT, "--json")
    assert objects(run("generate.py", "--prompts-file", file, *options)) == fox_and_wolf
    stdin = "the quick brown\n\nit is a wolf"
    results = objects(run("generate.py", "--prompts-file", "-", *options, "--logprobs", stdin=stdin))
    for result, expected in zip(results, fox_and_wolf, strict=True):
        logprobs = result.pop("logprobs")
        assert result == expected
        assert len(logprobs) == len(result["tokens"])
        assert max(logprobs) < 0


def test_text(run, model, tmp_path, fox_and_wolf):
    file = tmp_path / "prompts.txt"
    file.write_text("it is a wolf\n")
    done = run("generate.py", "--prompt", "the quick brown", "--prompts-file", file, "--model", model, *SHORT)
    fox, wolf = (result["prompt"] + result["text"] for result in fox_and_wolf)
    assert done.stdout.splitlines() == [fox, "-" * 40, wolf, "-" * 40]


@pytest.mark.slow
def test_a_mesh_gives_the_same(run, model, fox_and_wolf):
    prompts = ("--prompt", "the quick brown", "--prompt", "it is a wolf")
    done = run("generate.py", *prompts, "--model", model, *SHORT, "--json", "--mesh", "tensor=2", devices=2)
    assert objects(done) == fox_and_wolf


def test_chat_remembers_until_reset(run, model):
    lines = "the fox\n\nthe wolf\n/reset\nthe wolf\n/reset\nthe fox\n/quit\nthe dog\n"
    done = run("chat.py", "--model", model, *SHORT, stdin=lines)
    fox, wolf, fresh_wolf, fresh_fox = done.stdout.splitlines()  # nothing for the empty line, nothing after /quit
    assert fox == fresh_fox
    assert wolf != fresh_wolf
    question = run("chat.py", "the fox", "--model", model, *SHORT)
    assert question.stdout == fox + "\n"


@pytest.mark.slow
def test_chat_goes_on_after_a_turn_that_does_not_fit(run, model):
    lines = "the fox\n" + "the quick brown fox " * 60 + "\nthe wolf\n"
    done = run("chat.py", "--model", model, *SHORT, "--max-seq-len", "64", stdin=lines, quiet=False)
    assert len(done.stdout.splitlines()) == 2
    assert "64 slots" in done.stderr
    assert "/reset" in done.stderr


def test_chat_reads_bytes_that_are_no_text(run, model):
    """Raw bytes 0x80 to 0xff are what the surrogates stand for."""
    done = run("chat.py", "--model", model, *SHORT, stdin="the fox \udcff\n/reset\nthe fox \ufffd\nthe wolf\n")
    raw, replaced, _ = done.stdout.splitlines()
    assert raw == replaced


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate.py",), "no prompt: give --prompt TEXT or --prompts-file FILE"),
        slow(("generate.py", "--prompt", "a", "--prompts-file", "/no/such/file"), "/no/such/file"),
        slow(("generate.py", "--prompt", "a", "--model", "/no/such/folder"), "/no/such/folder"),
        (("generate.py", "--prompt", "a", "--model", "MODEL", "--mesh", "model=2"), "unknown axis 'model'"),
        slow(("generate.py", "--prompt", "a", "--model", "MODEL", "--mesh", "tensor=2"), "needs 2 devices"),
        slow(("generate.py", "--prompt", "a", "--model", "MODEL", "--attention", "flash"), "'flash' is unknown"),
        slow(("generate.py", "--prompt", "a" * 300, "--model", "MODEL"), "256 slots"),
        (("chat.py", "Hi", "--top-p", "0"), "top_p must be in (0, 1]"),
        slow(("chat.py", "Hi", "--model", "MODEL", "--max-seq-len", "0"), "max_seq_len must be from 1"),
        slow(("chat.py", "Hi", "--chat-format", "chatml"), "unknown chat format 'chatml'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_a_failure_is_one_line(run, model, args, message):
    done = run(*(str(model) if arg == "MODEL" else arg for arg in args), code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_an_unknown_option_is_a_usage_error(run):
    done = run("generate.py", "--promt", "a", code=2)
    assert done.stdout == ""
    assert "--promt" in done.stderr


@pytest.mark.parametrize("line", ['{"text": "a"}', "not json", '["a"]', '{"prompt": 3}', "null"])
def test_a_prompts_file_of_the_wrong_form(run, tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('\n{"prompt": "a"}\n' + line + "\n")
    done = run("generate.py", "--prompts-file", file, code=1)
    assert done.stderr == f'error: {file}: line 3 is not an object like {{"prompt": "text"}}: {line}\n'


def test_a_reader_that_leaves(model, environment):
    """`generate.py ... | head -0`."""
    command = [sys.executable, ROOT / "scripts/generate.py", "--prompt", "the quick brown", "--model", model, *SHORT]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=120, check=False
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_ctrl_c_while_jax_is_imported(environment):
    """At the worst moment: in a callback of the garbage collector, where Python drops exceptions."""
    code = """if True:
        import gc, os, runpy, signal, sys
        def interrupt(*_):
            if "jax" in sys.modules:
                gc.callbacks.remove(interrupt)
                os.kill(os.getpid(), signal.SIGINT)
        gc.callbacks.append(interrupt)
        sys.argv = ["chat.py", "Hi", "--model", "/no/such/folder"]
        runpy.run_path("scripts/chat.py", run_name="__main__")
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
