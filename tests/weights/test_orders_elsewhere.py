"""What the demonstration learned, in PEFT, transformers and llama.cpp: the same answers.

    python -m pytest -m slow tests/weights/test_orders_elsewhere.py    # needs peft, node and npm; trains for minutes

ORDERS_RUN=runs/sft_smollm2_cpu takes a run that is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import llama_jax
from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import LOSS_MASK
from llama_jax.data.prepare.orders import orders_corpus
from llama_jax.files import cache_folder
from llama_jax.train.loop import train
from tests.builders import one_device
from tests.processes import ROOT
from tests.weights.test_llama_cpp import SCRIPT, node_folder  # noqa: F401 (a fixture)

MODEL, COUNT, LONGEST = "smollm2-135m-instruct", 20, 60


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    if given := os.environ.get("ORDERS_RUN"):
        return Path(given)
    output = tmp_path_factory.mktemp("orders")
    recipe = runpy.run_path(str(ROOT / "configs/sft_smollm2_cpu.py"))["recipe"]()
    validation = dataclasses.replace(recipe.validation, answers=0)
    train(dataclasses.replace(recipe, steps=40, validation=validation, output=str(output)))
    return output


def greedy(model, prompts, stop):
    found = []
    for prompt in prompts:
        with torch.no_grad():
            ids = model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=LONGEST, do_sample=False, eos_token_id=stop, pad_token_id=stop[0],
            )[0, len(prompt) :].tolist()  # fmt: skip
        found.append([i for i in ids if i not in stop])
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # PEFT's own
def test_the_same_answers(run, node_folder, tmp_path):  # noqa: F811
    from peft import PeftModel

    corpus = open_corpus(orders_corpus(cache_folder() / "data", MODEL)[1])
    documents = zip(corpus.read(range(COUNT)), corpus.read(range(COUNT), LOSS_MASK), strict=True)
    prompts = [ids[: int(np.argmax(mask))].tolist() for ids, mask in documents]
    llama = llama_jax.load(run, mesh=one_device())
    stop = sorted(llama.tokenizer.stop_ids)
    ours = [found.tokens for found in llama_jax.generate(llama, prompts, max_new_tokens=LONGEST)]
    found = {}
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    llama_jax.convert(MODEL, tmp_path / "base", to="hf")
    llama_jax.convert(run, tmp_path / "merged", to="hf")
    base, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("base", "merged")
    )
    found["PEFT"] = greedy(PeftModel.from_pretrained(base, newest), prompts, stop)
    found["transformers"] = greedy(merged, prompts, stop)
    llama_jax.convert(run, tmp_path / "merged.gguf", to="gguf", dtype="float16")
    texts = []
    for prompt in prompts:
        request = json.dumps({"prompts": [], "chat": prompt, "stop": stop, "text": "", "most": LONGEST})
        command = ["node", str(SCRIPT), str(tmp_path / "merged.gguf"), request]
        done = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout)["answer"])
    expected = [llama.tokenizer.decode(tokens) for tokens in ours]
    same = {name: sum(a == b for a, b in zip(answers, ours, strict=True)) for name, answers in found.items()}
    same["llama.cpp"] = sum(a == b for a, b in zip(texts, expected, strict=True))
    print(f"the same answers of {COUNT}: {same}; such as {expected[0]}")
    assert same["PEFT"] == same["transformers"] == COUNT
    assert same["llama.cpp"] == COUNT
