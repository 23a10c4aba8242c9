"""Runs of fine-tuning are killed, asked to stop and moved as those of pretraining are: the same to the last bit."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest

from llama_jax.checkpoint.run import run_steps
from llama_jax.train.report import read_metrics
from tests.data.test_chats import corpus as prepared
from tests.processes import outputs
from tests.train.test_finetune import rows
from tests.train.test_loop import arrays_of, wait_for_step
from tests.train.test_preferences import ROWS as PAIRS
from tests.train.test_preferences import prepared as prepared_pairs

pytestmark = pytest.mark.slow  # each starts six processes or more

STEPS = 12
RECIPE = """
import llama_jax
from llama_jax.config.adapter import Adapter
from llama_jax.train.recipe import *
from llama_jax.weights.open import open_checkpoint

def recipe():
    return Recipe(
        model=open_checkpoint({model!r}).config, init_from={model!r}, objective={objective!r}, adapter={adapter},
        data=Data(train=({corpus!r},), validation=({corpus!r},)),
        batch=Batch(seq_len=64, sequences=8, microbatches=2),
        optimizer=Optimizer(Schedule(peak=3e-3, steps=12, warmup_steps=3)),
        checkpoints=Checkpoints(every=3, keep_last=2, keep_best=0), validation=Validation(every=6), tensorboard=False,
    )
"""
KINDS = ["sft, adapter", "sft, all", "dpo, adapter", "dpo, all", "orpo, all"]


@pytest.fixture
def recipe(request, model, tmp_path):
    """Of an objective, with an adapter or without."""
    objective, trained = request.param.split(", ")
    corpus = (
        prepared(rows(80), tmp_path / "chats", model)
        if objective == "sft"
        else prepared_pairs(PAIRS * 10, tmp_path / "pairs", model)
    )
    path = tmp_path / "tiny.py"
    adapter = "Adapter(rank=4, alpha=8)" if trained == "adapter" else "None"
    path.write_text(RECIPE.format(model=str(model), objective=objective, adapter=adapter, corpus=str(corpus.path)))
    return path


@pytest.fixture
def start_run(forks, recipe, tmp_path):
    def begin(name, *options, devices=1):
        command = ["scripts/train.py", str(recipe), "--output", str(tmp_path / name), "--json", *options]
        return forks.start(command, tmp_path, JAX_NUM_CPU_DEVICES=str(devices))

    return begin


def numbers_of(output):
    """Of each step, to the last bit, but for times."""
    return [{k: v for k, v in row.items() if "second" not in k and k != "mfu"} for row in read_metrics(output)]


@pytest.mark.parametrize("recipe", KINDS, indirect=True)
def test_killed_or_asked_to_stop(start_run, tmp_path):
    """12 steps == 7 + SIGTERM + 5 == 5 + kill -9 + 9 from the checkpoint at 3."""
    code, out, err = start_run("whole").wait()
    assert code == 0, err
    assert json.loads(out)["step"] == STEPS
    for name, number, step in (("terminated", signal.SIGTERM, 7), ("killed", signal.SIGKILL, 5)):
        process = start_run(name)
        wait_for_step(tmp_path / name, step)
        deadline = time.monotonic() + 30
        while not run_steps(tmp_path / name / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill(number)
        assert process.wait()[0] == (0 if number == signal.SIGTERM else -number)
        code, _, err = start_run(name, "--resume", "auto").wait()
        assert code == 0, err
        assert "from step" in err
        assert numbers_of(tmp_path / name) == numbers_of(tmp_path / "whole")
        one, two = (arrays_of(tmp_path / run, STEPS) for run in ("whole", name))
        assert one.keys() == two.keys()
        for key, array in one.items():
            assert array.tobytes() == two[key].tobytes(), key


@pytest.mark.parametrize("recipe", ["sft, adapter", "dpo, adapter", "dpo, all"], indirect=True)
def test_two_processes(start_run, start, recipe, tmp_path):
    """7 steps on 1 process x 8 devices, 5 on 2 x 4 and another mesh: the same rows, and numbers to rounding."""
    whole = ("--mesh", "fsdp=4,tensor=2")
    assert start_run("whole", *whole, devices=8).wait()[0] == 0
    assert start_run("moved", *whole, "--steps", "7", devices=8).wait()[0] == 0
    options = ("--output", tmp_path / "moved", "--resume", "auto", "--mesh", "data=2,fsdp=2,tensor=2", "--json")
    (out, err), (nothing, _) = outputs(start("scripts/train.py", recipe, *options, devices=4))
    assert json.loads(out)["step"] == STEPS, err
    assert not nothing
    one, two = (
        np.array([(row["step"], row["rows"], row["loss"]) for row in read_metrics(tmp_path / name)])
        for name in ("whole", "moved")
    )
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    np.testing.assert_allclose(one[:, 2], two[:, 2], rtol=1e-5)
    fresh = start("scripts/train.py", recipe, "--output", tmp_path / "fresh", *options[4:], devices=4)
    assert outputs(fresh)[0][0]
    three = np.array([row["loss"] for row in read_metrics(tmp_path / "fresh")])
    np.testing.assert_allclose(three[:1], one[:1, 2], rtol=1e-6)  # the first step's, from the same weights
