"""Several processes on one machine compute what one does, read their share of the weights, and end together."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import threading
import zlib
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax import distributed
from llama_jax.distributed import meeting
from llama_jax.distributed.place import Place, find_place
from llama_jax.weights.load import read_model
from llama_jax.weights.open import open_checkpoint
from tests.builders import one_device, slow
from tests.distributed_worker import MESHES, compute
from tests.processes import HOST, ROOT, SHORT, free_port, outputs, said, worker

# --- The same results ---


def test_two_processes_compute_what_one_does(start, tmp_path):
    """2 x 4 devices, 1 x 8 and one: the same tokens, loss and gradients."""
    processes = worker(start, "save", tmp_path, devices=4)
    one = compute("tensor=1")
    eight = compute(MESHES[0])
    outputs(processes)
    for mesh in MESHES:
        two = np.load(tmp_path / f"{mesh}.npz")
        assert set(two) == set(one)
        for reference in (one, eight):
            for name, expected in reference.items():
                if name.startswith("tokens"):
                    assert two[name].tolist() == expected.tolist()
                    assert len(expected) == 12
                elif name == "loss":
                    np.testing.assert_allclose(two[name], expected, rtol=1e-6)
                else:
                    np.testing.assert_allclose(two[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("command", "stdin"),
    [
        slow(("generate.py", "--prompts-file", "-", "--json", "--temperature", "1"), "the quick brown\nit is a wolf\n"),
        slow(("chat.py",), "the fox\n/reset\n" + "the quick brown fox " * 60 + "\nthe wolf\n"),
    ],
    ids=["generate", "chat"],
)
def test_scripts_print_once_what_one_process_prints(start, model, command, stdin):
    script, *options = command
    options = (ROOT / "scripts" / script, *options, "--model", model, *SHORT)
    one, two = start(*options, count=1), start(*options)
    ((expected, expected_errors),) = outputs(one, stdin=stdin)
    (out, errors), silent = outputs(two, stdin=stdin)
    assert expected.count("\n") == 2
    assert out == expected
    assert errors == expected_errors  # a turn of chat.py that does not fit
    assert silent == ("", "")


@pytest.mark.slow
def test_each_process_reads_its_part(start, tmp_path):
    """Half of SmolLM2, of which a fifth (9 heads of 3 groups) lies whole on both of two tensor devices."""
    llama_jax.convert("smollm2-135m-instruct", tmp_path / "hf", to="hf", verify=False)
    total = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "hf")
    processes = worker(start, "count_bytes", tmp_path / "hf")
    whole = jax.tree.leaves(read_model(checkpoint, one_device(), dtype=None))
    expected = [zlib.crc32(np.ascontiguousarray(x).data) for x in whole]
    for _ in range(2):
        counts, hashes = said(processes[0])
        for counted, given in counts:
            assert counted == given
            assert counted / total == pytest.approx(0.5, abs=0.002)
        assert hashes == expected
    outputs(processes)


# --- One end for all ---


@pytest.mark.timing
@pytest.mark.parametrize("task", ["wait", "collective"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_by_name(start, task, victim, within):
    processes = worker(start, task)
    for process in processes:
        said(process)
    processes[victim].send_signal(signal.SIGKILL)
    with within(10):  # JAX's own detection takes 30 s, and names nobody
        _, errors = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == 1
    assert f"error: process {victim} of 2 ({HOST}) ended without a word" in errors


def test_an_error_ends_all(start):
    (_, errors), (_, traceback) = outputs(worker(start, "error", count=3)[:2], code=1)
    assert errors == f"error: process 1 of 3 ({HOST}) failed: KeyError: 'no such thing'\n"
    assert traceback.startswith("Traceback")
    assert traceback.endswith(f"error: process 1 of 3 ({HOST}): KeyError: 'no such thing'\n")


def test_a_value_that_will_not_come(start):
    """A bug in a program, not a wait without end."""
    (_, errors), _ = outputs(worker(start, "lost"), code=1)
    assert f"process 0 of 2 ({HOST}) has ended, and this one waits for its next value" in errors


def test_ctrl_c_ends_all(start, model):
    processes = start(ROOT / "scripts/chat.py", "--model", model, *SHORT)
    stdin, stdout = processes[0].stdin, processes[0].stdout
    assert stdin
    assert stdout
    stdin.write("the fox\n")
    stdin.flush()
    assert stdout.readline()
    processes[1].send_signal(signal.SIGINT)
    (_, errors), _ = (process.communicate(timeout=60) for process in processes)
    assert errors == f"error: process 1 of 2 ({HOST}) failed: interrupted\n"
    assert [process.returncode for process in processes] == [1, 130]


# --- The beginning ---


def meet(*starts: tuple[int, int, dict[str, str]], timeout: float = 20) -> list[str]:
    """What comes of processes that meet, each (process, number of processes, versions other than ours)."""
    address, answers = f"127.0.0.1:{free_port()}", queue.SimpleQueue()

    def run(order: int, process: int, count: int, changed: dict[str, str]) -> None:
        place = Place(address, count, process)
        try:
            hosts, connections = meeting.meet(place, distributed.versions() | changed, timeout)
            answers.put((order, hosts))
            [connection.close() for connection in connections.values()]
        except ValueError as error:
            answers.put((order, str(error)))

    threads = [threading.Thread(target=run, args=(order, *one)) for order, one in enumerate(starts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(answers.get() for _ in threads)
    return [re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", str(answer)) for _, answer in found]


def test_all_meet():
    assert meet(*((i, 3, {}) for i in (2, 0, 1))) == [str([HOST] * 3)] * 3


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([(0, 3, {}), (2, 3, {})], "process 1 of 3 did not arrive at ADDRESS within 1 s; arrived: 0 (HOST), 2 (HOST)"),
        ([(1, 2, {})], "process 1 of 2 (HOST) waited 1 s for process 0 at ADDRESS: nothing listens there"),
        (
            [(0, 2, {"jax": "0.1.1"}), (1, 2, {"jax": "0.1.2"})],
            "process 0 of 2 (HOST) runs jax 0.1.1 and process 1 of 2 (HOST) runs jax 0.1.2: install the same",
        ),
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], "two processes say that they are process 1 of 3, on HOST and on HOST"),
        ([(0, 3, {}), (1, 2, {})], "process 0 (HOST) was started as one of 3, process 1 (HOST) as one of 2"),
    ],
    ids=["one missing", "no process 0", "versions", "twice the same", "another number"],
)  # fmt: skip
def test_who_is_missing_or_different(starts, message):
    answers = meet(*starts, timeout=1)
    assert all(answer.startswith(message.replace("HOST", HOST)) for answer in answers), answers


def test_waiting_is_not_silent(monkeypatch, caplog):
    monkeypatch.setattr(meeting, "SAY_SECONDS", 0.2)
    meet((0, 2, {}), timeout=0.5)
    meet((1, 2, {}), timeout=0.5)
    texts = [re.sub(r":\d+", ":PORT", record.getMessage()) for record in caplog.records]
    assert texts == [
        "waiting at 127.0.0.1:PORT for process 1 of 2, 0.5 s at most",
        "waiting for process 0 at 127.0.0.1:PORT, 0.5 s at most: nothing listens there",
    ]


@pytest.mark.timing
def test_strangers_at_the_port(within):
    """Silence, half a line, another protocol and a bomb keep nobody waiting."""
    port = free_port()
    texts = (b"", b'{"process": 1', b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", b"[1]\n", b"\xff\n")
    place = Place(f"127.0.0.1:{port}", 2, 0)
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    hub = threading.Thread(target=lambda: found.put(meeting.meet(place, {}, 20)))
    hub.start()
    strangers = []
    while len(strangers) < len(texts):
        with contextlib.suppress(ConnectionRefusedError):
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[-1].sendall(texts[len(strangers) - 1])
    with within(5):
        hosts, connections = meeting.meet(place._replace(process_id=1), {}, 20)
        hub_hosts, hub_connections = found.get(timeout=20)
    assert hosts == hub_hosts == [HOST, HOST]
    hub.join()
    [x.close() for x in (*strangers, *connections.values(), *hub_connections.values())]


@pytest.mark.parametrize("answer", [b"[1]\n", b"[" * 100_000 + b"\n", b"HTTP/1.1 400\r\n", b""])
def test_something_else_at_the_address(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)
        with pytest.raises(ValueError, match="process 1 of 2 .* what answers there is not process 0 of this program"):
            meeting.meet(place, {}, 1)


def test_somebody_else_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)
        with pytest.raises(ValueError, match=rf"cannot listen on port {server.getsockname()[1]}.*choose another port"):
            meeting.meet(place, {}, 1)


def test_a_process_that_never_arrives(start):
    """The whole way: one line with what to do."""
    ((_, errors),) = outputs(worker(start, "alone", without=1), code=1)
    assert re.fullmatch(
        rf"error: process 1 of 2 did not arrive at 127.0.0.1:(\d+) within 2 s; arrived: 0 \({HOST}\)\. Start the same"
        r" command on every machine .*--worker=all.* let TCP port \1 through the firewall.*\n",
        errors,
    )


OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": str(n) for name, n in {"SIZE": 4, "RANK": 2, "LOCAL_RANK": 0}.items()}
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ("a:1234", 2, 1, None),
        ),
        (SLURM, ("node07:61441", 4, 3, [1])),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_COORDINATOR_ADDRESS": "a:1234"},
            ("a:1234", 4, 3, None),
        ),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (  # version 4
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.1.0.1:34911", "OMPI_VERSION": "4.1.4"},
            ("10.0.0.1:61441", 4, 2, [0]),
        ),
        (OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node-07-4097@1"}, ("node-07:61441", 4, 2, [0])),  # as 5.0.11 writes it
        (
            OPEN_MPI | {"PMIX_NAMESPACE": "prterun-vm-4097@1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            ("127.0.0.1:61441", 4, 2, [0]),
        ),
    ],
    ids=[
        "nothing",
        "alone",
        "variables",
        "slurm",
        "a node each",
        "one task",
        "one tpu host",
        "open mpi 4",
        "open mpi 5",
        "one machine",
    ],
)
def test_the_environment_says_which_process_this_is(monkeypatch, variables, place):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "PMIX_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place(None, None, None, 1.0) == place


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.2:8482", None, 0), "need --coordinator HOST:PORT, --num-processes N and --process-id I together"),
        (("10.0.0.2:8482", 2, 2), "--process-id must be from 0 to 1"),
        (("10.0.0.2:8482", 0, 0), "--num-processes must be at least 1, got 0"),
        (("10.0.0.2", 2, 1), "--coordinator must be HOST:PORT"),
        (("10.0.0.2:99999", 2, 1), "a port from 1 to 65535.*99999"),
        (("10.0.0.2:0", 2, 1), "a port from 1 to 65535"),
        (("::1:8482", 2, 1), r"write an IPv6 address in brackets: \[::1\]:8482"),
    ],
)
def test_incomplete_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_place(*arguments, timeout=1.0)
