"""One of the processes that test_agreement.py starts: compares facts, files and programs with the others."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.cli import fail_clearly
from llama_jax.distributed.agreement import fingerprint
from tests.distributed_worker import say


class Slow:
    """A program that process 1 takes long to compile; it leaves a file when it is done."""

    def __init__(self, done: Path):
        self.done = done

    def compile(self, options: object) -> str:
        if not distributed.is_main():
            time.sleep(0.5)
            self.done.touch()
        return "program"


def refusal(facts: dict) -> str:
    try:
        distributed.agree(facts)
    except distributed.DisagreementError as error:
        return str(error)
    return ""


def main(folder: Path, copies: str) -> None:
    i = distributed.process_index()
    found = [
        refusal({"optimizer": {"peak": 0.003}, "stages": [(1, 2)]}),
        refusal({"optimizer": {"peak": (0.003, 0.03)[i], "b1": 0.9}, "seed": (0, 5)[i]}),
        refusal({"mesh": "fsdp=2", **({"only here": 1} if i else {})}),
        *(refusal({"files": fingerprint(folder / f"{name}{i}")}) for name in copies.split(",")),
    ]
    done = folder / "compiled by process 1"
    distributed.compile_together(Slow(done))
    found.append(str(done.exists()))
    say(distributed.gather(found))

    # Programs in the compilation cache, of all processes.
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))  # pyright: ignore[reportArgumentType]
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = jax.make_mesh((2,), ("all",))
    x = distributed.put(np.arange(2, dtype=np.float32), jax.NamedSharding(mesh, jax.P("all")))
    with jax.set_mesh(mesh):
        total = float(jax.jit(lambda x: jax.reshard(x * 3, jax.P()).sum())(x))
    hits = events.count("/jax/compilation_cache/cache_hits")
    say(
        distributed.gather([total, hits > 0, hits == events.count("/jax/compilation_cache/compile_requests_use_cache")])
    )


if __name__ == "__main__":
    with fail_clearly():
        distributed.initialize(timeout=60)
        main(Path(sys.argv[1]), sys.argv[2])
