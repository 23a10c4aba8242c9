"""`llama-jax NAME`, from a clone and from a wheel. What the commands do is tested through scripts/NAME.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from llama_jax.commands import COMMANDS
from tests.processes import ROOT, SHORT

MAIN = "import sys; from llama_jax.commands import main; sys.argv[0] = 'llama-jax'; "


def run(*args: object, code: int = 0, before: str = "", after: str = "") -> tuple[str, str]:
    command = [sys.executable, "-c", f"{MAIN}{before}\ntry: main()\nfinally: {after or 'pass'}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_help_names_every_command_and_imports_little():
    heavy = "{'jax', 'numpy', 'tyro', 'rich'} & set(sys.modules)"
    out, err = run("--help", after=f"print({heavy}, file=sys.stderr)")
    assert err == "set()\n"
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert run(code=2)[1] == out
    scripts = {file.stem.replace("_", "-") for file in (ROOT / "scripts").glob("*.py")}
    assert scripts == set(COMMANDS)


@pytest.mark.parametrize(("name", "near"), [("genrate", "generate"), ("prepare_data", "prepare-data")])
def test_an_unknown_command_is_a_usage_error(name, near):
    assert run(name, code=2) == ("", f"error: no command {name!r}: did you mean {near}?\n")
    assert "usage: llama-jax" in run("zzzz", code=2)[1]


def test_help_of_a_command_has_its_name():
    out, _ = run("prepare-data", "--help")
    assert "\n    llama-jax prepare-data books/" in out
    assert "llama-jax train trains on the folder" in out
    assert ".py" not in out.partition("options")[0].replace("*.py", "")
    assert run("train", "--help")[0].startswith("usage: llama-jax train pretrain_tiny_cpu [-h]")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion():
    script, _ = run("--tyro-print-completion", "bash")
    assert run("plan", "--tyro-print-completion", "bash")[0].splitlines()[:9] == script.splitlines()[:9]
    ask = "\n".join([
        script, 'f=$(complete -p llama-jax); f=${f##*-F }; f=${f%% *}',
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); $f; echo "${COMPREPLY[@]}"; }',
        'try llama-jax pr; try llama-jax convert a b --to ""; try llama-jax bench --rec',
    ])  # fmt: skip
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["prepare-data", "hf meta gguf native", "--record"]


@pytest.mark.slow
def test_a_benchmark_is_recorded(model, environment, tmp_path):
    sizes = ("--batch", "1", "--new-tokens", "2", "--prefill-tokens", "8", "--repeats", "1")
    command = [sys.executable, ROOT / "scripts/bench.py", "--model", model, *sizes, "--json"]
    for _ in range(2):
        done = subprocess.run([*command, "--record", tmp_path / "a" / "b"], stdout=subprocess.PIPE, env=environment)
        assert done.returncode == 0
    last = [json.loads(line) for line in (tmp_path / "a" / "b").read_text().splitlines()][1]
    assert last["figures"] == json.loads(done.stdout)
    assert [row["what"] for row in last["figures"]["measurements"]] == ["decode", "prefill"]
    assert last["machine"]["devices"] == ["cpu"]
    assert last["versions"]["jax"] == importlib.metadata.version("jax")
    assert last["commit"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, environment):
    """Runs `llama-jax` of a wheel of this package, installed beside the environment's other packages."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "llama_jax", source / "llama_jax", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    if importlib.util.find_spec("setuptools"):  # else pip fetches it
        pip.append("--no-build-isolation")
    subprocess.run([*pip, "--target", folder, source], check=True, cwd=source, timeout=300)
    variables = environment | {"PYTHONPATH": str(folder)}

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        command = [folder / "bin" / "llama-jax", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=source.parent, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    return run


def test_a_wheel(wheel, model, tmp_path):
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert wheel("--version")[0] == f"llama-jax {version.split(chr(34))[1]}\n"
    assert "--prompts-file" in wheel("generate", "--help")[0]
    out, err = wheel("generate", "--prompt", "the quick", "--model", model, *SHORT, "--json")
    assert json.loads(out)["prompt"] == "the quick"
    assert err == ""
    for args in (("bench",), ("train", "configs/pretrain_tiny_cpu.py"), ("train", "--help")):
        assert "of the repository" in wheel(*args, code=1)[1]
    recipe = shutil.copy(ROOT / "configs" / "pretrain_tiny_cpu.py", tmp_path / "own.py")
    assert json.loads(wheel("train", recipe, "--print-config", "--steps", 7)[0])["steps"] == 7
    wheel("plan", "--model", "llama3.1-8b", "--machine", "v5litepod-4", "--compile", 0, code=3)
