"""scripts/plan.py and train.py --dry-run as a user runs them, without a compiler of TPUs or GPUs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.config.hf import to_hf_config
from llama_jax.config.presets import PRESETS
from llama_jax.costs import tuned
from llama_jax.costs.estimate import Workload, memory
from llama_jax.costs.machines import machine
from llama_jax.plan.request import model
from llama_jax.train.choose import choose
from tests.builders import slow
from tests.processes import ROOT
from tests.train.test_recipes import FILES, read

KEYS = {
    "fits", "mesh", "devices", "parameter_bytes", "optimizer_bytes", "cache_bytes", "temporary_bytes", "peak_bytes",
    "host_bytes", "available_bytes", "flops", "estimated_cycles", "floor_cycles", "roofline_seconds", "mfu_bound",
    "compile_seconds", "compiler",
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Runs a script where no compiler can be found: an empty module stands before libtpu and the CUDA plugin."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in ('libtpu', 'jax_plugins')"
        " else find(name, *a)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{hidden}:{ROOT}"}

    def run(*args: str, script: str = "plan.py", code: int = 0) -> tuple[str, str]:
        command = [sys.executable, f"scripts/{script}", *args]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return run


def test_arithmetic_alone_is_labelled(plan):
    out, _ = plan("--model", "llama3.1-8b", "--machine", "v5litepod-16")
    assert "libtpu is not installed" in out
    assert 'pip install -e ".[tpu]"' in out
    assert "FITS" in out
    figures = [line for line in out.splitlines() if line.startswith("  ") and "available" not in line]
    assert all("arithmetic" in line or "data sheet" in line for line in figures)
    assert not any("   compiler" in line for line in figures)


def test_json(plan):
    out, _ = plan("--model", "llama3.1-70b", "--machine", "8xh100", "--mode", "decode", "--json")
    found = json.loads(out)
    assert found.keys() >= KEYS
    assert (found["said_by"], found["fits"], found["mesh"], found["devices"]) == ("arithmetic", True, {"tensor": 8}, 8)
    assert found["available_bytes"] == int(0.75 * 84978434048)
    assert found["parameter_bytes"] == pytest.approx(2 * 70_553_706_496 / 8, rel=1e-3)


def test_what_does_not_fit_says_what_would(plan):
    out, _ = plan("--model", "llama3.1-8b", "--machine", "v5litepod-4", code=3)
    assert "DOES NOT FIT" in out
    smallest = out.partition("machines that would: ")[2].split(",")[0]
    plan("--model", "llama3.1-8b", "--machine", smallest, "--batch", "4", "--seq", "4096")  # and it does
    out, _ = plan("--model", "llama3.1-8b", "--machine", "v5litepod-16", "--remat", "none", "--seq", "8192", code=3)
    assert "This would, by arithmetic: --mesh fsdp" in out
    options = out.partition("by arithmetic: ")[2].partition(" (")[0].split()
    plan("--model", "llama3.1-8b", "--machine", "v5litepod-16", "--seq", "8192", *options)  # and it does


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--model llama3.1-8b --machine v5litpod-16", "nearest names are v5litepod-16"),
        ("--model lama3.1-8b --machine v5p-8", "nearest are llama3.1-8b"),
        ("--model llama3.1-8b --machine v5p-128 --batch 100 --mesh fsdp=64", "does not divide among 64 devices"),
        ("--model llama3.1-8b --machine v5p-128 --mesh fsdp=32", "multiplies to 32, but v5p-128 has 64"),
        ("--model llama3.1-8b --machine v5p-8 --mesh fsdb=4", "unknown axis 'fsdb'"),
        ("--model llama2-7b --machine v5p-8 --seq 8192", "more than the model's context, 4096"),
        ("--model llama3.1-8b --machine v5p-8 --batch 0", "batch must be at least 1"),
        ("--model llama3.1-8b --machine v5p-8 --microbatches 0", "microbatches must be at least 1"),
        ("--model llama3.1-8b --machine 2xv5p-8 --mesh fsdp=8", "which only data may span"),
        ("--model llama3.1-8b --machine v5p-8 --mode decode --remat full", "remat is of training"),
        ("--model llama3.1-8b --machine v5p-8 --mode decode --microbatches 3", "microbatches are of training"),
        ("--model llama3.1-8b --machine v5p-8 --attention splash:7", "splash alone has blocks, of 1024"),
        ("--model llama3.1-8b --machine h100 --attention splash", "is not for h100"),
        ("--model llama3.1-8b --machine v5p-8 --compile -1", "compile must be at least 0"),
        ("--model llama3.1-8b --machine v5p-8 --plot /nowhere/x.png", "a folder that exists"),
        ("--update-table --model nosuch", "no row for model 'nosuch'"),
        ("--model llama3.1-8b", "give --model and --machine"),
        ("--model / --machine v5p-8", "config"),
    ],
)
def test_bad_input(args, words, monkeypatch, capsys):
    """In this process; `test_a_missing_folder_is_no_model` is one of its own."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *args.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "plan.py"), run_name="__main__")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert not out
    assert words in err
    assert err.startswith("error: ")


@pytest.mark.slow
def test_search_by_arithmetic_and_plot(plan, tmp_path):
    picture = tmp_path / "plan.png"
    args = ["--model", "llama2-70b", "--machine", "v6e-64", "--batch", "64", "--seq", "4096", "--search"]
    out, _ = plan(*args, "--plot", str(picture))
    assert "compiler " not in out.partition("available")[0]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    out, _ = plan(*args, "--json")
    found = json.loads(out)
    (row,) = tuned.rows_of(PRESETS["llama2-70b"], "train")
    assert found[0]["fits"]
    assert (found[0]["mesh"], found[0]["remat"], found[0]["microbatches"]) == (row.mesh, row.remat, row.microbatches)


def test_a_folder_as_model(plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(PRESETS["llama3.2-1b"], dtype="bfloat16")))
    out, _ = plan("--model", str(tmp_path), "--machine", "v5litepod-1", "--mode", "decode", "--json")
    assert json.loads(out)["parameter_bytes"] == pytest.approx(2 * PRESETS["llama3.2-1b"].param_count(), rel=1e-3)


def test_dry_run(plan):
    out, _ = plan("configs/pretrain_llama3_8b.py", "--dry-run", script="train.py")
    assert "pretrain_llama3_8b, training step, 2048 x 8192 tokens, on v5litepod-16" in out
    assert "FITS" in out


@pytest.mark.parametrize(
    "path", [*FILES[::4], *map(slow, (file for file in FILES if file not in FILES[::4]))], ids=lambda path: path.stem
)
def test_every_recipe_fits_somewhere(path):
    """What --dry-run would plan for."""
    from llama_jax.plan.request import of_recipe

    recipe, job = of_recipe(read(path.stem), "")
    assert memory(job).peak <= job.machine.chip.available
    assert recipe.batch.microbatches >= 1
    assert recipe.remat != "auto"
    assert recipe.mesh != "auto"


def test_what_is_open_is_chosen_from_the_table():
    recipe = read("pretrain_llama3_8b")
    chosen = choose(recipe, recipe.model, machine("v5litepod-16"))
    row = tuned.find(recipe.model, machine("v5litepod-16"), "train", 8192)
    assert row
    assert (chosen.mesh, chosen.remat) == ("fsdp=16", row.remat)
    assert chosen.batch.microbatches * 16 * row.rows == 2048
    other = choose(recipe, recipe.model, machine("v5p-32"))  # not in the table
    assert memory(Workload(recipe.model, machine("v5p-32"), "train", 2048, 8192, _sizes(other.mesh), other.remat,
                      other.batch.microbatches)).peak <= 0.9 * machine("v5p-32").chip.available  # fmt: skip
    on_cpu = choose(recipe, recipe.model, None)
    assert (on_cpu.mesh, on_cpu.remat, on_cpu.batch.microbatches) == ("auto", "full", 1)


def _sizes(text: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}


def test_memory_of_the_host_counts(plan):
    args = "--model llama3.1-8b --machine v5p-8 --remat offload --mesh tensor=4 --batch 64 --seq 8192 --microbatches 1"
    out, _ = plan(*args.split(), code=3)
    assert "137.44 GB of the host's memory are needed, about 112.00 GB available" in out


def test_a_damaged_table(monkeypatch, tmp_path):
    for text in ("{", "[{}]", '{"a": 1}', "[1]"):
        (tmp_path / "tuned.json").write_text(text)
        monkeypatch.setattr(tuned, "FILE", tmp_path / "tuned.json")
        tuned.table.cache_clear()
        with pytest.raises(ValueError, match=r"tuned\.json is damaged"):
            tuned.table()
    tuned.table.cache_clear()


@pytest.mark.parametrize("text", ["[1]", "{}", "[" * 100_000, "\x00", "{"])
def test_a_broken_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        model(str(tmp_path))


def test_a_row_of_another_length_is_not_taken():
    assert tuned.find(PRESETS["llama3.1-8b"], machine("v5p-128"), "train", 4096) is None
    row = tuned.find(PRESETS["llama3.1-8b"], machine("v5p-128"), "train", 131_072)
    assert row
    assert row.mesh["context"] == 8


def test_a_missing_folder_is_no_model(plan, tmp_path: Path):
    _, err = plan("--model", str(tmp_path / "nothing"), "--machine", "v5p-8", code=1)
    assert "is not known" in err
