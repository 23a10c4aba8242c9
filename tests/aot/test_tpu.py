"""Programs compiled by the real TPU compiler: python -m pytest -m tpu_compiler (needs the `tpu` extra; 4 minutes)."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from llama_jax.config.presets import PRESETS
from llama_jax.train import build
from tests.aot import machines

pytestmark = pytest.mark.tpu_compiler

EIGHT, SEVENTY = PRESETS["llama3.1-8b"], PRESETS["llama3.1-70b"]


@pytest.mark.parametrize(("K", "G"), [(8, 1), (2, 4), (1, 8)], ids=["mha", "gqa 4", "mqa 8"])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_attention_and_its_gradient(topology, H, K, G):
    """Packed rows of 2048 tokens over fsdp=2,context=2; the scores of a head would be 8 MB."""
    devices = machines.tpu(topology)
    with jax.set_mesh(machines.mesh_of(EIGHT, "fsdp=2,context=2", devices)):
        program, args = machines.attention(2, 2048, K, G, H, packed=True)
        text = machines.compile_for(devices, program, *args).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # forward, gradient of q, gradient of k and v
    assert not [shape for _, shape in machines.arrays(text) if shape[-2:] in ((1024, 2048), (2048, 1024))]


def test_training_at_8192_has_no_scores_and_no_whole_logits():
    devices, T, V = machines.tpu("v5e:4x4"), 8192, EIGHT.vocab_size
    with jax.set_mesh(machines.mesh_of(EIGHT, "fsdp=16", devices)):
        program, args = machines.training(EIGHT, 16, T)
        compiled = machines.compile_for(devices, program, *args)
    found = machines.arrays(compiled.as_text())
    assert not [shape for _, shape in found if shape.count(T) > 1]
    assert not [shape for dtype, shape in found if dtype == "f32" and V in shape and T in shape]
    print(f"8B, loss and gradient, 16 rows of {T} on v5e 4x4, fsdp=16: {machines.gigabytes(compiled)}")


def test_the_step_of_the_8b_recipe_fits_on_v5e_16():
    """With a sequence a chip in each microbatch; compiling fails above 16 GB."""
    devices = machines.tpu("v5e:4x4")
    path = Path(__file__).parents[2] / "configs" / "pretrain_llama3_8b.py"
    recipe = runpy.run_path(str(path))["recipe"]()
    recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, microbatches=128))
    with jax.set_mesh(machines.mesh_of(recipe.model, "fsdp=16", devices)):
        step, args = build.abstract_step(recipe)
        compiled = step.lower(*args).compile()
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes / 1e9
    print(f"8B, a step of 128 microbatches of 16 x 8192, v5e 4x4: peak {peak:.2f} GB; {machines.gigabytes(compiled)}")
    state = 12 * recipe.model.param_count() / 16  # float32: parameters and Adam's two means
    assert memory.alias_size_in_bytes == pytest.approx(state, rel=0.001)
    assert memory.argument_size_in_bytes < state * 1.01 + 0.3e9  # and the batch


def test_two_slices():
    """Each slice has the whole model, and within it every array is where it would be in one slice."""
    devices = machines.tpu("v5e:4x4", num_slices=2)
    mesh = machines.mesh_of(EIGHT, "data=2,fsdp=16", devices)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with jax.set_mesh(mesh):
        program, args = machines.training(EIGHT, 32, 4096)
        compiled = machines.compile_for(devices, program, *args)
    print(f"8B, loss and gradient, 32 rows of 4096 on two v5e 4x4, data=2,fsdp=16: {machines.gigabytes(compiled)}")


def test_training_at_131072_fits_on_v5p_128():
    devices = machines.tpu("v5p:4x4x4")
    with jax.set_mesh(machines.mesh_of(EIGHT, "fsdp=8,context=8", devices)):
        program, args = machines.training(EIGHT, 8, 131072)
        compiled = machines.compile_for(devices, program, *args)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(f"8B, 8 rows of 131072 on v5p-128: {total / 1e9:.2f} GB: {machines.gigabytes(compiled)}")
    assert total < 95e9  # compiling fails above that, too


def test_a_prompt_of_131072_over_context():
    devices = machines.tpu("v5p:2x2x2")
    with jax.set_mesh(machines.mesh_of(EIGHT, "context=8", devices)):
        program, args = machines.prefilling(EIGHT, 1, 131072, 131072)
        compiled = machines.compile_for(devices, program, *args)
    cache = 2 * EIGHT.num_layers * 131072 * EIGHT.num_kv_heads * EIGHT.head_dim * 2
    print(f"8B, prompt of 131072 on 8 v5p, context=8: {machines.gigabytes(compiled)}")
    assert compiled.memory_analysis().output_size_in_bytes == pytest.approx(cache / 8, rel=0.01)


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_70b_on_sixteen_chips(what):
    """Eight kv heads, tensor=16."""
    devices = machines.tpu("v5e:4x4")
    mesh = machines.mesh_of(SEVENTY, "tensor=16", devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor_kv": 8, "tensor_q": 2}
    with jax.set_mesh(mesh):
        if what == "decode":
            program, args = machines.decoding(SEVENTY, 8, 4096)
            compiled = machines.compile_for(devices, program, *args, donate_argnums=1)
        else:
            program, args = machines.prefilling(SEVENTY, 8, 1024, 4096)
            compiled = machines.compile_for(devices, program, *args)
    weights = 2 * SEVENTY.param_count() / 16
    print(f"70B {what} on v5e 4x4, tensor=16: weights {weights / 1e9:.2f}, {machines.gigabytes(compiled)}")
    # The cache is split over the 8 kv heads, and the two devices that share one hold the same.
    cache = 2 * 2 * 80 * 8 * 4096 * 8 * 128 / 8 if what == "decode" else 0  # 80 layers of 8 kv heads, in bfloat16
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(weights + cache, rel=0.03)
