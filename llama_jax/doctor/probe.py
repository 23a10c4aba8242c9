"""The checks that need JAX. They run in a process of their own, which may hang or crash: `examine` watches it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.doctor.finding import Finding, fine, one_line, problem, warning
from llama_jax.doctor.machine import GIB, nvidia_gpus, tpu_chips
from llama_jax.typing import JsonObject


def probe(arguments_json: str) -> None:
    """Runs in the child: writes a line of JSON for each stage to the original standard output."""
    arguments = json.loads(arguments_json)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        _probe(arguments, answer)
    except Exception as error:  # whatever it is, the parent shows it
        what = one_line(error) or one_line(traceback.format_exc())
        answer(error=what if isinstance(error, ValueError) else f"{type(error).__name__}: {what}")
        from llama_jax import distributed

        distributed.fail(f"doctor.py found: {one_line(error)}")  # the others need not wait
        os._exit(1)


def _probe(arguments: JsonObject, answer: Callable[..., None]) -> None:
    from llama_jax import distributed
    from llama_jax.distributed.place import find_place

    timeout = arguments.pop("timeout")
    place = find_place(**arguments, timeout=timeout)
    where = (place.address, place.num_processes, place.process_id) if place else (None, 1, 0)
    answer(coordinator=where[0], processes=where[1], process=where[2])
    line = sys.stdin.readline()
    if not line:  # the parent has stopped listening
        return
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()  # ends with the parent
    distributed.initialize(**arguments, timeout=timeout)
    answer()

    def all_of(findings: list[JsonObject]) -> list[JsonObject]:
        return [finding for each in distributed.gather(findings) for finding in each]

    answer(all=all_of(json.loads(line)))
    found = []
    for stage in (_devices, _matmul, _all_reduce):
        new = [dataclasses.asdict(dataclasses.replace(f, process=where[2])) for f in stage()]
        found += new
        answer(found=new)
    answer(all=all_of(found))
    distributed.shutdown()
    os._exit(0)


def _devices() -> Iterator[Finding]:
    import jax
    from jax.extend import backend

    local, everywhere = jax.local_devices(), jax.devices()
    platform_name, kind = local[0].platform, local[0].device_kind
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    each = f", {limit / GIB:.1f} GiB each" if limit else ""
    total = f"{len(everywhere)} in {jax.process_count()} processes, " if jax.process_count() > 1 else ""
    yield fine("devices", f"{total}{len(local)} {kind} ({platform_name}) here{each}")
    if {(d.platform, d.device_kind) for d in everywhere} != {(platform_name, kind)}:
        kinds = ", ".join(sorted({d.device_kind for d in everywhere}))
        yield problem("devices", f"of several kinds: {kinds}", "use machines of one kind")
    counts = {sum(d.process_index == i for d in everywhere) for i in range(jax.process_count())}
    if len(counts) > 1:
        yield problem(
            "devices",
            f"processes have {' or '.join(map(str, sorted(counts)))} devices",
            "give each process the same number: see JAX_LOCAL_DEVICE_IDS, CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES",
        )
    if platform_name != "cpu":
        version = one_line(backend.get_backend().platform_version)
        yield fine("runtime", version)
        return
    for what, count, name in (("TPU chips", tpu_chips(), "tpu"), ("NVIDIA GPUs", nvidia_gpus(), "cuda")):
        chosen = os.environ.get("JAX_PLATFORMS")
        if count and chosen:
            yield warning("devices", f"JAX_PLATFORMS={chosen} hides {count} {what}", "unset JAX_PLATFORMS")
        elif count:
            why = f"`JAX_PLATFORMS={name} python -c 'import jax; jax.devices()'` says why"
            yield problem("devices", f"JAX uses the CPU, but there are {count} {what}", why)


def _matmul() -> Iterator[Finding]:
    import jax
    import numpy as np

    size = 1024
    a_NN = (np.arange(size)[:, None] + np.arange(size)) % 3
    b_NN = (np.arange(size)[:, None] * np.arange(size)) % 3
    expected = a_NN.astype(np.float64) @ b_NN  # small integers: exact in every precision
    multiply, seconds = jax.jit(lambda a, b: a @ b), []
    for device in jax.local_devices():
        a, b = (jax.device_put(x.astype(np.float32), device) for x in (a_NN, b_NN))
        wrong = not np.array_equal(np.asarray(multiply(a, b)), expected)
        if wrong:
            yield problem("matmul", f"{device} computes a wrong product", "the device is broken: replace it")
            return
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    yield fine("matmul", f"right; {size} x {size} in {max(seconds) * 1e3:.1f} ms")


def _all_reduce() -> Iterator[Finding]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    n, size = len(jax.devices()), 1 << 20
    mesh = jax.make_mesh((n,), ("all",))

    def row(index: Any) -> np.ndarray:
        return np.full((1, size), (index[0].start or 0) + 1, np.float32)

    x = jax.make_array_from_callback((n, size), NamedSharding(mesh, P("all")), row)
    with jax.set_mesh(mesh):
        total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), out_specs=P()))
        wrong = [s.device for s in total(x).addressable_shards if not (np.asarray(s.data) == n * (n + 1) / 2).all()]
        start = time.perf_counter()
        total(x).block_until_ready()
        seconds = time.perf_counter() - start
    if wrong:
        remedy = "run it again on fewer machines to find the one that is broken, and replace it"
        yield problem("all-reduce", f"a wrong sum on {', '.join(map(str, wrong))}", remedy)
        return
    yield fine("all-reduce", f"right over {n} devices; 4 MiB of each in {seconds * 1e3:.1f} ms")
