"""Plans of fine-tuning by the real compilers: python -m pytest tests/aot/test_plan_finetune.py -m tpu_compiler, or
cuda_compiler."""

from __future__ import annotations

import re

import pytest

from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import machine
from llama_jax.plan.make import by_arithmetic, cost_plan
from llama_jax.plan.request import job

ADAPTER = Adapter(rank=16, alpha=32.0)
TPU, CUDA = pytest.mark.tpu_compiler, pytest.mark.cuda_compiler
CASES = [
    pytest.param("llama3.1-8b", "v5litepod-8", 8, ADAPTER, None, marks=TPU, id="LoRA 8B v5e-8"),
    pytest.param("llama3.1-8b", "v5litepod-8", 8, ADAPTER, "nf4", marks=TPU, id="QLoRA 8B v5e-8"),
    pytest.param("llama3.1-70b", "v6e-8", 8, ADAPTER, "nf4", marks=TPU, id="QLoRA 70B v6e-8"),
    pytest.param("llama3.1-8b", "v5litepod-16", 16, None, None, marks=TPU, id="SFT 8B v5e-16"),
    pytest.param("llama3.1-8b", "h100", 1, ADAPTER, None, marks=CUDA, id="LoRA 8B H100"),
    pytest.param("llama3.1-70b", "h100", 1, ADAPTER, "nf4", marks=CUDA, id="QLoRA 70B H100"),
]


@pytest.mark.parametrize(("model", "on", "batch", "adapter", "quantize"), CASES)
def test_it_fits_as_arithmetic_says(model, on, batch, adapter, quantize):
    """Rows of 4096 tokens: the peak is within 10 %."""
    asked, _ = job(PRESETS[model], on, "train", batch=batch, seq_len=4096, adapter=adapter, quantize=quantize)
    plan = cost_plan(asked, floor=False, say=print)
    assert plan.compiled
    expected = by_arithmetic(asked).peak_bytes
    print(f"{model} on {on}, {quantize}: peak {plan.peak_bytes / 1e9:.2f} GB, by arithmetic {expected / 1e9:.2f},"
          f" of {plan.available_bytes / 1e9:.2f}")  # fmt: skip
    assert plan.fits
    assert expected == pytest.approx(plan.peak_bytes, rel=0.10)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("seq_len", [2048, 4096])
def test_frozen_weights_have_no_gradient(seq_len):
    """Of three products with each weight two are left; attention, which has no weights, costs what it did."""
    found = {}
    for name, adapter in (("full", None), ("adapter", ADAPTER)):
        asked = Workload(
            PRESETS["llama3.1-8b"], machine("v6e-8"), "train", 8, seq_len, {"fsdp": 8}, "matmuls", adapter=adapter
        )
        found[name] = cost_plan(asked, floor=False, say=print)
    ratio = found["adapter"].flops / found["full"].flops
    print(f"{seq_len} tokens: {ratio:.3f} of the FLOPs of a full step")
    assert ratio <= {2048: 0.70, 4096: 0.71}[seq_len]
    if seq_len == PRESETS["llama3.1-8b"].embed_dim:
        return  # activations have the shape of weights then
    shapes = re.findall(r"= f32\[(?:32,)?(?:4096,14336|14336,4096|128256,4096)\]", found["adapter"].compiled.text)
    assert not shapes  # float32 of a frozen matrix's size is its gradient
