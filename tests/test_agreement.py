"""What processes must have alike is compared before the first step, and named with both values."""

from __future__ import annotations

import queue
import shutil
import threading

import pytest

from llama_jax.distributed import agreement, meeting
from llama_jax.distributed.agreement import differences, fingerprint
from llama_jax.distributed.place import Place
from tests.processes import HOST, ROOT, free_port, outputs, said
from tests.train.corpora import random_documents, write_corpus

EVERYWHERE = f". All must have the same: start one command everywhere (process 1 is on {HOST})"
RECIPE = """
from llama_jax.config import ModelConfig
from llama_jax.train.recipe import *

def recipe():
    return Recipe(
        model=ModelConfig(
            vocab_size=256, embed_dim=32, mlp_dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
            norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_seq_len=512, tie_embeddings=True),
        data=Data(train=({train!r},)), batch=Batch(seq_len=32, sequences=4),
        optimizer=Optimizer(Schedule(peak=3e-3, steps=2)), tensorboard=False,
    )
"""


def test_differences_have_names():
    mine = {"a": {"b": 1, "c": (1, 2)}, "d": {"x": 1.5}, "same": [{"k": None}], "e": "text"}
    other = {"a": {"b": 2, "c": [1, 2]}, "d": None, "same": [{"k": None}], "f": 0}
    assert list(differences(mine, other)) == [
        ("a.b", 1, 2),
        ("d", {"x": 1.5}, None),
        ("e", "text", None),
        ("f", None, 0),
    ]
    assert agreement.message(3, "host", [("optimizer.peak", 0.03, 0.003), ("seed", None, 1)]).startswith(
        "process 3 has optimizer.peak = 0.03, process 0 has 0.003; seed = nothing, process 0: 1. All must have the same"
    )


def test_numbers_are_compared_as_numbers():
    mine = {"theta": 10_000, "clip": 1, "lists": (1, [2.0]), "nan": float("nan"), "flag": True, "text": "1"}
    other = {"theta": 10_000.0, "clip": 1.0, "lists": [1.0, [2]], "nan": float("nan"), "flag": 1, "text": 1}
    assert [name for name, _, _ in differences(mine, other)] == ["flag", "text"]


def test_flags_that_change_numbers(monkeypatch):
    """Which devices a process sees, where it writes what it dumps: that may differ."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_dump_to=/x --xla_a=2 --xla_force_host_platform_device_count=8")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    found = agreement.settings()
    assert found["XLA_FLAGS"] == "--xla_a=2 --xla_b=1"
    assert found["NVIDIA_TF32_OVERRIDE"] == "1"
    changing = {
        "jax_default_matmul_precision", "jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl",
        "jax_random_seed_offset", "jax_disable_most_optimizations", "jax_numpy_dtype_promotion",
    }  # fmt: skip
    free = {
        "jax_num_cpu_devices", "jax_compilation_cache_dir", "jax_debug_nans", "jax_log_compiles", "jax_platforms",
        "jax_traceback_filtering", "jax_cuda_visible_devices", "jax_dump_ir_to",
    }  # fmt: skip
    assert changing < found.keys()
    assert not free & found.keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"XLA_FLAGS": "--xla_a=2"}, "process 1 has XLA_FLAGS = --xla_a=2, process 0 has nothing"),
        ({"jax_enable_x64": "True"}, "process 1 has jax_enable_x64 = True, process 0 has False"),
    ],
)
def test_settings_are_compared_where_processes_meet(settings, words):
    """Before JAX starts; every process gets the same error."""
    address, answers = f"127.0.0.1:{free_port()}", queue.SimpleQueue()
    here = {"jax_enable_x64": "False"}

    def go(process: int) -> None:
        try:
            meeting.meet(Place(address, 2, process), {}, 20, here | settings if process else here)
        except ValueError as error:
            answers.put(str(error))

    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in threads:
        assert answers.get_nowait() == words + EVERYWHERE


def test_fingerprints(tmp_path):
    """Of copies the same; a changed byte at the start, in the middle or at the end, a size or a name is another."""
    one = tmp_path / "one"
    (one / "sub").mkdir(parents=True)
    (one / "weights").write_bytes(bytes(range(256)) * 100)
    (one / "sub" / "config.json").write_text("{}")
    shutil.copytree(one, tmp_path / "two")
    assert fingerprint(one) == fingerprint(tmp_path / "two")
    assert fingerprint(one).keys() == {"weights", "sub/config.json"}
    assert fingerprint(one / "weights")["file"] == fingerprint(one)["weights"]
    for position in (0, 25_600 // 2, 25_599):
        content = bytearray((one / "weights").read_bytes())
        content[position] ^= 1
        (tmp_path / "two" / "weights").write_bytes(content)
        assert fingerprint(one) != fingerprint(tmp_path / "two")


def test_two_processes_compare_and_compile(start, tmp_path):
    """At the second start both find what they compiled at the first."""
    for name in ("copy", "changed"):
        for i in range(2):
            (tmp_path / f"{name}{i}").mkdir()
            (tmp_path / f"{name}{i}" / "weights").write_bytes(bytes(10_000))
    (tmp_path / "changed1" / "weights").write_bytes(bytes(9_999) + b"x")
    for found in (False, True):
        processes = start("-m", "tests.agreement_worker", tmp_path, "copy,changed")
        texts, other = said(processes[0])
        assert texts == other
        assert texts[:4] == [
            "",
            f"process 1 has optimizer.peak = 0.03, process 0 has 0.003; seed = 5, process 0: 0{EVERYWHERE}",
            f"process 1 has only here = 1, process 0 has nothing{EVERYWHERE}",
            "",
        ]
        assert texts[4].startswith("process 1 has files.weights = 10000 bytes, ")
        assert texts[5] == "True"
        assert said(processes[0]) == [[3.0, found, found]] * 2
        outputs(processes)


def test_training_refuses_processes_that_differ(start, tmp_path):
    """One line on each, and nothing is trained: process 1 has another rate, seed and batch."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(train=str(write_corpus(tmp_path / "corpus", random_documents(40)))))
    command = tmp_path / "train.py"
    command.write_text(
        "import os, runpy, sys\n"
        "others = ['--optimizer.schedule.peak', '3e-2', '--seed', '5', '--batch.sequences', '8']\n"
        f"sys.argv = [{str(ROOT / 'scripts/train.py')!r}, *sys.argv[1:], *others * int(os.environ['JAX_PROCESS_ID'])]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = (
        "error: process 1 has batch.sequences = 8, process 0 has 4; optimizer.schedule.peak = 0.03, process 0: 0.003;"
        f" seed = 5, process 0: 0{EVERYWHERE}\n"
    )
    assert [err for _, err in outputs(start(command, path, "--output", tmp_path / "run"), code=1)] == [words] * 2
    assert not (tmp_path / "run").exists()


def test_training_refuses_other_data_in_the_same_place(start, tmp_path):
    """Each machine has its own copy; one of them was prepared from other texts."""
    for i in range(2):
        write_corpus(tmp_path / f"corpus{i}", random_documents(40, seed=i))
    path = tmp_path / "recipe.py"
    folder = f"{str(tmp_path)!r} + '/corpus' + os.environ['JAX_PROCESS_ID']"
    path.write_text("import os\n" + RECIPE.format(train="#").replace("'#'", folder))
    for _, err in outputs(start(ROOT / "scripts/train.py", path, "--output", tmp_path / "run"), code=1):
        assert err.startswith("error: process 1 has data.train = [{"), err
        assert not (tmp_path / "run").exists()


def test_generating_refuses_other_weights(start, model, tmp_path):
    """Each machine has its own copy of the model under one name; one has another number in it."""
    for i in range(2):
        shutil.copytree(model, tmp_path / str(i) / "model")
    file = tmp_path / "1" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)
    command = tmp_path / "generate.py"
    command.write_text(
        "import os, runpy, sys\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['JAX_PROCESS_ID']))\n"
        f"sys.argv[0] = {str(ROOT / 'scripts/generate.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for _, err in outputs(start(command, "--model", "model", "--prompt", "the fox", "--max-new-tokens", "2"), code=1):
        assert err.startswith(f"error: process 1 has model files.model.safetensors = {len(content)} bytes, "), err
