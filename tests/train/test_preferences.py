"""Two answers to a prompt: the numbers of TRL, pairs through preparation and the loop, and the reference."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import optax
import pytest

import llama_jax
from llama_jax import sharding
from llama_jax.config.adapter import Adapter
from llama_jax.data.corpus import open_corpus
from llama_jax.data.manifest import LOSS_MASK, PAIR
from llama_jax.data.masks import show
from llama_jax.data.prepare.prepare import make_request, prepare
from llama_jax.data.prepare.shapes import conversation
from llama_jax.train.loop import train
from llama_jax.train.preferences import COMPARED, REFERENCE, Answers, PreferenceObjective
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Preference, Recipe, Schedule, Validation
from llama_jax.train.report import read_metrics
from llama_jax.weights.load import read_model
from llama_jax.weights.open import open_checkpoint
from tests.builders import mesh_on, slow
from tests.weights.test_adapters import base  # noqa: F401 (a fixture)

pytestmark = pytest.mark.unoptimized

PROMPTS = [[1, 5, 9, 13], [1, 7, 11]]
CHOSEN = [[17, 21, 25, 2], [30, 31, 2]]
REJECTED = [[18, 22, 2], [40, 41, 42, 43, 2]]
ENDS = Preference(nll_weight=0.0, ends=True)
# As TRL 1.16 computes them on the same models, and formulas of the papers: options, loss, norm of the gradient.
CASES = {
    "dpo": (ENDS, 0.6245716, 2.210634),
    "ipo": (ENDS, 22.373047, 127.29711),
    "hinge": (ENDS, 0.8564686, 4.734197),
    "dpo-norm": (ENDS, 0.6796948, 0.659371),
    "dpo, smoothed": (Preference(nll_weight=0.0, ends=True, label_smoothing=0.1), 0.6389247, None),
    "dpo, Llama 3": (Preference(nll_weight=0.0), 0.6628696, None),
    "dpo, nll": (Preference(nll_weight=0.2, ends=True), 1.5756559, 3.204026),
    "simpo": (Preference(beta=2.0, gamma=1.0, ends=True), (1.0846795 + 1.4713227) / 2, None),
    "orpo": (Preference(beta=0.1, ends=True), 4.8234983, None),
}


def layout(rows: list[list[int]], T: int) -> dict[str, np.ndarray]:
    """Pairs as the loader gives them, so many in each row."""
    names = ("tokens", "targets", "positions", "segment_ids", LOSS_MASK, PAIR)
    arrays = {name: np.zeros((len(rows), T), np.int32) for name in names}
    for r, pairs in enumerate(rows):
        end = 0
        for segment, i in enumerate(pairs, 1):
            ids, mask, pair = [], [], []
            for side, answer in enumerate((CHOSEN[i], REJECTED[i])):
                one = [*PROMPTS[i], *answer]
                ids += one
                mask += [p >= len(PROMPTS[i]) for p in range(len(one))]
                pair += [4 * p + 2 * (p == len(one) - 1) + side for p in range(len(one))]
            n = len(ids) - 1
            place = (r, slice(end, end + n))
            values = ids[:-1], ids[1:], range(n), [segment] * n, mask[1:], pair[1:]
            for name, one in zip(names, values, strict=True):
                arrays[name][place] = list(one)
            end += n
    return arrays


@pytest.fixture(scope="module")
def models(base):  # noqa: F811
    """The reference, and what has been trained: it and a little noise."""
    checkpoint = open_checkpoint(base)
    random, noise = np.random.RandomState(3), {}
    for name in sorted(checkpoint.tensors):
        noise[name] = (0.05 * random.standard_normal(checkpoint.tensors[name].shape)).astype(np.float32)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        changed = tensor.read() + (0 if "norm" in name else noise[name])
        tensors[name] = dataclasses.replace(tensor, reader=changed.__getitem__)
    policy = dataclasses.replace(checkpoint, tensors=tensors)

    def on(text: str):
        mesh = mesh_on(text)
        mesh = sharding.mesh_of(checkpoint.config, mesh) if isinstance(mesh, str) else mesh
        return mesh, *(read_model(x, mesh, dtype="float32", stacked=True) for x in (checkpoint, policy))

    return on


def measured(objective, models, rows, T, mesh="tensor=1", M=1):
    """Loss and gradient of a step, in microbatches."""
    on, reference, policy = models(mesh)
    arrays = layout(rows, T)
    with jax.set_mesh(on):
        spec = policy.rules.spec(("batch", "seq"), (len(rows) // M, T))
        batch = {name: jax.device_put(x.reshape(M, -1, T), jax.P(None, *spec)) for name, x in arrays.items()}
        parts = [{name: x[m] for name, x in batch.items()} for m in range(M)]
        if objective.reference:
            for part in parts:
                part[REFERENCE] = jax.jit(objective.log_probabilities)(reference, part)
        count = objective.count(batch)

        @jax.jit
        def step(model, part):
            def loss(model):
                sums = objective.sums(model, part)
                return objective.minimised(sums, count), sums

            return jax.value_and_grad(loss, has_aux=True)(model)

        found = [step(policy, part) for part in parts]
        loss, sums = jax.tree.map(lambda *x: sum(x), *(one for one, _ in found))
        gradient = jax.tree.map(lambda *x: sum(x), *(one for _, one in found))
        norm = float(jax.jit(optax.tree.norm)(gradient))
    return float(loss), norm, {k: float(v) for k, v in objective.metrics(sums, count).items()}


@pytest.fixture(scope="module")
def expected(models):
    """By objective, measured once."""
    return functools.cache(lambda name: measured(objective_of(name, Preference()), models, [[0], [1]], 16))


def objective_of(name: str, options: Preference) -> PreferenceObjective:
    name = name.split(",")[0]
    return PreferenceObjective(name, options, reference="" if name in ("simpo", "orpo") else REFERENCE)


@pytest.mark.parametrize("name", [name if name in ("dpo", "ipo", "simpo", "orpo") else slow(name) for name in CASES])
def test_the_numbers_of_trl(name, models):
    options, loss, norm = CASES[name]
    found = measured(objective_of(name, options), models, [[0], [1]], 16)
    assert found[0] == pytest.approx(loss, rel=1e-5)
    if norm:
        assert found[1] == pytest.approx(norm, rel=1e-5)
    if name == "dpo":
        metrics = found[2]
        assert metrics["chosen_reward"] == pytest.approx((0.0937256 - 0.0383429) / 2, abs=1e-6)
        assert metrics["rejected_reward"] == pytest.approx((0.0206500 - 0.2523306) / 2, abs=1e-6)
        assert metrics["margin"] == pytest.approx(0.1435317, abs=1e-6)
        assert metrics["accuracy"] == 1
        assert metrics["chosen_logp"] == pytest.approx((-18.803226 - 14.484730) / 2, rel=1e-6)
        assert metrics["rejected_logp"] == pytest.approx((-14.594158 - 23.615093) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", slow("ipo"), slow("hinge"), slow("simpo"), slow("orpo"), slow("dpo-norm")])
@pytest.mark.parametrize(
    ("rows", "T", "mesh", "M"),
    [
        slow([[0, 1]], 32, "tensor=1", 1),
        ([[0], [1]], 16, "tensor=1", 2),
        ([[0, 1], []], 32, "fsdp=2,context=2,tensor=2", 1),
    ],
)
def test_the_loss_does_not_depend_on_how_a_step_is_cut(name, rows, T, mesh, M, models, expected):
    """Packed into a row, in microbatches, on eight devices with a row of padding: one and the same."""
    found = measured(objective_of(name, Preference()), models, rows, T, mesh, M)
    assert found[0] == pytest.approx(expected(name)[0], rel=1e-6)
    assert found[1] == pytest.approx(expected(name)[1], rel=1e-5)
    assert found[2] == pytest.approx(expected(name)[2], rel=1e-5)


USER = {"role": "user", "content": "the fox"}
ROWS = [
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": "dog"}], "rejected": "river"},
    {"chosen": [USER, {"role": "assistant", "content": "dog"}],
     "rejected": [USER, {"role": "assistant", "content": "hills"}]},
    {"input": {"messages": [USER]}, "preferred_output": [{"role": "assistant", "content": "wolf"}],
     "non_preferred_output": [{"role": "assistant", "content": "dog"}]},
    {"chosen": "\n\nHuman: the fox\n\nAssistant: a story", "rejected": "\n\nHuman: the fox\n\nAssistant: a wolf"},
]  # fmt: skip


def prepared(rows, folder, model):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = make_request([folder / "rows.jsonl"], tokenizer=model, conversations=True, pairs=True)
    prepare(request, folder / "corpus", workers=0)
    return open_corpus(folder / "corpus")


def test_shapes_of_pairs(model, tmp_path, capsys):
    corpus = prepared(ROWS, tmp_path / "pairs", model)
    llama = llama_jax.load(model)
    prompt = llama.chat_format.prompt([USER])
    ends = llama.chat_format.stop_ids
    for ids, mask, pair in zip(*(corpus.read(range(4), name) for name in (None, LOSS_MASK, PAIR)), strict=True):
        second = int(np.argmax(pair % 2))
        for side in (slice(0, second), slice(second, None)):
            assert ids[side][: len(prompt)].tolist() == prompt
            assert mask[side].tolist() == [0] * len(prompt) + [1] * (len(ids[side]) - len(prompt))
            assert (pair[side] // 4).tolist() == list(range(len(ids[side])))
            assert ids[side][-1] in ends
            assert (pair[side] // 2 % 2).tolist() == [0] * (len(ids[side]) - 1) + [1]
    show(corpus, 1)
    out = capsys.readouterr().out
    assert "chosen: " in out
    assert "\nrejected: " in out


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER]}, "is not a pair of answers.*it is a conversation: leave --pairs out"),
        ({"chosen": [USER], "rejected": [USER]}, "are the same"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "one of its two answers is empty"),
        ({"chosen": [{"role": "assistant", "content": "a"}], "rejected": [USER]}, "no prompt in common"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "are the same"),
    ],
)
def test_pairs_that_are_none(row, says):
    with pytest.raises(ValueError, match=says):
        conversation(row, pairs=True)


def test_a_pair_where_conversations_are_asked_for():
    with pytest.raises(ValueError, match="it is a pair of answers: give --pairs"):
        conversation(ROWS[1])


def recipe(corpus, model, output, **changes) -> Recipe:
    given = {
        "model": llama_jax.load(model).config, "data": Data(train=(str(corpus),), validation=(str(corpus),)),
        "batch": Batch(seq_len=64, sequences=8), "objective": "dpo", "init_from": str(model), "tensorboard": False,
        "optimizer": Optimizer(Schedule(peak=3e-3, steps=12, kind="constant"), weight_decay=0.0),
        "checkpoints": Checkpoints(every=6), "mesh": "fsdp=8", "output": str(output),
        "validation": Validation(every=12),
    }  # fmt: skip
    return Recipe(**{**given, **changes})


@pytest.mark.parametrize("adapter", [slow(Adapter(rank=4, alpha=8)), None], ids=["adapter", "all"])
def test_a_run(adapter, model, tmp_path):
    """It begins at ln 2, the margin grows, and it resumes to the bit."""
    corpus = prepared(ROWS * 8, tmp_path / "pairs", model).path
    train(recipe(corpus, model, tmp_path / "whole", adapter=adapter))
    train(recipe(corpus, model, tmp_path / "half", adapter=adapter, steps=6))
    train(recipe(corpus, model, tmp_path / "half", adapter=adapter, resume="auto"))
    steps = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert steps[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-6 if adapter is None else 1e-7)
    assert steps[-1]["margin"] > max(0.1, steps[0]["margin"])
    assert steps[-1]["accuracy"] > 0.7
    again = [row for row in read_metrics(tmp_path / "half") if "loss" in row]
    for name in ("loss", "margin", "chosen_logp", "rejected_logp"):
        assert [row[name] for row in again] == [row[name] for row in steps]
    if adapter is None:
        other = prepared(ROWS[::-1], tmp_path / "other", model).path
        moved = recipe(corpus, model, tmp_path / "half", adapter=None, resume="auto", steps=13)
        moved = dataclasses.replace(moved, data=Data(train=(str(corpus),), validation=(str(other),)))
        with pytest.raises(ValueError, match="what the reference says of it was not computed when the run began"):
            train(moved)
    last = read_metrics(tmp_path / "whole")[-1]
    assert last["validation_accuracy"] > 0.7
    assert last["validation_margin"] > 0.1


def test_prompts_that_are_repeated():
    """In front of the answers, with a system message or another turn: they are the prompt, once."""
    said = {"role": "assistant", "content": "dog"}
    system, more = {"role": "system", "content": "be brief"}, {"role": "user", "content": "and more"}
    answers = [{"role": "assistant", "content": text} for text in ("wolf", "hills")]
    for prompt, before in (([USER], [USER]), ("the fox", [system, USER]), ([USER], [USER, said, more])):
        row = {"prompt": prompt, "chosen": [*before, answers[0]], "rejected": [*before, answers[1]]}
        found = conversation(row, pairs=True)
        assert found.messages == [*before, answers[0]]
        assert found.other == [*before, answers[1]]
        assert (found.asked, found.learned) == (len(before), [False] * len(before) + [True])
    verse = conversation({"prompt": [USER], "chosen": "[Verse 1] la", "rejected": "[1, 2]"}, pairs=True)
    assert [verse.messages[-1]["content"], verse.other[-1]["content"]] == ["[Verse 1] la", "[1, 2]"]
    with pytest.raises(ValueError, match="begins with a message of the user, and does not repeat its prompt"):
        conversation({"prompt": "x", "chosen": [more, answers[0]], "rejected": [more, answers[1]]}, pairs=True)


def test_a_long_pair_loses_turns_of_its_prompt(model, tmp_path):
    """Never of its answers; where nothing is left to lose it is left out and counted."""
    said = {"role": "assistant", "content": "dog"}
    turns = [USER, said] * 6
    rows = [
        {"prompt": [*turns, USER], "chosen": "wolf", "rejected": "hills"},
        {"prompt": [USER], "chosen": [said, USER, said] * 8, "rejected": "river"},
    ]
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = make_request([folder / "rows.jsonl"], tokenizer=model, conversations=True, pairs=True, max_tokens=60)
    manifest = prepare(request, folder / "corpus", workers=0)
    assert (manifest.documents, manifest.skipped["too_long"], manifest.facts["cut"]) == (1, 1, 1)
    corpus = open_corpus(folder / "corpus")
    assert corpus.lengths[0] <= 60


def test_certain_answers_are_finite(models):
    """Of probability one to rounding, the odds ratio and its gradient."""
    ours = Answers(*map(np.float32, (0.0, -3.0, 1.0, 1.0)))
    loss = lambda x: COMPARED["orpo"](dataclasses.replace(ours, chosen=x), ours, 0.1, Preference())  # noqa: E731
    assert np.isfinite(loss(np.float32(0.0)))
    assert np.isfinite(jax.grad(loss)(np.float32(0.0)))


def test_what_a_recipe_cannot_be(model, tmp_path):
    pairs = prepared(ROWS * 2, tmp_path / "pairs", model).path
    cases = (
        ({"objective": "sft"}, "holds pairs of answers, of which objective sft would learn both"),
        ({"preference": Preference(beta=0.0)}, "preference.beta must be more than 0"),
        ({"preference": Preference(label_smoothing=0.7)}, "label_smoothing must be from 0 to below 0.5"),
        ({"preference": Preference(nll_weight=-1.0)}, "nll_weight must be at least 0"),
        ({"optimizer": Optimizer(Schedule(1e-3, 10), z_weight=1e-4)}, "z_weight is not of objective dpo"),
        ({"init_from": ""}, "objective dpo compares answers of a model that gives some: give --init-from"),
    )
    for changes, says in cases:
        with pytest.raises(ValueError, match=says):
            train(recipe(pairs, model, tmp_path / "x", **changes))
