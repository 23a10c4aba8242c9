"""What a step needs, by arithmetic: bytes of each device, FLOPs, traffic, and the least time by the data sheets.

Names: P parameters, D embed_dim, F mlp_dim, V vocab_size, L layers, N query heads, K kv heads, H head_dim, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from llama_jax.config import ModelConfig
from llama_jax.config.adapter import Adapter
from llama_jax.config.params import group_size
from llama_jax.config.quantization import quantized_bytes
from llama_jax.costs.machines import Machine
from llama_jax.costs.mfu import training_flops
from llama_jax.costs.weights import block_bytes, factors, shard, weights

Mode = Literal["train", "prefill", "decode"]
AXES = ("data", "fsdp", "context", "tensor")
LOSS_TOKENS = 1024  # of a device in a chunk of the loss


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step to plan.

    Attributes:
      config: the model.
      machine: what it runs on.
      mode: train (packed rows, AdamW, float32 parameters, bfloat16 computation), prefill (whole prompts) or decode (one
        token for each row), in bfloat16.
      batch: sequences in the whole step, over all devices.
      seq_len: tokens of a sequence; of decode the slots of the cache.
      mesh: sizes of the axes data, fsdp, context, tensor that are more than 1.
      remat: of training, see `model.REMAT`.
      microbatches: of training: parts of the batch, one after the other.
      attention: its implementation, "auto" or a name, such as "splash:512".
      compiler_options: beyond the defaults.
      adapter: of training: it alone trains, on weights in bfloat16; None trains all parameters.
      quantize: with an adapter, the form of the layers' matrices, of `config.quantization`; None is bfloat16.
    """

    config: ModelConfig
    machine: Machine
    mode: Mode
    batch: int
    seq_len: int
    mesh: Mapping[str, int]
    remat: str = "full"
    microbatches: int = 1
    attention: str = "auto"
    compiler_options: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)
    adapter: Adapter | None = None
    quantize: str | None = None

    @property
    def ways(self) -> dict[str, int]:
        """Devices along each mesh axis, tensor in its two parts (see `sharding`)."""
        sizes = {axis: self.mesh.get(axis, 1) for axis in AXES}
        tensor = sizes.pop("tensor")
        kv = math.gcd(tensor, self.config.num_kv_heads)
        return {**sizes, "tensor_kv": kv, "tensor_q": tensor // kv}

    @property
    def tokens(self) -> int:
        """Of one microbatch on one device; of decode one for each row."""
        ways = self.ways
        rows = self.batch // self.microbatches / (ways["data"] * ways["fsdp"])
        length = 1 if self.mode == "decode" else self.seq_len / ways["context"]
        return math.ceil(max(rows, 1) * length)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each device, by arithmetic.

    Attributes:
      parameters: as they are stored.
      optimizer: Adam's means.
      gradients: as they are held at the peak.
      cache: keys and values.
      saved: what the forward pass keeps for the backward pass.
      workspace: the most that one block, or the loss, needs at once.
      arguments: parameters, optimizer, cache and the batch.
      host: of the host's memory.
      results: in memory of their own: the cache that prefill makes.
    """

    parameters: int
    optimizer: int
    gradients: int
    cache: int
    saved: int
    workspace: int
    arguments: int
    host: int
    results: int = 0

    @property
    def temporaries(self) -> int:
        """All that is neither argument nor result."""
        return self.gradients + self.saved + self.workspace

    @property
    def peak(self) -> int:
        """Arguments, temporaries, and results in memory of their own."""
        return self.arguments + self.temporaries + self.results


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device has to do in a step, at least.

    Attributes:
      flops: with what is computed again.
      model_flops: without, the convention of MFU.
      memory_bytes: from and to its memory.
      link_bytes: received over the interconnect.
      waited_bytes: of these, what the next product waits for: reductions of `tensor`, keys of `context`.
      network_bytes: received from other slices or machines.
    """

    flops: float
    model_flops: float
    memory_bytes: float
    link_bytes: float
    waited_bytes: float
    network_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step, by the rates of the data sheet.

    Attributes:
      compute: seconds of its FLOPs.
      memory: seconds of its traffic with memory.
      interconnect: seconds of what it receives over its links.
      network: seconds of what it receives from other slices or machines; 0 where the rate is not known.
      waited: of the interconnect's, what the next product waits for.
      mfu: the bound on model FLOPs utilisation that follows.
      tokens_per_second: the bound of the whole machine.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    waited: float
    mfu: float
    tokens_per_second: float

    @property
    def expected(self) -> float:
        """What configurations are ranked by: the bound, and what nothing hides."""
        return self.seconds + self.waited

    @property
    def seconds(self) -> float:
        """Of the slowest of them, all others hidden behind it."""
        return max(self.compute, self.memory, self.interconnect, self.network)

    @property
    def bound_by(self) -> str:
        """What is slowest."""
        times = {name: getattr(self, name) for name in ("compute", "memory", "interconnect", "network")}
        return max(times, key=lambda name: times[name])


# Of a block's backward pass, in multiples of its matrices, of [T, D] and of [T, F] in bfloat16: what is held at once.
# Fitted to what libtpu allocates for 8B, 70B and 405B.
_HELD_MATRICES, _HELD_EMBED, _HELD_MLP = 0.75, 3.0, 7.5


def memory(job: Workload) -> Memory:
    """What each device needs, by arithmetic; compilers are within 15 % of the peak (docs/planning.md has the table)."""
    blocks, tables, vectors = 0, 0, 0
    for weight in weights(job.config):
        size = shard(job, weight.shape, weight.axes) * max(1, weight.layers)
        if not weight.is_matrix:
            vectors += size
        elif weight.layers:
            blocks += size
        else:
            tables += size
    make = _training if job.mode == "train" else _serving
    return make(job, blocks, tables, vectors)


def _local(job: Workload) -> tuple[int, int, int, int]:
    """Sizes on one device, whole where the mesh does not divide them: query heads x H, kv heads x H, F and V."""
    config, ways = job.config, job.ways
    TP = ways["tensor_kv"] * ways["tensor_q"]
    keys = config.num_kv_heads // ways["tensor_kv"] * config.head_dim
    groups = config.num_groups // (ways["tensor_q"] if config.num_groups % ways["tensor_q"] == 0 else 1)
    F, V = (size // TP if size % TP == 0 else size for size in (config.mlp_dim, config.vocab_size))
    return keys * groups, keys, F, V


def _training(job: Workload, blocks: int, tables: int, vectors: int) -> Memory:
    config, ways = job.config, job.ways
    D, V, L, T = config.embed_dim, config.vocab_size, config.num_layers, job.tokens
    heads, keys, mlp, vocab = _local(job)
    adapted, gates = factors(job)
    head_gradient = 0 if job.adapter else 4 * shard(job, (D, V), ("embed", "vocab"))
    trained = adapted if job.adapter else blocks + tables + vectors
    frozen = block_bytes(job) + 2 * (tables + vectors) + 4 * gates if job.adapter else 0
    parameters = frozen + 4 * trained
    batch = 16 * T * job.microbatches  # tokens, targets, positions, segments
    of_blocks = 4 * adapted if job.adapter else 2 * blocks
    accumulated = (4 * adapted if job.adapter else 4 * (blocks + tables)) if job.microbatches > 1 else 0
    gradients = accumulated + of_blocks + head_gradient

    size = 2 * T * D  # of a block's input
    kept = {"none": 15 * size + 2 * T * (2 * heads + 2 * keys + 6 * mlp),
            "matmuls": 2 * size + 2 * T * (2 * heads + 2 * keys + 2 * mlp),
            "attention": size + 2 * T * (2 * heads + 2 * keys)}.get(job.remat, size)  # fmt: skip
    group = group_size(L)
    saved = {"groups": (L // group + group) * size, "offload": 2 * size}.get(job.remat, L * kept)
    host = L * size if job.remat == "offload" else 0

    matrices = sum(
        shard(job, weight.shape, weight.axes, gathered=True)
        for weight in weights(config) if weight.layers and weight.is_matrix
    )  # fmt: skip
    keys_of_all = 4 * keys * T * (ways["context"] - 1)
    block = 2 * (_HELD_MATRICES * matrices + T * (_HELD_EMBED * D + _HELD_MLP * mlp)) + keys_of_all
    chunk = min(T, LOSS_TOKENS)
    head = 2 * shard(job, (D, V), ("embed", "vocab"), gathered=True)
    loss = 2 * head + chunk * vocab * 6 + size
    at_loss = saved + accumulated + loss + head_gradient
    at_block = saved + gradients + block
    workspace = int(max(at_loss, at_block) - saved - gradients)
    arguments = parameters + 8 * trained + batch
    return Memory(parameters, 8 * trained, gradients, 0, int(saved), max(0, workspace), arguments, int(host))


def _serving(job: Workload, blocks: int, tables: int, vectors: int) -> Memory:
    config, ways, T = job.config, job.ways, job.tokens
    heads, keys, mlp, _ = _local(job)
    rows = math.ceil(job.batch / (ways["data"] * ways["fsdp"]))
    slots = job.seq_len // ways["context"] if job.seq_len % ways["context"] == 0 else job.seq_len
    cache = 4 * config.num_layers * rows * keys * slots
    parameters = 2 * (blocks + tables + vectors)
    if job.mode == "decode":
        logits = 8 * rows * config.vocab_size
        return Memory(parameters, 0, 0, cache, 0, logits + 2 * T * mlp, parameters + cache, 0)
    workspace = 2 * T * (3 * config.embed_dim + 2 * mlp + 2 * heads)
    return Memory(parameters, 0, 0, cache, 0, workspace, parameters, 0, results=cache)


# Products that the backward pass computes again, as shares of: qkv, attention, out, gate and up, down.
_AGAIN = {
    "none": (0, 0, 0, 0, 0), "matmuls": (0, 0, 0, 0, 0), "attention": (0, 0, 1, 1, 0), "full": (1, 1, 1, 1, 0),
    "groups": (2, 2, 2, 2, 1), "offload": (1, 1, 1, 1, 0),
}  # fmt: skip


def work(job: Workload) -> Work:
    """The least that each device has to do in a step: products, and traffic that cannot be avoided."""
    config, ways = job.config, job.ways
    D, L = config.embed_dim, config.num_layers
    heads, keys, mlp, vocab = _local(job)
    TP, T = ways["tensor_kv"] * ways["tensor_q"], job.tokens * job.microbatches
    length = job.seq_len if job.mode == "decode" else job.seq_len / 2  # keys that a query sees, on average
    products = (2 * D * (heads + 2 * keys), 4 * heads * length, 2 * heads * D, 4 * D * mlp, 2 * D * mlp)  # of a token
    block, head = sum(products), 2 * vocab * D
    matrices = 2 * D * (heads + keys) + 3 * D * mlp  # of a block, whole but for `tensor`
    activations = 2 * (8 * D + 4 * heads + 4 * keys + 5 * mlp)  # bytes read and written, a token and block
    if job.mode != "train":
        return _work_of_serving(job, block, head, matrices, activations)

    again = sum(share * product for share, product in zip(_AGAIN[job.remat], products, strict=True))
    again += products[1] * (1.5 if job.machine.chip.platform == "tpu" else 0.5)  # kernels keep no scores
    # MFU counts what the model needs: a share of it, where all of it divides.
    model_flops = training_flops(config, job.seq_len) * job.batch * job.seq_len / job.machine.devices
    passes_of_weights = 2 if job.adapter else 3  # forward, backward, and the weights' own gradients
    flops = passes_of_weights * T * (L * block + head) + T * L * again
    if job.adapter:
        thin = factors(dataclasses.replace(job, mesh={}))[0] / (TP * max(1, job.config.num_layers))
        flops += 6 * T * L * thin
        model_flops *= 2 / 3
    M, W = job.microbatches, ways["fsdp"] * ways["context"]
    parameters = L * matrices + D * vocab * (1 if config.tie_embeddings else 2)
    trained = factors(job)[0] * W if job.adapter else parameters
    whole = 2 * M * L * matrices  # the blocks' weights in bfloat16, once a microbatch
    if job.quantize:
        whole *= quantized_bytes(job.quantize, D, numbers=D * D, outputs=D) / (2 * D * D)
    recomputed = job.remat not in ("none", "matmuls")
    passes = 1 + any(_AGAIN[job.remat]) + (job.remat == "groups")
    # Weights are gathered and read twice, their gradients written and read.
    traffic = (4 if W > 1 else 2) if job.adapter else (7 if W > 1 else 4)
    memory = (
        whole * traffic
        + L * T * activations * (3 + recomputed)
        + T * vocab * 12  # logits and their gradient
        + 32 * trained / W  # the optimizer
    )
    chunks = math.ceil(job.tokens / LOSS_TOKENS)
    gathers = _gather(whole, W) * passes_of_weights
    gathers += M * chunks * _gather(2 * vocab * D, W) * 2
    waited = L * _all_reduce(2 * T * D, TP) * (4 + recomputed)
    waited += L * passes * _gather(4 * keys * T * ways["context"], ways["context"]) * 1.5
    replicas = _all_reduce(2 * trained / W, ways["data"])
    slices = job.machine.slices
    if slices == 1:
        return Work(flops, model_flops, memory, gathers + waited + replicas, waited, 0)
    network = replicas
    if job.machine.chip.platform == "cuda" and ways["data"] < slices:  # then fsdp goes over the machines too
        network += gathers * (slices - 1) / slices
    return Work(flops, model_flops, memory, gathers + waited, waited, network)


def _work_of_serving(job: Workload, block: float, head: float, matrices: float, activations: float) -> Work:
    """As `work`, of prefill and decode; of one token and block its FLOPs, elements of matrices and bytes."""
    config, ways, T = job.config, job.ways, job.tokens
    D, L, TP = config.embed_dim, config.num_layers, ways["tensor_kv"] * ways["tensor_q"]
    heads, keys, mlp, vocab = _local(job)
    decode = job.mode == "decode"  # prefill leaves the head to it
    rows = job.batch / (ways["data"] * ways["fsdp"])
    held = 2 * (L * matrices + decode * vocab * D)
    cache = 4 * L * math.ceil(rows) * keys * job.seq_len / ways["context"]
    waited = 2 * L * _all_reduce(2 * T * D, TP)
    if decode and ways["context"] > 1:  # each device multiplies with its part of the weights; sums are exchanged
        held /= ways["context"]
        waited += L * _all_reduce(2 * T * (heads + 2 * keys + 2 * mlp), ways["context"])
        waited += L * _gather(4 * T * D, ways["context"])
        gathers = _gather(held, ways["fsdp"])
    else:
        gathers = _gather(held, ways["fsdp"] * ways["context"])
        waited += 0 if decode else L * _gather(4 * keys * job.seq_len * rows, ways["context"])
    flops = (T * L * block + decode * rows * head) / (ways["context"] if decode else 1)
    memory = held + cache + L * T * activations
    network = 0.0
    if job.machine.slices > 1 and ways["data"] < job.machine.slices:
        network = (gathers + waited) * (job.machine.slices - 1) / job.machine.slices
    return Work(flops, flops, memory, gathers + waited, waited, network)


def _gather(size: float, ways: int) -> float:
    """Bytes that a device receives where `size` bytes are gathered from `ways` devices, or summed and scattered."""
    return size * (ways - 1) / ways


def _all_reduce(size: float, ways: int) -> float:
    return 2 * _gather(size, ways)


def kernel_flops(job: Workload, kernels: Iterable[tuple[str, int]]) -> float:
    """FLOPs of attention kernels, which a compiled program does not show: by what each name computes.

    Args:
      job: what they are part of.
      kernels: name of each, and how often it runs.
    """
    ways = job.ways
    product = job.tokens * job.seq_len * job.config.num_heads * job.config.head_dim
    product /= ways["tensor_kv"] * ways["tensor_q"]  # two FLOPs, half of the keys
    found = 0.0
    for name, times in kernels:
        if not any(word in name for word in ("splash", "fmha")):
            continue
        backward = "Backward" in name
        products = 4 if "dkv" in name else 3 if "dq" in name else 5 if backward else 2
        found += times * products * product
    return found


def roofline(job: Workload, work: Work) -> Roofline:
    """The least time of a step on the job's machine."""
    chip = job.machine.chip
    compute, memory = work.flops / chip.flops, work.memory_bytes / chip.bandwidth
    link = work.link_bytes / chip.link
    network = work.network_bytes / chip.network if chip.network else 0.0
    seconds = max(compute, memory, link, network)
    tokens = job.batch * (1 if job.mode == "decode" else job.seq_len)
    return Roofline(
        compute,
        memory,
        link,
        network,
        work.waited_bytes / chip.link,
        work.model_flops / chip.flops / seconds,
        tokens / seconds,
    )
