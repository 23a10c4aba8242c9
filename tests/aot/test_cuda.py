"""Programs compiled by the real CUDA compiler for 8 H100: python -m pytest -m cuda_compiler (the `cuda` extra)."""

from __future__ import annotations

import math

import jax
import pytest

from llama_jax.config.presets import PRESETS
from tests.aot import machines

pytestmark = pytest.mark.cuda_compiler

EIGHT = PRESETS["llama3.1-8b"]


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize(("K", "G"), [(8, 1), (2, 4), (1, 8)], ids=["mha", "gqa 4", "mqa 8"])
@pytest.mark.parametrize("H", [64, 128])
def test_cudnn_attention_and_its_gradient(H, K, G, packed):
    devices = machines.h100s()
    with jax.set_mesh(machines.mesh_of(EIGHT, "fsdp=8", devices)):
        program, args = machines.attention(8, 2048, K, G, H, packed=packed)
        text = machines.compile_for(devices, program, *args).as_text()
    assert "__cudnn$fmha" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text or "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    # Of packed rows the mask, which all heads share; never scores, which each head has.
    squares = [shape for _, shape in machines.arrays(text) if shape.count(2048) > 1]
    assert not [shape for shape in squares if not packed or math.prod(shape) > 2048**2]


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,context=2"])
def test_training_at_8192_has_no_scores_and_no_whole_logits(mesh):
    devices, T, V = machines.h100s(), 8192, EIGHT.vocab_size
    with jax.set_mesh(machines.mesh_of(EIGHT, mesh, devices)):
        program, args = machines.training(EIGHT, 8, T)
        compiled = machines.compile_for(devices, program, *args)
    found = machines.arrays(compiled.as_text())
    assert not [shape for _, shape in found if shape.count(T) > 1 and math.prod(shape) > T**2]  # the mask has T * T
    assert not [shape for dtype, shape in found if dtype == "f32" and V in shape and T in shape]
    memory = compiled.memory_analysis()
    print(f"8B, loss and gradient, 8 rows of {T} on 8 H100, {mesh}: {machines.gigabytes(compiled)}")
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < 80e9
