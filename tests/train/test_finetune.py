"""Supervised fine-tuning, of all parameters and of an adapter: through the loop, its checkpoints and back."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import llama_jax
from llama_jax import sharding
from llama_jax.config.adapter import Adapter
from llama_jax.data.corpus import open_corpus
from llama_jax.data.rows.loader import BatchSchedule, BatchStage, Loader
from llama_jax.data.rows.plan import RowPlan
from llama_jax.train.loop import train
from llama_jax.train.objective import SupervisedFineTuning
from llama_jax.train.optim import adamw, learning_rate
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule, Stage
from llama_jax.train.report import read_metrics
from llama_jax.train.state import new_state
from llama_jax.train.step import compiled
from tests.data.test_chats import corpus as prepared
from tests.infer.helpers import random_llama
from tests.train.corpora import random_documents, write_corpus
from tests.train.test_loop import arrays_of

pytestmark = pytest.mark.unoptimized

WORDS = ["fox", "dog", "river", "story", "wolf", "hills"]


def rows(count: int, seed: int = 0):
    chosen = random.Random(seed)
    return [
        {"messages": [{"role": "user", "content": " ".join(chosen.choices(WORDS, k=chosen.randint(1, 9)))},
                      {"role": "assistant", "content": " ".join(chosen.choices(WORDS, k=chosen.randint(1, 3)))}]}
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def chats(model, tmp_path_factory):
    return prepared(rows(80), tmp_path_factory.mktemp("chats"), model).path


def recipe(chats, model, output, **changes) -> Recipe:
    config = llama_jax.load(model).config
    given = {
        "model": config, "data": Data(train=(str(chats),)), "batch": Batch(seq_len=96, sequences=8, microbatches=2),
        "optimizer": Optimizer(Schedule(peak=1e-2, steps=4, kind="constant")), "objective": "sft",
        "checkpoints": Checkpoints(every=2), "mesh": "fsdp=4,tensor=2", "init_from": str(model), "tensorboard": False,
        "output": str(output), "adapter": Adapter(rank=4, alpha=8),
    }  # fmt: skip
    return Recipe(**{**given, **changes})


def test_an_adapter_of_a_run(chats, model, tmp_path):
    """Resumed to the bit; no weight of the base in a checkpoint; its folder is PEFT's, and brings its base."""
    train(recipe(chats, model, tmp_path / "whole"))
    train(recipe(chats, model, tmp_path / "half", steps=2))
    train(recipe(chats, model, tmp_path / "half", resume="auto", mesh="fsdp=2,tensor=4"))
    one, two = (arrays_of(tmp_path / name, 4) for name in ("whole", "half"))
    assert {name.split(".")[-1] for name in one if name.startswith("params") or "blocks" in name} <= {"a", "b"}
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], rtol=1e-4, atol=1e-6, err_msg=name)
    straight = read_metrics(tmp_path / "whole")
    assert straight[-1]["loss"] < straight[0]["loss"]
    saved = tmp_path / "whole/checkpoints/4"
    base = sum(x.size for x in jax.tree.leaves(llama_jax.load(model).model))
    factors = safetensors.numpy.load_file(saved / "adapter_model.safetensors")
    assert len(factors) == 14
    nbytes = sum(file.stat().st_size for file in (saved / "params").rglob("*") if file.is_file())
    assert nbytes < 4 * base
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    llama = llama_jax.load(tmp_path / "whole")  # the newest checkpoint, on its base
    prompt = llama.chat_format.prompt(rows(1)[0]["messages"][:1])
    beside = llama_jax.logits(llama, [prompt])
    llama_jax.convert(tmp_path / "whole", tmp_path / "merged", to="hf")
    np.testing.assert_allclose(beside, llama_jax.logits(llama_jax.load(tmp_path / "merged"), [prompt]), atol=1e-4)
    assert np.abs(beside - llama_jax.logits(llama_jax.load(model), [prompt])).max() > 1e-2
    with pytest.raises(ValueError, match=r"adapter\.alpha = 16, it was 8"):
        train(recipe(chats, model, tmp_path / "half", resume="auto", steps=5, adapter=Adapter(rank=4, alpha=16)))
    with pytest.raises(ValueError, match=r"trains an adapter of rank 4: resume it so \(--adapter.rank 4\)"):
        train(recipe(chats, model, tmp_path / "half", resume="auto", steps=5, adapter=None))
    with pytest.raises(ValueError, match=r"is an adapter.*merge it first, by scripts/convert.py .*whole MERGED"):
        train(recipe(chats, tmp_path / "whole", tmp_path / "new"))
    shutil.copytree(model, tmp_path / "moved")  # the same weights, with a file more beside them
    (tmp_path / "moved/README.md").write_text("x")
    moved = recipe(chats, tmp_path / "moved", tmp_path / "half", resume="auto", steps=4, allow_changes=("init_from",))
    assert train(moved).step == 4
    llama_jax.convert(model, tmp_path / "other", to="hf", dtype="bfloat16")
    with pytest.raises(ValueError, match="trained on other weights"):
        train(recipe(chats, tmp_path / "other", tmp_path / "half", resume="auto", steps=5))


@pytest.mark.slow
def test_the_first_step_is_the_base(chats, model, tmp_path):
    """B is zero: the loss is that of a run of all parameters, and theirs learns more."""
    small = {"mesh": "fsdp=8", "steps": 2, "batch": Batch(seq_len=96, sequences=8, microbatches=1)}
    train(recipe(chats, model, tmp_path / "adapter", **small))
    train(recipe(chats, model, tmp_path / "all", adapter=None, **small))
    (first, *_), (expected, *_) = (read_metrics(tmp_path / name) for name in ("adapter", "all"))
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert first["step_tokens"] == expected["step_tokens"]


def batch_of(chats, llama, M):
    plan = RowPlan([open_corpus(chats)], seq_len=96, seed=1, whole=True)
    where = jax.NamedSharding(llama.mesh, jax.P(None, *llama.model.rules.spec(("batch", "seq"), (8 // M, 96))))
    with Loader(plan, BatchSchedule(96, (BatchStage(0, 8, microbatches=M),)), sharding=where,
                columns=("loss_mask",)) as loader:  # fmt: skip
        return dict(next(loader).batch)


@pytest.mark.parametrize(("mesh", "M"), [("tensor=1", 2), ("tensor=1", 4), ("fsdp=2,context=2,tensor=2", 2)])
def test_the_loss_does_not_depend_on_how_a_step_is_cut(chats, model, mesh, M):
    """Rows of very different numbers of learned tokens: the mean is that of the whole step."""
    results = []
    for text, parts in (("tensor=1", 1), (mesh, M)):
        config = llama_jax.load(model).config
        devices = sharding.make_mesh(config, **sharding.parse_mesh(text))
        llama = random_llama(config, mesh=text, stacked=True)
        optimizer = adamw(Optimizer(Schedule(peak=1e-9, steps=10)))
        step = compiled(optimizer, learning_rate(Schedule(peak=1e-9, steps=10)), SupervisedFineTuning())
        with jax.set_mesh(llama.mesh):
            batch = batch_of(chats, llama, parts)
            state = jax.jit(lambda model, optimizer=optimizer: new_state(model, optimizer))(llama.model)
            _, found = step(state, batch, np.zeros(devices.size, bool))
            results.append({name: float(found[name]) for name in ("loss", "tokens", "grad_norm")})
    assert results[0]["tokens"] == results[1]["tokens"] > 0
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    assert results[1]["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-5)


def test_only_answers_count(chats, model):
    """Another target under a question changes nothing, to the bit; under an answer it does."""
    config = llama_jax.load(model).config
    llama = random_llama(config, stacked=True)
    sums = jax.jit(SupervisedFineTuning().sums)
    with jax.set_mesh(llama.mesh):
        batch = {name: np.array(x[0]) for name, x in batch_of(chats, llama, 1).items()}
        loss = float(sums(llama.model, batch).nll)
        for learned, same in ((0, True), (1, False)):
            spots = np.argwhere((batch["loss_mask"] == learned) & (batch["segment_ids"] > 0))
            targets = batch["targets"].copy()
            for r, c in spots[::5]:
                targets[r, c] = (targets[r, c] + 1) % 60
            assert (float(sums(llama.model, {**batch, "targets": targets}).nll) == loss) == same
        nothing = {**batch, "loss_mask": np.where(np.arange(8)[:, None] == 3, 0, batch["loss_mask"]).astype(np.uint8)}
        assert np.isfinite(float(sums(llama.model, nothing).nll))


def test_it_learns_to_stop(model, tmp_path):
    """Thirty steps on short answers: the reply is the answer, and ends by itself."""
    facts = {"fox": "dog", "river": "wolf", "story": "hills"}
    chats = prepared(
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in facts.items()]
        * 8, tmp_path / "chats", model,
    )  # fmt: skip
    train(
        recipe(
            chats.path, model, tmp_path / "run", mesh="fsdp=8", batch=Batch(seq_len=64, sequences=8),
            optimizer=Optimizer(Schedule(peak=2e-2, steps=30, warmup_steps=3), weight_decay=0.0),
            checkpoints=Checkpoints(every=30), adapter=Adapter(rank=16, alpha=32),
        )
    )  # fmt: skip
    llama = llama_jax.load(tmp_path / "run")
    for question, answer in facts.items():
        reply = llama_jax.chat(llama, [{"role": "user", "content": question}], max_new_tokens=20)
        assert (reply.text, reply.finish_reason) == (answer, "stop")


def test_markers_that_were_never_trained(chats, model, tmp_path, caplog):
    """As in a base of Llama 3: an adapter is refused, and all parameters train with a warning."""
    path = tmp_path / "base"
    shutil.copytree(model, path)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    end = open_corpus(chats).tokenizer().control_tokens["<|im_end|>"]
    tensors["lm_head.weight"][end] = 0
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its rows of <\|im_end\|> are next to zero.*Begin with the Instruct model"):
        train(recipe(chats, path, tmp_path / "x"))
    train(recipe(chats, path, tmp_path / "y", adapter=None, steps=1))
    assert "they are learned here" in caplog.text


def test_what_a_recipe_cannot_be(chats, model, tmp_path):
    assert Recipe(**{**vars(recipe(chats, model, "x")), "adapter": Adapter(rank=0)}).adapter is None
    stages = Batch(seq_len=96, sequences=8, stages=(Stage(until_tokens=10, sequences=8, split=2),))
    with pytest.raises(ValueError, match="batch.stages.split would cut answers from their questions"):
        train(recipe(chats, model, tmp_path / "x", batch=stages))
    texts = write_corpus(tmp_path / "texts", random_documents(5, seed=3))
    with pytest.raises(ValueError, match="texts: has no column loss_mask, which the objective sft needs.*--chat"):
        train(recipe(texts, model, tmp_path / "x"))
    plain = dataclasses.replace(recipe(chats, model, tmp_path / "x"), init_from="")
    with pytest.raises(ValueError, match="an adapter needs the weights that it adapts: give --init-from"):
        train(plain)
