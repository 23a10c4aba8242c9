"""Where everything lies: parameters, caches and large intermediates of 8B and 70B on meshes of 8 and 16 devices.

Nothing is computed: programs are traced, where in Explicit mode the type of every intermediate says how it is split,
and lowered, where each argument and result carries it.
What is expected is written down here, from the design and not from the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.config import ModelConfig
from llama_jax.config.presets import PRESETS
from llama_jax.model import Llama
from llama_jax.sharding import ShardingRules
from tests.aot import machines
from tests.builders import slow, tiny_config

pytestmark = pytest.mark.unoptimized

MODELS = {"8B": PRESETS["llama3.1-8b"], "70B": PRESETS["llama3.1-70b"]}
MESHES = {
    8: ["fsdp=8", "tensor=8", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2", "context=8"],
    16: ["fsdp=16", "tensor=16", "data=2,fsdp=2,context=2,tensor=2"],
}
CASES = [(model, mesh) for model in MODELS for meshes in MESHES.values() for mesh in meshes]
B, T = 16, 2048  # rows divide by every data x fsdp
MEBIBYTE = 1 << 20
ROWS, TENSOR, WEIGHTS = {"data", "fsdp", "context"}, {"tensor_kv", "tensor_q"}, {"fsdp", "context"}


def abstract_mesh(config: ModelConfig, text: str) -> Any:
    """The mesh `text` of a machine without devices."""
    sizes = sharding.parse_mesh(text)
    kv = math.gcd(sizes.get("tensor", 1), config.num_kv_heads)
    shape = (*(sizes.get(axis, 1) for axis in ("data", "fsdp", "context")), kv, sizes.get("tensor", 1) // kv)
    axes = ("data", "fsdp", "context", "tensor_kv", "tensor_q")
    return jax.sharding.use_abstract_mesh(AbstractMesh(shape, axes, axis_types=(AxisType.Explicit,) * 5))


def expected(config: ModelConfig) -> dict[tuple[int, ...], list[set[str]]]:
    """For the sizes of each large array, over which mesh axes it is split at least (those of size 1 aside).

    Dimensions of size 1 and order left out: activations appear with rows merged, weights transposed.
    """
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    K, G, H, L = config.num_kv_heads, config.num_groups, config.head_dim, config.num_layers
    kinds: list[tuple[tuple[int, ...], set[str]]] = []
    for t in (T, 1, *(T // 2**n for n in range(1, 8))):  # parts of the sequence are the loss's chunks
        rows = ROWS if t > 1 else {"data", "fsdp"}
        kinds += [
            ((B, t, D), rows),  # the residual stream is whole along D
            ((B, t, H // 2), rows),  # angles
            ((B, t), rows),
            ((B, t, F), rows | TENSOR),
            ((B, t, V), rows | TENSOR),
            ((B, t, K, G, H), rows | TENSOR),
            ((B, t, K, H), rows | {"tensor_kv"}),  # the groups of a kv head share its keys
        ]
        kinds += [((B * shape[1], *shape[2:]), axes) for shape, axes in kinds if len(shape) > 1 and shape[0] == B]
        for merged in ((B * t, K * G * H), (B * t, K * G, H), (B, t, K * G, H)):
            kinds.append((merged, rows | TENSOR))
        kinds.append(((B * t, K * H), rows | {"tensor_kv"}))
    halves = [((*shape[:-1], H // 2), axes) for shape, axes in kinds if shape[-1] == H]  # RoPE's
    kinds += halves
    for shape, axes in (
        ((D, K, G, H), TENSOR), ((D, K, H), {"tensor_kv"}), ((D, F), TENSOR), ((D, V), TENSOR),
        ((D, K * G * H), TENSOR), ((D, K * H), {"tensor_kv"}),
    ):  # fmt: skip
        kinds += [(shape, axes), ((L, *shape), axes | WEIGHTS)]  # gathered for its use; together never
    kinds += [((L, B, T, D), ROWS), ((B, K, T, H), {"data", "fsdp", "context", "tensor_kv"})]
    for n in (2**i for i in range(8)):  # the loss's chunks, of the positions of each of c devices
        for c in (2**i for i in range(4)):
            kinds += [((n, B, T // n, D), ROWS), ((B, c, T // c, D), ROWS), ((B, c, n, T // c // n, D), ROWS)]
    kinds.append(((B, V), {"data", "fsdp"}))  # logits that are sampled from
    kinds.append(((B, K, G, T), {"data", "fsdp", "context"} | TENSOR))  # scores of one query
    kinds.append(((L, D), set()))  # norms
    table: dict[tuple[int, ...], list[set[str]]] = {}
    for shape, axes in kinds:
        table.setdefault(_key(shape), []).append(axes)
    return table


def _key(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def arrays(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Every input, output and intermediate, and what made it; not inside of kernels, where arrays are a device's."""
    for name, variables in (("input", jaxpr.invars), ("output", jaxpr.outvars)):
        yield from ((name, variable.aval) for variable in variables)
    for equation in jaxpr.eqns:
        where = f"{equation.primitive.name} at {equation.source_info.name_stack}"
        yield from ((where, variable.aval) for variable in equation.outvars)
        if equation.primitive.name not in ("shard_map", "pallas_call"):
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from arrays(inner)


LOWERED = re.compile(
    r"tensor<(?P<shape>(?:\d+x)+)(?P<dtype>\w+)> \{[^%{}]*"
    r"sdy\.sharding = #sdy\.sharding<@mesh, \[(?P<axes>(?:\{[^{}]*\}(?:, )?)*)\]>"
)


def lowered(text: str) -> Iterator[tuple[str, tuple[int, ...], int, set[str]]]:
    """Where, sizes, bytes and mesh axes of each argument and result of a program, as XLA gets it."""
    (main,) = re.findall(r"func\.func public @main\((.*)\{$", text, re.MULTILINE)
    for match in LOWERED.finditer(main):
        shape = tuple(int(size) for size in match["shape"].split("x")[:-1])
        bits = int(re.sub(r"\D", "", match["dtype"]))
        yield "lowered", shape, math.prod(shape) * bits // 8, set(re.findall(r'"(\w+)"', match["axes"]))


def violations(config: ModelConfig, traced: Any, sizes: dict[str, int]) -> list[str]:
    """Arrays of 1 MiB or more that lie whole along a mesh axis which should split them."""
    table, wide, found = expected(config), {axis for axis, size in sizes.items() if size > 1}, set()
    seen = [
        (where, aval.shape, aval.size * aval.dtype.itemsize, aval.sharding.spec)
        for where, aval in arrays(traced.jaxpr.jaxpr)
        if hasattr(aval, "shape") and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)
    ]
    typed = [(*x[:3], {axis for entry in x[3] for axis in sharding.axes_of(entry)}) for x in seen]
    given = list(lowered(traced.lower(lowering_platforms=("cpu",)).as_text()))
    assert sum(nbytes for _, _, nbytes, _ in given) > 2 * config.param_count()  # all parameters were found
    for where, shape, nbytes, used in [*typed, *given]:
        known = table.get(_key(shape))
        if nbytes < MEBIBYTE or wide <= used:
            continue
        if known is None:
            found.add(f"unknown {shape} from {where}")
        elif not any(axes & wide <= used for axes in known):
            found.add(f"{shape} from {where} is split over {used or 'nothing'}, not over {known}")
    return sorted(found)


def trace(config: ModelConfig, mesh: str, what: str, **options: Any) -> list[str]:
    with abstract_mesh(config, mesh):
        if what == "training":
            program, args = machines.training(config, B, T, attention="splash", **options)
        elif what == "decode":
            program, args = machines.decoding(config, B, T, **options)
        else:
            program, args = machines.prefilling(config, B, T, T, attention="splash", **options)
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        # Prefill has no use for the head.
        return violations(config, jax.jit(program, keep_unused=True).trace(*args), sizes)


@pytest.mark.parametrize("what", ["training", slow("prefill"), "decode"])
@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_nothing_large_is_whole_where_it_should_be_split(model, mesh, what):
    assert not trace(MODELS[model], mesh, what)


@pytest.mark.parametrize(
    ("rules", "mesh", "what"),
    [
        (ShardingRules(mlp=None), "fsdp=2,tensor=4", "training"),
        (ShardingRules(vocab=None), "tensor=8", "decode"),
        (ShardingRules(embed=None), "fsdp=8", "training"),
        (ShardingRules(embed="fsdp"), "fsdp=2,context=2,tensor=2", "training"),
        (ShardingRules(groups=None), "tensor=16", "decode"),
        (ShardingRules(seq=None, cache_seq=None), "context=8", "prefill"),
        (ShardingRules(batch="data"), "data=2,fsdp=2,tensor=2", "decode"),
        (ShardingRules(cache_seq=None), "context=8", "decode"),
        (ShardingRules(kv_heads=None), "tensor=8", "decode"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(k for k, v in vars(x).items() if v != vars(ShardingRules())[k]),
)
def test_a_broken_rule_is_caught(rules, mesh, what):
    found = trace(MODELS["8B"], mesh, what, rules=rules)
    assert found
    assert not any(text.startswith("unknown") for text in found), found


@pytest.mark.parametrize(
    ("mesh", "specs"),
    [
        ("fsdp=8", {
            "embed": P(None, "fsdp"), "wq": P("fsdp", None, None, None), "wk": P("fsdp", None, None),
            "wo": P(None, None, None, "fsdp"), "w_gate": P("fsdp", None), "w_down": P(None, "fsdp"),
            "lm_head": P("fsdp", None), "cache": P("fsdp", None, None, None),
        }),
        ("tensor=16", {
            "embed": P(("tensor_kv", "tensor_q"), None), "wq": P(None, "tensor_kv", "tensor_q", None),
            "wk": P(None, "tensor_kv", None), "wo": P("tensor_kv", "tensor_q", None, None),
            "w_gate": P(None, ("tensor_kv", "tensor_q")), "w_down": P(("tensor_kv", "tensor_q"), None),
            "lm_head": P(None, ("tensor_kv", "tensor_q")), "cache": P(None, "tensor_kv", None, None),
        }),
        ("data=2,fsdp=2,context=2,tensor=2", {
            "embed": P("tensor_kv", ("fsdp", "context")), "wq": P(("fsdp", "context"), "tensor_kv", None, None),
            "wk": P(("fsdp", "context"), "tensor_kv", None), "wo": P("tensor_kv", None, None, ("fsdp", "context")),
            "w_gate": P(("fsdp", "context"), "tensor_kv"), "w_down": P("tensor_kv", ("fsdp", "context")),
            "lm_head": P(("fsdp", "context"), "tensor_kv"), "cache": P(("data", "fsdp"), "tensor_kv", "context", None),
        }),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("model", MODELS)
def test_parameters_and_cache(model, mesh, specs, stacked):
    config = MODELS[model]
    with abstract_mesh(config, mesh):
        llama = Llama(config, dtype="bfloat16", param_dtype="bfloat16", stacked=stacked, rngs=None)
        cache = jax.eval_shape(lambda: llama.init_cache(B, T))
    layers = (None,) if stacked else ()
    block = llama.blocks if stacked else llama.blocks[-1]
    assert llama.embed.get_value().sharding.spec == specs["embed"]
    assert llama.lm_head.get_value().sharding.spec == specs["lm_head"]
    for module, name in (("attn", "wq"), ("attn", "wk"), ("attn", "wo"), ("mlp", "w_gate"), ("mlp", "w_down")):
        leaf = getattr(getattr(block, module), name).get_value()
        assert leaf.sharding.spec == P(*layers, *specs[name]), name
    for leaf in jax.tree.leaves(cache):
        assert leaf.sharding.spec == P(*layers, *specs["cache"])


class Device:
    """A chip of a slice, as `make_mesh` sees it."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index
        self.coords, self.core_on_chip = (number % 4 % 2, number % 4 // 2, 0), 0
        self.client = self


def test_data_goes_over_slices():
    devices = [Device(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh(tiny_config(), data=2, fsdp=2, tensor=2, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[0] == 0).all()
    assert (slices[1] == 1).all()
    with pytest.raises(ValueError, match="2 slices, which only `data` may span.*make data a multiple of 2"):
        sharding.make_mesh(tiny_config(), fsdp=4, tensor=2, devices=devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=2,tensor=2", r"multiplies to 4, but there are 8 \(cpu\) devices: make it 8, for example .*data=2"),
        ("tensor=3", r"multiplies to 3, .*make it 8, or show this program fewer devices \(JAX_NUM_CPU_DEVICES\)"),
        ("fsdp=4,tensor=4", r"needs 16 devices, but there are 8 \(cpu\). On a CPU, JAX_NUM_CPU_DEVICES=16"),
    ],
)
def test_a_mesh_that_does_not_multiply_to_the_devices(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.mesh_of(tiny_config(), text)
