"""One of the processes that test_distributed.py starts; JAX_COORDINATOR_ADDRESS and its kin say which.

Imports are made where they are needed: most tasks are over in a second.
"""

from __future__ import annotations

import json
import sys
import time
import zlib

import jax
import numpy as np

from llama_jax import distributed
from llama_jax.cli import fail_clearly

MESHES = ("data=2,fsdp=2,tensor=2",)


def compute(mesh: str) -> dict[str, np.ndarray]:
    """Sampled tokens, and the loss and its gradient, of a tiny model."""
    from llama_jax import generate
    from llama_jax.config import ModelConfig
    from llama_jax.train.losses import cross_entropy
    from tests.infer.helpers import random_ids, random_llama

    jax.config.update("jax_disable_most_optimizations", True)
    config = ModelConfig(
        vocab_size=256, embed_dim=64, mlp_dim=160, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16,
        norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_seq_len=512, tie_embeddings=False,
    )  # fmt: skip
    llama = random_llama(config, mesh=mesh, stacked=True)
    prompts = [random_ids(n) for n in (3, 16, 21)]
    completions = generate(llama, prompts, max_new_tokens=12, temperature=1.0, seed=7)

    rows = np.stack([random_ids(17, seed=i) for i in range(8)]).astype(np.int32)
    mask_BT = np.arange(16) < np.arange(9, 17)[:, None]
    with jax.set_mesh(llama.mesh):
        where = llama.model.rules.sharding(("batch", "seq"), mask_BT.shape)
        tokens_BT, targets_BT, mask_BT = (distributed.put(x, where) for x in (rows[:, :-1], rows[:, 1:], mask_BT))

        @jax.jit
        @jax.value_and_grad
        def step(model, tokens_BT, targets_BT, mask_BT):
            x_BTD, _ = model.hidden(tokens_BT)
            return cross_entropy(model, x_BTD, targets_BT, mask_BT).mean

        loss, gradients = step(llama.model, tokens_BT, targets_BT, mask_BT)
        paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(gradients), strict=True)
        names = map(jax.tree_util.keystr, paths)
        found = dict(zip(["loss", *names], distributed.fetch(loss, *leaves), strict=True))
    return found | {f"tokens of prompt {i}": np.array(c.tokens) for i, c in enumerate(completions)}


def save(folder: str) -> None:
    for mesh in MESHES:
        found = compute(mesh)
        if distributed.is_main():
            np.savez(f"{folder}/{mesh}.npz", allow_pickle=False, **found)


def count_bytes(checkpoint: str) -> None:
    """What each process reads of a checkpoint: as `read_model` counts, and as the tensors give."""
    from llama_jax.sharding import mesh_of
    from llama_jax.weights.load import read_model
    from llama_jax.weights.open import open_checkpoint
    from llama_jax.weights.source import Tensor

    opened, read, given = open_checkpoint(checkpoint), Tensor.read, []

    def counting(self: Tensor, index: tuple = ()) -> np.ndarray:
        part = read(self, index)
        given.append(part.nbytes)
        return part

    Tensor.read = counting  # pyright: ignore[reportAttributeAccessIssue]
    for mesh in ("tensor=2", "fsdp=2"):
        counted: list[int] = []
        given.clear()
        model = read_model(opened, mesh_of(opened.config, mesh), dtype=None, advance=counted.append)
        with jax.set_mesh(mesh_of(opened.config, mesh)):
            hashes = [zlib.crc32(np.ascontiguousarray(distributed.fetch(x)[0]).data) for x in jax.tree.leaves(model)]
        say([distributed.gather([sum(counted), sum(given)]), hashes])


def wait() -> None:
    """Process 0 reads, the others wait for what it will say."""
    say(distributed.gather(distributed.process_index()))
    if distributed.is_main():
        time.sleep(100)
    distributed.broadcast(None)


def collective() -> None:
    """Sums over all devices, without end."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    x = distributed.put(np.ones(jax.device_count(), np.float32), jax.NamedSharding(mesh, jax.P("all")))
    with jax.set_mesh(mesh):
        total = jax.jit(lambda x: jax.reshard(x, jax.P()).sum())
        say(float(total(x)))
        while True:
            float(total(x))


def error() -> None:
    """Process 1 has a bug."""
    if distributed.process_index() == 1:
        raise KeyError("no such thing")
    wait()


def lost() -> None:
    """Process 0 ends while the other waits."""
    if not distributed.is_main():
        distributed.broadcast(None)


def say(value: object) -> None:
    print("said", json.dumps(value), flush=True)


if __name__ == "__main__":
    with fail_clearly():
        task, *args = sys.argv[1:]
        distributed.initialize(timeout=2 if task == "alone" else 60)
        globals()[task](*args)
