"""Plans by the real CUDA compiler: python -m pytest -m cuda_compiler -k plan (the `cuda` extra)."""

from __future__ import annotations

import pytest

from llama_jax.costs import tuned
from llama_jax.plan.make import by_arithmetic, cost_plan

ROWS = [row for row in tuned.table() if row.job.machine.chip.platform == "cuda"]


@pytest.mark.cuda_compiler
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.mode}-{row.machine}")
def test_the_table_fits(row):
    plan = cost_plan(row.job, say=print)
    assert plan.compiled
    assert plan.fits
    print(f"{row.machine}: peak {plan.peak_bytes / 1e9:.2f} of {plan.available_bytes / 1e9:.2f} GB")
    assert by_arithmetic(row.job).peak_bytes == pytest.approx(plan.peak_bytes, rel=0.15)
    assert plan.flops == pytest.approx(plan.work.flops, rel=0.15)
