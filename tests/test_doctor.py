"""scripts/doctor.py: what it says of a machine, of two processes, and of what is wrong; and the pages that name it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax.doctor import examine as examine_module
from llama_jax.doctor import machine
from llama_jax.doctor.examine import Child, examine
from llama_jax.doctor.finding import OK, PROBLEM, Finding, between, problem, ranges, rows

ROOT = Path(__file__).parents[1]
DOCTOR = ROOT / "scripts" / "doctor.py"


@pytest.fixture
def environment(tmp_path):
    return os.environ | {"LLAMA_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}


def start(*options: object, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(DOCTOR), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str], *, seconds: float = 60) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    return process.returncode, out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def problems(report: dict) -> list[dict]:
    return [f for f in report["findings"] if f["status"] == PROBLEM]


def test_one_machine_in_a_table(environment, tmp_path):
    code, out = end(start("--checkpoint-dir", tmp_path / "run" / "1", environment=environment))
    assert code == 0, out
    for words in ("python", "jax 0.", "flax 0.", "cache is writable (will be made)", "2 cpu (cpu) here", "all is well"):
        assert words in " ".join(re.sub("[│┃]", " ", out).split()), words  # a long path is wrapped
    assert re.search(r"matmul .* right; 1024", out)
    assert re.search(r"all-reduce .* right over 2 devices", out)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_two_processes_and_what_one_of_them_cannot_write(environment, tmp_path):
    address = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--timeout", 30)
    (tmp_path / "file").touch()
    broken = environment | {"LLAMA_JAX_CACHE": str(tmp_path / "file" / "cache")}
    one = start(*address, "--process-id", 1, environment=broken)
    code, out = end(start(*address, "--process-id", 0, "--json", environment=environment))
    assert end(one) == (1, "")  # process 0 prints for both
    report = json.loads(out)
    assert code == 1
    assert not report["ok"]
    (wrong,) = problems(report)
    assert (wrong["process"], wrong["check"]) == (1, "cache folder")
    assert "LLAMA_JAX_CACHE" in wrong["remedy"]
    values = [(f["process"], f["value"]) for f in report["findings"]]
    assert (0, "all 2 met at " + address[1]) in values
    for process in (0, 1):
        assert (process, "4 in 2 processes, 2 cpu (cpu) here") in values
        assert any(p == process and v.startswith("right over 4 devices") for p, v in values)
        assert any(p == process and f"jax {machine.versions()['jax']}" in v for p, v in values)


@pytest.mark.timing
def test_a_process_that_never_comes_and_a_port_where_nobody_listens(environment, timed):
    closed = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--timeout", 2)
    alone = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 3, "--timeout", 2)
    begin = time.monotonic()
    started = [start(*closed, "--process-id", 1, environment=environment),
               start(*alone, "--process-id", 0, "--json", environment=environment)]  # fmt: skip
    code, out = end(started[0])
    assert code == 1
    assert f"{closed[1]}: nothing listens there" in out
    assert f"TCP port {closed[1].rpartition(':')[2]} through the firewall" in out
    code, out = end(started[1])
    (wrong,) = problems(json.loads(out))
    assert code == 1
    assert f"process 1, 2 of 3 did not arrive at {alone[1]}" in wrong["value"]
    assert "--worker=all" in wrong["remedy"]
    assert not timed or time.monotonic() - begin < 40


def test_a_port_that_is_taken(environment):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        taken = start("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", 0,
                      environment=environment)  # fmt: skip
        code, out = end(taken)
    assert code == 1
    assert f"cannot listen on port {port}" in out
    assert "choose another port" in out


@pytest.mark.parametrize(
    ("installed", "words", "remedy"),
    [
        ({"jax": "0.11.1", "flax": "0.12.8"}, "flax 0.12.8 cannot import flax.nnx with jax 0.11.1", "flax>=0.12.9"),
        ({"jax": "0.10.2", "jaxlib": "0.9.0"}, "jax 0.10.2 needs jaxlib", "jaxlib<"),
        ({"jax": "0.10.2", "libtpu": "0.0.7"}, "jax 0.10.2 needs libtpu", "pip install -U"),
        ({"jax": "0.10.2", "jax-cuda12-plugin": "0.9.0"}, "jax 0.10.2 needs jax-cuda12-plugin", "pip install -U"),
    ],
)
def test_versions_that_do_not_go_together(monkeypatch, installed, words, remedy):
    required = {
        "jax": [
            "jaxlib<=0.10.2,>=0.10.1",
            'libtpu==0.0.42.*; extra == "tpu"',
            'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda"',
            'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
        ]
    }
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: required.get(name))
    (found,) = machine.pairs({"flax": "0.13.0"} | installed)
    assert found.status == PROBLEM
    assert words in found.value
    assert remedy in found.remedy
    monkeypatch.undo()
    assert not list(machine.pairs(machine.versions()))  # what runs here goes together


def test_accelerators_that_jax_cannot_use(monkeypatch):
    monkeypatch.setattr(machine, "tpu_chips", lambda: 4)
    monkeypatch.setattr(machine, "nvidia_gpus", lambda: 8)
    tpu, gpu = machine.accelerators({"jax": "0.10.2"})
    assert ("4 TPU chips" in tpu.value, tpu.remedy) == (True, 'pip install -e ".[tpu]"')
    assert ("8 NVIDIA GPUs" in gpu.value, gpu.remedy) == (True, 'pip install -e ".[cuda]"')
    assert not list(machine.accelerators({"libtpu": "0.0.42", "jax-cuda12-plugin": "0.10.2"}))


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert machine.writable("x", str(tmp_path), 5, "").status == OK
    assert machine.writable("x", str(tmp_path / "a" / "b"), 5, "").value == f"{tmp_path}/a/b is writable (will be made)"
    found = machine.writable("x", str(tmp_path / "file" / "a"), 5, "give another")
    assert (found.status, found.remedy) == (PROBLEM, "give another")
    monkeypatch.setattr(machine.os, "fsync", lambda file: time.sleep(5))  # a dead network mount
    found = machine.writable("x", str(tmp_path), 0.1, "")
    assert (found.status, "no answer in 0.1 s" in found.value) == (PROBLEM, True)


def test_a_bucket_says_which_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    found = machine.writable("x", "gs://bucket/run", 20, "")
    assert found.status == PROBLEM
    assert found.remedy == "pip install gcsfs"


def test_proxies_are_named(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    (found,) = machine.proxies("10.0.0.2:8482")
    assert found.remedy == "export no_proxy=10.0.0.2"
    monkeypatch.setenv("no_proxy", "localhost,10.0.0.2")
    assert not machine.proxies("10.0.0.2:8482")


def test_what_hangs_or_dies_is_a_problem(monkeypatch):
    monkeypatch.setattr(examine_module, "sys", type("", (), {"executable": shutil.which("sh")}))
    for code, words, remedy in (
        ("sleep 60", "no answer in 0.5 s", "nothing else may use the devices"),
        ("echo 'F1125 03:02 client.h:80] Internal error when accessing libtpu multi-process lockfile' >&2; kill -6 $$",
         "signal SIGABRT", "libtpu_lockfile"),
        ("echo 'error: process 1 of 2 (a) ended without a word: killed, out of memory' >&2; exit 1",
         "process 1 of 2 (a)", "output of that process"),
        ('echo \'{"error": "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"}\'', "CUDA_ERROR", "nvidia-smi"),
    ):  # fmt: skip
        monkeypatch.setattr(examine_module, "PROBE", code)
        child = Child({})
        found = child.listen("devices", 0.5)
        child.end(0)
        assert isinstance(found, Finding)
        assert found.status == PROBLEM
        assert words in found.value
        assert remedy in found.remedy


def test_incomplete_options_are_a_problem(environment):
    report = examine(num_processes=2, timeout=20)
    (wrong,) = (f for f in report.findings if f.status == PROBLEM)
    assert "--coordinator HOST:PORT, --num-processes N and --process-id I together" in wrong.value


def test_rows_and_versions_of_many_processes():
    def versions(process: int, jax: str) -> Finding:
        return Finding("versions", OK, f"jax {jax}, flax 0.12.9, numpy 2.{process}", process=process)

    found = [versions(i, "0.11.0" if i == 5 else "0.10.2") for i in range(8)]
    (wrong,) = between(found)
    assert wrong.value == "not the same everywhere: process 0-4, 6-7: jax 0.10.2; process 5: jax 0.11.0"
    assert not between([f for f in found if f.process != 5])
    alike = [Finding("disk", OK, "9 GiB", process=i) for i in range(64)]
    assert [(who, f.value) for who, f in rows(alike)] == [("0-63", "9 GiB")]
    differ = [Finding("matmul", OK, f"{i} ms", process=i) for i in range(64)] + [problem("matmul", "wrong", "mend")]
    assert len(rows(differ)) == 5
    assert ranges([3, 1, 2, 9]) == "1-3, 9"


# The pages and what they tell people to run.

PAGES = sorted((ROOT / "docs").glob("*.md"))
LAUNCH = sorted((ROOT / "scripts" / "launch").iterdir())


def commands() -> dict[str, set[str]]:
    """Options of each script that the pages and launch files use."""
    found: dict[str, set[str]] = {}
    for file in [*PAGES, *LAUNCH]:
        text = file.read_text().replace("\\\n", " ")
        for script, rest in re.findall(r"(scripts/\w+\.py)([^\n|;&#`)]*)", text):
            found.setdefault(script, set()).update(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest))
    return found


def test_pages_name_scripts_and_options_that_exist():
    found = commands()
    assert {"scripts/doctor.py", "scripts/chat.py", "scripts/generate.py"} <= set(found)
    helps = {
        script: subprocess.Popen([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for script in found
        if (ROOT / script).exists()
    }
    assert set(helps) == set(found)
    for script, process in helps.items():
        text, _ = process.communicate(timeout=60)
        assert found[script] <= set(re.findall(r"--[a-z][a-z-]+", text)), script


def test_pages_name_files_that_exist():
    for page in PAGES:
        for name in re.findall(r"(?:scripts|docs|llama_jax)/[\w/.-]+\.(?:py|sh|yaml|md)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_architecture_names_functions_that_exist():
    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                yield from names(node.body, f"{node.name}.") if isinstance(node, ast.ClassDef) else ()
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):  # tables
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "llama_jax"
    hops = re.findall(r"`(\w+[\w/]*/\w+\.py|\w+\.py)::([A-Za-z]\w*(?:\.\w+)?)`", text.replace("`file.py::name`", ""))
    assert len(hops) > 40
    for file, name in hops:
        assert name in names(ast.parse((package / file).read_text()).body), f"{file}::{name}"
    files = re.findall(r"`(\w+/[\w/]+\.(?:py|json))`", text.replace("/NAME.py", ""))
    assert not [file for file in files if not (package / file).exists() and not (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_shell_in_pages_is_shell_and_its_variables_are_set(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    script = "\n".join(blocks)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    given = set(re.findall(r"(?:^|\s)(?:export )?([A-Z][A-Z0-9_]+)=", script)) | {"HOME", "USER", "PWD"}
    assert set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", script)) <= given


def test_launch_files():
    for file in LAUNCH:
        if file.suffix == ".sh":
            done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
            assert not done.returncode, done.stderr
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface-hub")
    (jobset,) = yaml.safe_load_all((ROOT / "scripts" / "launch" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips * job["completions"]
    assert 8482 in [port["containerPort"] for port in container["ports"]]
