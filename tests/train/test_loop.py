"""A run that is killed goes on as if nothing had happened: the same documents, and the same numbers to the last bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint.arrays import open_arrays
from llama_jax.checkpoint.run import run_steps
from llama_jax.train.report import read_metrics
from tests.processes import outputs
from tests.train.corpora import random_documents, write_corpus
from tests.train.forks import Fork

STEPS, ROWS = 20, 8  # of the recipe

RECIPE = """
from llama_jax.config import ModelConfig
from llama_jax.train.recipe import *

def recipe():
    return Recipe(
        model=ModelConfig(
            vocab_size=256, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_seq_len=512, tie_embeddings=True),
        data=Data(train=({train!r}, {other!r}), weights=(0.7, 0.3), validation=({validation!r},)),
        batch=Batch(seq_len=64, sequences=8, microbatches=2),
        optimizer=Optimizer(Schedule(peak=3e-3, steps=20, warmup_steps=3)),
        checkpoints=Checkpoints(every=5, keep_last=2, keep_best=1),
        validation=Validation(every=10),
        samples=Samples(prompts=("ab", "c"), every=10, new_tokens=4),
        tensorboard=False,
    )
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of 20 steps, which save every 5."""
    root = tmp_path_factory.mktemp("recipe")
    folders = {
        name: str(write_corpus(root / name, random_documents(count, seed=seed), reference={"gzip": 3.0}))
        for name, count, seed in (("train", 200, 0), ("other", 60, 1), ("validation", 10, 2))
    }
    path = root / "tiny.py"
    path.write_text(RECIPE.format(**folders))
    return path


@pytest.fixture
def start_run(forks, recipe, tmp_path):
    """Starts scripts/train.py on the recipe, with an output folder of that name."""

    def begin(name: str, *options: str, devices: int = 1, **variables: str) -> Fork:
        command = ["scripts/train.py", str(recipe), "--output", str(tmp_path / name), "--json", *options]
        return forks.start(command, tmp_path, JAX_NUM_CPU_DEVICES=str(devices), **variables)

    return begin


@pytest.fixture
def train(start_run):
    """The same, to its end: exit code, standard output and error."""
    return lambda *args, **options: start_run(*args, **options).wait()


def steps_of(output: Path) -> list[tuple[Any, ...]]:
    """What must be the same in every run: of each step its number, its rows, and its numbers to the last bit."""
    rows = read_metrics(output)
    return [tuple(row[key] for key in ("step", "rows", "loss", "grad_norm", "learning_rate")) for row in rows]


def arrays_of(output: Path, step: int) -> dict[str, np.ndarray]:
    """Parameters and optimizer state."""
    found = {}
    for item in ("params", "optimizer"):
        for name, array in open_arrays(output / "checkpoints" / str(step) / item).items():
            found[f"{item}/{name}"] = array.read((slice(None),) * len(array.shape))
    return found


def assert_same_run(output: Path, other: Path, steps: int = STEPS) -> None:
    assert steps_of(output) == steps_of(other)
    assert [row[:2] for row in steps_of(output)] == [(i, i * ROWS) for i in range(1, steps + 1)]
    one, two = arrays_of(output, steps), arrays_of(other, steps)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_metrics(output)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_runs_are_the_same_whole_killed_or_asked_to_stop(train, start_run, tmp_path):
    """20 steps == 20 steps == 7 + SIGTERM + 13 == 7 + kill -9 + 15 from the checkpoint at 5."""
    code, out, err = train("whole")
    assert code == 0, err
    outcome = json.loads(out)
    assert outcome["step"] == STEPS
    assert outcome["reference"] == {"gzip": 3.0}
    assert outcome["validation"]["validation_loss"] < 5.5
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(10, "ab"), (10, "c"), (20, "ab"), (20, "c")]
    assert train("again")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "again")

    for name, number, saved in (("terminated", signal.SIGTERM, None), ("killed", signal.SIGKILL, 5)):
        process = start_run(name)
        wait_for_step(tmp_path / name, 7)
        if saved:
            deadline = time.monotonic() + 30
            while not run_steps(tmp_path / name / "checkpoints") and time.monotonic() < deadline:
                time.sleep(0.005)
        process.kill(number)
        code, _, err = process.wait()
        assert code == (0 if number == signal.SIGTERM else -number), err
        code, _, err = train(name, "--resume", "auto")
        assert code == 0, err
        assert "from step" in err
        assert_same_run(tmp_path / "whole", tmp_path / name)

    # A checkpoint is a model: the folder of the run, and of one step.
    llama = llama_jax.load(tmp_path / "whole", mesh=None)
    assert llama_jax.generate(llama, ["ab"], max_new_tokens=4)[0].tokens
    report = llama_jax.convert(tmp_path / "whole" / "checkpoints" / str(STEPS), tmp_path / "hf", to="hf")
    assert report.dtype == "float32"
    # Nothing is overwritten by accident.
    code, _, err = train("whole")
    assert code == 1
    assert "holds a run, saved at step 20: go on with it by --resume auto" in err


@pytest.mark.slow
def test_kills_at_random_moments(train, start_run, tmp_path):
    """Ten times: every checkpoint that is there loads, and no document is lost or repeated."""
    steps, kills = 80, 10
    longer = ("--optimizer.schedule.steps", str(steps), "--validation.every", "0")
    assert train("whole", *longer)[0] == 0
    rng, name, resumed = random.Random(0), "killed", 0
    output = tmp_path / name
    for kill in range(kills):
        before = run_steps(output / "checkpoints")
        process = start_run(name, *longer, "--resume", "auto", "--checkpoints.every", "1")
        deadline = time.monotonic() + 60
        while "compiled for" not in (said := process.err.read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        resumed += "from step" in said
        while kill % 2 and run_steps(output / "checkpoints") == before:  # so that a busy machine gets somewhere too
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # a step and its checkpoint take about 0.1 s
        process.kill()
        assert process.wait()[0] == -signal.SIGKILL
        for step in run_steps(output / "checkpoints"):
            assert len(arrays_of(output, step)) > 20
            progress = json.loads((output / "checkpoints" / str(step) / "run" / "progress.json").read_text())
            assert progress["rows"] == step * ROWS
    assert resumed > kills // 4
    code, _, err = train(name, *longer, "--resume", "auto", "--checkpoints.every", "1")
    assert code == 0, err
    assert_same_run(tmp_path / "whole", output, steps)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save(train, tmp_path):
    """Files of more than 20 kB cannot be written: a checkpoint fails half-way, and the one before is whole."""
    assert train("whole")[0] == 0
    assert train("full", "--steps", "7")[0] == 0
    code, _, err = train("full", "--resume", "auto", LARGEST_FILE="20000")
    assert code == 1
    assert (
        "checkpoints/10: this checkpoint could not be saved (File too large); the newest good one is of step 7" in err
    )
    assert "--resume auto" in err
    assert run_steps(tmp_path / "full" / "checkpoints") == [5, 7]
    assert train("full", "--resume", "auto")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.slow
def test_it_goes_on_with_other_processes_and_another_mesh(train, start, tmp_path, recipe):
    """7 steps on 1 process x 8 devices, 13 on 2 processes x 4: the same documents, and the same numbers to rounding."""
    whole = ("--mesh", "fsdp=4,tensor=2")
    assert train("whole", *whole, devices=8)[0] == 0
    assert train("moved", *whole, "--steps", "7", devices=8)[0] == 0
    options = ("--output", tmp_path / "moved", "--resume", "auto", "--mesh", "data=2,fsdp=2,tensor=2", "--json")
    (out, err), (nothing, _) = outputs(start("scripts/train.py", recipe, *options, devices=4))
    assert json.loads(out)["step"] == STEPS, err
    assert not nothing
    one, two = (np.array(steps_of(tmp_path / name)) for name in ("whole", "moved"))
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    np.testing.assert_allclose(one[:, 2:], two[:, 2:], rtol=1e-5)
    assert run_steps(tmp_path / "moved" / "checkpoints") == run_steps(tmp_path / "whole" / "checkpoints")
