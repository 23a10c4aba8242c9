"""LoRA adapters in PEFT's files: the numbers that PEFT 0.21 gives, both ways, merged and beside the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

import llama_jax
from llama_jax.config import ConfigError
from llama_jax.config.adapter import Adapter, from_peft
from llama_jax.infer import engine
from llama_jax.model.adapt import adapt, is_trained, without_adapter
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.weights import is_leaf
from llama_jax.train.losses import cross_entropy
from llama_jax.train.trainable import join, split
from llama_jax.weights.peft import CONFIG, WEIGHTS, save_adapter
from llama_jax.weights.source import CheckpointError
from tests.builders import tiny_config
from tests.infer.helpers import random_llama

pytestmark = pytest.mark.unoptimized

IDS = np.array([[1, 5, 9, 13, 17, 21, 25, 29], [1, 6, 11, 16, 21, 26, 31, 36]], np.int32)
SIZES = {
    "q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "gate_proj": (32, 48),
    "up_proj": (32, 48), "down_proj": (48, 32),
}  # fmt: skip
ALL = [f"model.layers.{i}.{'self_attn' if n[0] in 'qkvo' else 'mlp'}.{n}" for i in (0, 1) for n in SIZES]
QV = [name for name in ALL if name.endswith(("q_proj", "v_proj"))]
# As PEFT 0.21.2 computes them on the same model: loss, logits[0, -1, :4], norm of the factors' gradient.
CASES = {
    "q, v": (QV, {"target_modules": ["q_proj", "v_proj"]},
             4.9851499, (-1.137384, 1.420051, -0.241494, -1.808798), 2.0432016),
    "all": (ALL, {"target_modules": "all-linear"}, 4.8174396, (1.861867, 0.732404, -0.258881, -0.868504), 2.9679504),
    "rsLoRA": (QV, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
               5.0245843, (-1.140752, 1.291388, -0.688668, -2.051173), 3.8728446),
    "a layer": (["model.layers.1.self_attn.q_proj"], {"target_modules": ["q_proj"], "layers_to_transform": [1]},
                4.9163489, (-1.763675, 1.285384, 0.484588, -1.836032), 0.3135269),
    "patterns": (QV, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2},
                      "alpha_pattern": {"v_proj": 16}},
                 4.2780986, (0.981403, 1.032559, -1.150854, -0.585349), 3.4574501),
    "expression": (["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
                   {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"},
                   4.9351573, (-1.538262, 1.184936, 0.173400, -1.366790), 0.5600880),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model of the figures above, in a Hugging Face folder."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, random = transformers.LlamaForCausalLM(config), np.random.RandomState(0)
    import torch

    state = model.state_dict()
    for name in sorted(state):
        z = random.standard_normal(tuple(state[name].shape)).astype(np.float32)
        state[name] = torch.tensor(1 + 0.1 * z if "norm" in name else 0.2 * z)
    model.load_state_dict(state)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def write_adapter(folder, modules, config, base="", scale=0.1):
    """Factors by PEFT's names in sorted order, as in its memory."""
    random, tensors = np.random.RandomState(1), {}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), **config}
    adapter = from_peft(config, "")
    names = sorted(f"base_model.model.{m}.lora_{w}.default.weight" for m in modules for w in "AB")
    for name in names:
        module, which = name.removeprefix("base_model.model.").split(".lora_")
        inner, outer = SIZES[module.split(".")[-1]]
        rank = adapter.rank_of(module)
        shape = (rank, inner) if which.startswith("A") else (outer, rank)
        tensors[name.replace(".default", "")] = (scale * random.standard_normal(shape)).astype(np.float32)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def loss_of(model, ids=IDS):
    x_BTD, _ = model.hidden(ids[:, :-1])
    return cross_entropy(model, x_BTD, ids[:, 1:], np.ones(ids[:, 1:].shape, bool), head_trains=False).mean


@pytest.mark.parametrize(
    ("case", "mesh"), [*((case, "tensor=1") for case in CASES), *((c, "fsdp=2,tensor=4") for c in ("all", "patterns"))]
)
def test_the_numbers_of_peft(case, mesh, base, tmp_path):
    modules, config, loss, logits, norm = CASES[case]
    folder = write_adapter(tmp_path / "adapter", modules, config)
    llama = llama_jax.load(base, adapters=folder, mesh=None if mesh == "tensor=1" else mesh)
    np.testing.assert_allclose(np.asarray(llama_jax.logits(llama, IDS[:1].tolist()))[0, -1, :4], logits, atol=2e-5)
    with jax.set_mesh(llama.mesh):
        trainable, frozen = split(llama.model, is_trained(llama.model))
        value, gradient = jax.jit(jax.value_and_grad(lambda part: loss_of(join(part, frozen))))(trainable)
    assert float(value) == pytest.approx(loss, abs=2e-6)
    squares = sum(float((x.astype(jnp.float32) ** 2).sum()) for x in jax.tree.leaves(gradient))
    assert squares**0.5 == pytest.approx(norm, rel=1e-5)


def test_the_base_is_as_it_was(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", ALL, {"target_modules": "all-linear"})
    llama, plain = llama_jax.load(base, adapters=folder), llama_jax.load(base)
    alone = dataclasses.replace(llama, model=without_adapter(llama.model))
    np.testing.assert_array_equal(llama_jax.logits(alone, IDS.tolist()), llama_jax.logits(plain, IDS.tolist()))
    with jax.set_mesh(plain.mesh):
        assert float(loss_of(plain.model)) == pytest.approx(4.9182677, abs=2e-6)
    np.testing.assert_allclose(
        np.asarray(llama_jax.logits(plain, IDS.tolist()))[0, -1, :4],
        (-1.5626436, 1.3336297, 0.3738610, -1.6312488),
        atol=2e-5,
    )


@pytest.mark.parametrize("case", CASES)
def test_merged_in_every_format(case, base, tmp_path):
    """As beside the weights; GGUF and Meta have the rows of q and k in another order."""
    modules, config, *_ = CASES[case]
    folder = write_adapter(tmp_path / "adapter", modules, config)
    expected = llama_jax.logits(llama_jax.load(base, adapters=folder), IDS.tolist())
    source = base
    for to in ("hf", "gguf", "meta", "native") if case == "all" else ("hf", "meta"):
        path = tmp_path / f"merged-{to}{'.gguf' if to == 'gguf' else ''}"
        llama_jax.convert(source, path, to=to, adapter=folder)
        found = llama_jax.logits(llama_jax.load(path), IDS.tolist())
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=to)
    if case == "all":
        llama_jax.save(llama_jax.load(base, adapters=folder), tmp_path / "saved", format="hf")  # merged too
        saved = llama_jax.logits(llama_jax.load(tmp_path / "saved"), IDS.tolist())
        np.testing.assert_allclose(saved, expected, atol=1e-5)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged-hf")
        import torch

        with torch.no_grad():
            np.testing.assert_allclose(model(torch.tensor(IDS, dtype=torch.long)).logits, expected, atol=1e-5)
        for source_format in ("gguf", "meta", "native"):  # from every format too
            plain = tmp_path / f"plain-{source_format}{'.gguf' if source_format == 'gguf' else ''}"
            llama_jax.convert(base, plain, to=source_format)
            again = tmp_path / f"again-{source_format}"
            llama_jax.convert(plain, again, to="hf", adapter=folder)
            np.testing.assert_allclose(llama_jax.logits(llama_jax.load(again), IDS.tolist()), expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_saved_again(case, base, tmp_path):
    """The same tensors, to the bit."""
    modules, config, *_ = CASES[case]
    folder = write_adapter(tmp_path / "adapter", modules, config, base=base)
    llama = llama_jax.load(folder)  # which says what its base is
    with jax.set_mesh(llama.mesh):
        save_adapter(llama.model, from_peft(json.loads((folder / CONFIG).read_text()), ""), tmp_path / "b", base="x")
    before, after = (safetensors.numpy.load_file(path / WEIGHTS) for path in (folder, tmp_path / "b"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)
    again = llama_jax.load(base, adapters=tmp_path / "b")
    np.testing.assert_array_equal(llama_jax.logits(llama, IDS.tolist()), llama_jax.logits(again, IDS.tolist()))


def test_generation_uses_it(base, tmp_path):
    """Greedy tokens of the cache's way are those of the merged model."""
    folder = write_adapter(tmp_path / "adapter", ALL, {"target_modules": "all-linear"}, scale=0.3)
    llama_jax.convert(base, tmp_path / "merged", to="hf", adapter=folder)
    prompts = [[1, 2, 3], [4] * 9]
    beside, merged, plain = (
        llama_jax.generate(x, prompts, max_new_tokens=12)
        for x in (llama_jax.load(base, adapters=folder), llama_jax.load(tmp_path / "merged"), llama_jax.load(base))
    )
    assert [c.tokens for c in beside] == [c.tokens for c in merged]
    assert [c.tokens for c in beside] != [c.tokens for c in plain]


def test_a_stack_of_layers_merges_as_its_layers():
    """Against NumPy, layer by layer, with two ranks; a layer without an adapter is the base."""
    adapter = Adapter(rank=4, alpha=8, targets=("q_proj", "o_proj"), rank_pattern={"layers.0.self_attn.q_proj": 2},
                      layers=(0,))  # fmt: skip
    llama = random_llama(tiny_config(num_layers=2), mesh="fsdp=2,tensor=4", stacked=True)

    def make(one, name):
        random = np.random.default_rng(len(name))
        return (random.standard_normal(shape).astype(np.float32) for shape in (one.a_shape, one.b_shape))

    with jax.set_mesh(llama.mesh):
        model = adapt(llama.model, adapter, make)
        for name, scale in (("wq", 4.0), ("wo", 2.0)):
            leaf = getattr(model.blocks.attn, name).get_value()
            base, a, b = (np.asarray(x, np.float64) for x in (leaf.base, leaf.a, leaf.b))
            found = np.asarray(jax.jit(lambda leaf: leaf.dense())(leaf))
            update = scale * (a[0].reshape(-1, 4) @ b[0].reshape(4, -1)).reshape(base[0].shape)
            np.testing.assert_allclose(found[0], base[0] + update, atol=1e-5 * np.abs(update).max())
            np.testing.assert_array_equal(found[1], leaf.base[1])


def test_factors_stay_float32_beside_bfloat16(base, tmp_path):
    """And everything that is computed is bfloat16."""
    folder = write_adapter(tmp_path / "adapter", ALL, {"target_modules": "all-linear", "r": 6})
    llama = llama_jax.load(base, adapters=folder, dtype="bfloat16")
    leaves = [w for w in jax.tree.leaves(llama.model, is_leaf=is_leaf) if isinstance(w, Adapted)]
    assert {(w.a.dtype.name, w.b.dtype.name, w.base.dtype.name) for w in leaves} == {("float32", "float32", "bfloat16")}
    with jax.set_mesh(llama.mesh):
        text = str(jax.make_jaxpr(lambda model: model.hidden(IDS)[0])(llama.model))
    assert "f32[2,8,6]" not in text  # x A
    assert "bf16[2,8,6]" in text


BAD = {
    "DoRA": ({"use_dora": True}, ConfigError, "use_dora = True is not computed"),
    "another kind": ({"peft_type": "IA3"}, ConfigError, "peft_type is 'IA3'"),
    "PiSSA": ({"init_lora_weights": "pissa"}, ConfigError, "also changes the base"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, ConfigError, "lm_head cannot be adapted"),
    "short names": ({"target_modules": ["q"]}, ConfigError, "targets q are no matrices of this model"),
    "rank": ({"r": 3}, CheckpointError, r"has the shape \[4, 32\], and on this model it is \[3, 32\]"),
    "missing": ({"target_modules": "all-linear"}, CheckpointError, "lacks .*which its configuration targets"),
    "more": ({"target_modules": ["q_proj"]}, CheckpointError, "has .*v_proj.*which its configuration does not target"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save"),
    "layers": ({"layers_to_transform": [7]}, ConfigError, "no matrices"),
    "targets": ({"target_modules": ["q_proj", ".*v_proj"]}, ConfigError, "names, or one expression alone"),
    "alpha": ({"lora_alpha": "8"}, ConfigError, "lora_alpha is '8', not a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_by_name(case, base, tmp_path):
    change, error, message = BAD[case]
    folder = write_adapter(tmp_path / "adapter", QV, {"target_modules": ["q_proj", "v_proj"]})
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        llama_jax.load(base, adapters=folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peft_itself(case, base, tmp_path):
    """Needs `pip install peft`: it loads what is saved here, all of it, and computes the same."""
    import peft
    import torch

    modules, config, *_ = CASES[case]
    folder = write_adapter(tmp_path / "adapter", modules, config, base=base)
    llama, ids = llama_jax.load(folder), torch.tensor(IDS, dtype=torch.long)
    with jax.set_mesh(llama.mesh):
        save_adapter(
            llama.model, from_peft(json.loads((folder / CONFIG).read_text()), ""), tmp_path / "b", base=str(base)
        )
    expected = np.asarray(llama_jax.logits(llama, IDS.tolist()))
    for path in (folder, tmp_path / "b"):
        plain = transformers.LlamaForCausalLM.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its own
            warnings.simplefilter("error", UserWarning)  # PEFT warns of what it lacks, and of what it does not know
            model = peft.PeftModel.from_pretrained(plain, path)
        with torch.no_grad():
            np.testing.assert_allclose(model(ids).logits, expected, atol=1e-5)
            np.testing.assert_allclose(model.merge_and_unload()(ids).logits, expected, atol=1e-5)


def test_a_model_with_an_adapter_beside_it_is_the_model(base, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(base, both)
    folder = write_adapter(tmp_path / "adapter", QV, {"target_modules": ["q_proj", "v_proj"]}, base="elsewhere")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, both / name)
    np.testing.assert_array_equal(
        llama_jax.logits(llama_jax.load(both), IDS.tolist()), llama_jax.logits(llama_jax.load(base), IDS.tolist())
    )


def test_folders_that_are_none(base, tmp_path):
    with pytest.raises(CheckpointError, match="is not the folder of an adapter"):
        llama_jax.load(base, adapters=base)
    folder = write_adapter(tmp_path / "adapter", QV, {"target_modules": ["q_proj", "v_proj"]})
    with pytest.raises(CheckpointError, match="does not say what its base is"):
        llama_jax.load(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle: load and save it again with PEFT"):
        llama_jax.load(base, adapters=folder)


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=4"])
def test_each_row_has_its_own_adapter(mesh, base, tmp_path):
    """Four rows of one program, three adapters of different targets and ranks and none: as each by itself."""
    cases = {"qv": "q, v", "all": "all", "patterns": "patterns"}
    folders = {name: write_adapter(tmp_path / name, *CASES[case][:2], scale=0.3) for name, case in cases.items()}
    prompts = [[1, 5, 9, 13], [1, 6, 11], [2, 17, 3, 8, 9], [1, 5, 9, 13]]
    llama = llama_jax.load(base, adapters=folders, mesh=mesh)
    names = ["qv", None, "patterns", "all"]
    many = llama_jax.generate(llama, prompts, max_new_tokens=8, logprobs=True, adapter=names)
    programs = engine._prefill._cache_size()
    again = llama_jax.generate(llama, prompts[::-1], max_new_tokens=8, logprobs=True, adapter=names[::-1])[::-1]
    assert engine._prefill._cache_size() == programs  # one for all choices
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        single = llama_jax.load(base, adapters=folders[name] if name else None, mesh=mesh)
        (alone,) = llama_jax.generate(single, [prompt], max_new_tokens=8, logprobs=True)
        for found in (many[i], again[i]):
            assert found.tokens == alone.tokens
            np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-5)
    assert many[0].tokens != many[3].tokens
    for name in (None, "qv", "all"):
        single = llama_jax.load(base, adapters=folders[name] if name else None, mesh=mesh)
        found = llama_jax.logits(llama, IDS[:, :3], adapter=name)
        np.testing.assert_allclose(found, llama_jax.logits(single, IDS[:, :3]), atol=1e-5)
    for wrong in ({"x": None}, {1: folders["all"]}, {"": folders["all"]}):
        with pytest.raises(ValueError, match="several adapters are folders by name"):
            llama_jax.load(base, adapters=wrong)
    with pytest.raises(ValueError, match="adapter 'x' is not known: there are qv, all, patterns"):
        llama_jax.generate(llama, prompts, adapter="x")
    with pytest.raises((ValueError, CheckpointError), match="several adapters .* is no one model"):
        llama_jax.save(llama, tmp_path / "saved", format="hf")
