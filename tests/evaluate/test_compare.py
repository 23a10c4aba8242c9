"""verify.py's comparison: the same in every format, and each kind of difference found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_jax.evaluate.compare import compare
from llama_jax.weights.save import convert
from tests.builders import LLAMA32, hf_model, tiny_config, write_hf

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify.py"
CONFIG = tiny_config(num_kv_heads=2, head_dim=64, rope_theta=5e5, rope_scaling=LLAMA32, max_seq_len=131072)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    hf = hf_model(CONFIG)
    write_hf(folder / "a", hf)
    return folder, hf


@pytest.mark.slow
def test_the_same_model_in_another_format_is_the_same(model, tmp_path):
    folder, _ = model
    for to in ("meta", "native", "gguf"):
        path = tmp_path / f"b.{to}"
        convert(folder / "a", path, to=to)
        found = compare(folder / "a", path, with_logits=to == "meta")
        assert found.problems(0) == []
        assert all(d.same_bits for d in found.weights)
        if found.logits:
            assert (found.logits.positions, found.logits.max_abs, found.logits.top1) == (8704, 0, 1)


def test_each_difference_is_measured(model, tmp_path):
    """One weight off by a known amount, against torch's own logits; another configuration; another shape."""
    folder, hf = model
    other = hf_model(CONFIG)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
    write_hf(tmp_path / "b", other)
    found = compare(folder / "a", tmp_path / "b", positions=300)
    different = [d for d in found.weights if not d.same_bits]
    assert [d.name for d in different] == ["blocks.1.mlp.w_down"]
    weight = hf.model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert different[0].max_abs == pytest.approx(0.5, rel=1e-6)
    assert different[0].relative == pytest.approx(0.5 / np.linalg.norm(weight), rel=1e-5)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 300), np.int32)).long()
    with torch.no_grad():
        p, q = (torch.log_softmax(m(tokens).logits[0, -64:].double(), -1) for m in (hf, other))
        change = (other(tokens).logits - hf(tokens).logits)[0, -64:].abs().max().item()
    assert found.logits.max_abs == pytest.approx(change, rel=1e-3)
    assert found.logits.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert found.logits.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.problems(0.4) == (["blocks.1.mlp.w_down", "logits"] if change > 0.4 else ["blocks.1.mlp.w_down"])
    assert found.problems(max(change, 0.5) + 1e-3) == []

    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["rope_parameters"]["factor"] = 8.0
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    found = compare(folder / "a", tmp_path / "b", with_logits=False)
    assert list(found.config) == ["rope_scaling"]
    assert len(found.problems(np.inf)) == 1
    write_hf(tmp_path / "c", CONFIG.replace(mlp_dim=96))
    found = compare(folder / "a", tmp_path / "c")
    assert (list(found.config), found.weights, found.logits) == (["mlp_dim"], [], None)


def test_the_script_tells_by_its_exit_code(model, tmp_path):
    folder, hf = model
    write_hf(tmp_path / "b", hf.bfloat16())
    command = [sys.executable, str(SCRIPT), str(folder / "a"), str(tmp_path / "b"), "--no-logits"]
    for options, code in (([], 1), (["--tolerance", "0.01"], 0)):
        done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        result = json.loads(done.stdout)
        assert result["same"] == (code == 0)
        assert len(result["weights"]) == 12
    done = subprocess.run([*command[:3], "nowhere"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_dtypes_and_numbers_that_do_not_compare(tmp_path):
    hf = hf_model(CONFIG)
    write_hf(tmp_path / "half", hf.half())
    write_hf(tmp_path / "bf16", hf.bfloat16())
    found = compare(tmp_path / "half", tmp_path / "bf16", with_logits=False)  # NumPy knows no common dtype
    assert found.problems(0.01) == []
    assert {d.dtypes for d in found.weights} == {("float16", "bfloat16")}
    with torch.no_grad():
        hf.model.norm.weight[0] = torch.nan
    write_hf(tmp_path / "nan", hf)
    found = compare(tmp_path / "nan", tmp_path / "nan", positions=100)
    assert all(d.same_bits for d in found.weights)
    assert found.problems(1e9) == ["logits"]  # logits that are no numbers are not the same
