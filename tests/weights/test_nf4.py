"""NF4: the published numbers, bitsandbytes' files, and adapters on a base that is kept so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import llama_jax
from llama_jax import sharding
from llama_jax.config import ConfigError
from llama_jax.config.adapter import Adapter
from llama_jax.config.quantization import CODES, SCALES
from llama_jax.costs.estimate import Workload
from llama_jax.costs.machines import machine
from llama_jax.costs.weights import block_bytes
from llama_jax.ops.quantized import NF4
from llama_jax.ops.weights import einsum, leaf_of
from llama_jax.plan.request import job, of_recipe
from llama_jax.train import build
from llama_jax.train.loop import train
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule
from llama_jax.weights.nf4 import quantize
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.params import parameters
from llama_jax.weights.quantized import as_quantized
from llama_jax.weights.source import CheckpointError
from tests.builders import slow, tiny_config, write_hf
from tests.processes import ROOT
from tests.train.test_finetune import chats  # noqa: F401 (a fixture)

pytestmark = pytest.mark.unoptimized

CONFIG = tiny_config(embed_dim=128, mlp_dim=320, head_dim=64, num_heads=4, num_kv_heads=2)


def test_the_published_numbers():
    """Of bitsandbytes 0.50: 0.02 * RandomState(0).standard_normal((256, 128))."""
    w = (0.02 * np.random.RandomState(0).standard_normal((256, 128))).astype(np.float32)
    single, double = (quantize(w, double=double) for double in (False, True))
    assert single.codes.ravel()[:8].tobytes().hex() == "e9bfe3b6798db899"
    assert hashlib.sha256(single.codes.tobytes()).hexdigest().startswith("96129c841833adea")
    bf16 = quantize(w.astype(ml_dtypes.bfloat16), double=False)
    assert hashlib.sha256(bf16.codes.tobytes()).hexdigest().startswith("299395396b3838a9")
    assert single.absmax.ravel()[:4].tolist() == pytest.approx(
        [0.0510597974, 0.0388724245, 0.0476628952, 0.0451861806], abs=1e-10
    )
    error = np.abs(single.dense() - w)
    assert (error.max(), error.mean()) == pytest.approx((0.0099017, 0.0014585), abs=1e-7)
    assert single.dense()[0, :4] == pytest.approx([0.0369140282, 0.0082170637, 0.0172538832, 0.0510597974], abs=1e-10)
    assert double.absmax.ravel()[:4].tolist() == [86, 32, 58, 51]
    assert float(double.offset) == pytest.approx(0.0519281775, abs=1e-10)
    assert double.scales.tolist() == pytest.approx([0.0241050273, 0.0412708819], abs=1e-10)
    assert double.dense()[0, :2] == pytest.approx([0.0369019359, 0.0082143713], abs=1e-10)
    assert len(SCALES) == 256
    assert (sum(SCALES), sum(map(abs, SCALES))) == pytest.approx((1.0, 75.105263), abs=1e-6)
    zero = quantize(np.zeros((2, 128), np.float32), double=False)
    assert set(zero.codes.ravel().tolist()) == {0x77}
    with pytest.raises(ValueError, match="blocks of 64, which do not divide rows of 96"):
        quantize(np.zeros((2, 96), np.float32), double=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf(folder, CONFIG, std=0.05)
    return folder


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ("fsdp=2,tensor=4", "nf4"),
        (None, "nf4-single"),
        slow(None, "nf4"),
        slow("context=2,fsdp=2,tensor=2", "nf4"),
        slow("fsdp=2,tensor=4", "nf4-single"),
    ],
)
def test_the_leaf_is_the_matrix(mesh, name, checkpoint, tmp_path):
    """To the bit, wherever its parts are; generated text and saved weights are those of the expanded model."""
    llama = llama_jax.load(checkpoint, mesh=mesh, quantize=name)
    opened = open_checkpoint(checkpoint)
    expanded = as_quantized(opened, name)
    kept = 0
    with jax.set_mesh(llama.mesh):
        for block in llama.model.blocks:
            for weight in (block.attn.wq, block.attn.wo, block.mlp.w_gate, block.mlp.w_down):
                leaf = leaf_of(weight)
                assert isinstance(leaf, NF4)
                assert leaf.shape == jax.eval_shape(leaf.dense).shape
                kept += 1
    assert kept == 4 * CONFIG.num_layers
    plain = dataclasses.replace(llama, model=llama_jax.load(checkpoint, mesh=mesh).model)
    llama_jax.save(llama, tmp_path / "saved", format="hf")
    saved = open_checkpoint(tmp_path / "saved")
    for row, layer in parameters(CONFIG):
        np.testing.assert_array_equal(saved.tensor(row, layer).read(), expanded.tensor(row, layer).read(), row.hf)
    dense = llama_jax.load(tmp_path / "saved", mesh=mesh)
    ids = [[3, 5, 8, 13, 21, 34]]
    np.testing.assert_allclose(llama_jax.logits(llama, ids), llama_jax.logits(dense, ids), atol=1e-5)
    assert np.abs(llama_jax.logits(llama, ids) - llama_jax.logits(plain, ids)).max() > 1e-3
    ours, theirs = (llama_jax.generate(x, ids, max_new_tokens=8)[0].tokens for x in (llama, dense))
    assert ours == theirs


def bitsandbytes_file(source, folder, *, double, dtype="bfloat16"):
    """A checkpoint as bitsandbytes writes it."""
    opened = open_checkpoint(source)
    tensors = {name: np.array(tensor.read().astype(ml_dtypes.bfloat16)) for name, tensor in opened.tensors.items()}
    for name in [name for name in tensors if "proj" in name]:
        blocks = quantize(tensors[name], double=double)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(tensors[name].shape)}
        parts = {"absmax": blocks.absmax.ravel(), "quant_map": np.array(CODES, np.float32)}
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(blocks.offset)}
            parts |= {"nested_absmax": blocks.scales, "nested_quant_map": np.array(SCALES, np.float32)}
        parts["quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        tensors[name] = blocks.codes.reshape(-1, 1)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("double", [False, True])
def test_checkpoints_of_bitsandbytes(double, checkpoint, tmp_path):
    """Read as they are, expanded or kept; converted, they are the numbers that they stand for."""
    tensors = bitsandbytes_file(checkpoint, tmp_path / "bnb", double=double)
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = open_checkpoint(tmp_path / "bnb").tensors[name].blocks()
    np.testing.assert_array_equal(blocks.codes.reshape(-1, 1), tensors[name])
    kept = llama_jax.load(tmp_path / "bnb", dtype="float32", quantize="nf4")
    with jax.set_mesh(kept.mesh):
        leaf = leaf_of(kept.model.blocks[1].mlp.w_down)
        found = jax.jit(lambda x: x.dense())(leaf)  # in the dtype that bitsandbytes gives it, whatever the model's
        np.testing.assert_array_equal(found.T, blocks.dense().astype(ml_dtypes.bfloat16))
    expanded = llama_jax.load(tmp_path / "bnb", dtype="float32")
    ids = [[3, 5, 8, 13, 21, 34]]
    np.testing.assert_allclose(llama_jax.logits(expanded, ids), llama_jax.logits(kept, ids), atol=1e-5)
    assert (leaf.scales is not None) == double  # what is stored decides
    llama_jax.convert(tmp_path / "bnb", tmp_path / "hf", to="hf")
    converted = open_checkpoint(tmp_path / "hf").tensors[name].read()
    np.testing.assert_array_equal(converted, blocks.dense().astype(ml_dtypes.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_damaged_checkpoints_of_bitsandbytes(checkpoint, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    good = bitsandbytes_file(checkpoint, tmp_path / "bnb", double=True)
    state = json.loads(good[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())

    def with_state(**changes):
        text = json.dumps({**state, **changes}).encode()
        return {f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(text, np.uint8)}

    cases = (
        ({f"{name}.absmax": None}, "absmax is missing"),
        ({f"{name}.absmax": good[f"{name}.absmax"][:-1]}, "absmax holds"),
        (with_state(blocksize=128), "blocksize is 128, and this library reads 64"),
        (with_state(quant_type="fp4"), "quant_type is 'fp4'"),
        (with_state(shape=[128]), "quant_state cannot be read"),
        (with_state(shape=[-1, 320]), "does not divide"),
        (with_state(shape=["128", 320]), "quant_state cannot be read"),
        (with_state(shape=[float("inf"), 320]), "quant_state cannot be read"),
        (with_state(nested_offset=None), "quant_state cannot be read"),
        (with_state(nested_offset=float("nan")), "quant_state cannot be read"),
        (with_state(nested_offset=1e300), "quant_state cannot be read"),
        (with_state(nested_offset=[0.1]), "quant_state cannot be read"),
        ({name: good[name][:-1]}, "bytes, and"),
        ({f"{name}.quant_map": good[f"{name}.quant_map"] + 1}, "quant_map has other numbers"),
        ({f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, "quant_state cannot be read"),
    )
    for changes, says in cases:
        tensors = {key: value for key, value in {**good, **changes}.items() if value is not None}
        safetensors.numpy.save_file(tensors, tmp_path / "bnb/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}.*{says}"):
            open_checkpoint(tmp_path / "bnb")


def test_what_cannot_be_quantized(tmp_path, checkpoint):
    write_hf(tmp_path / "small", tiny_config(head_dim=16, embed_dim=128, mlp_dim=128), std=0.05)
    with pytest.raises(ConfigError, match="wo has 16 inputs in a row, and nf4 stores blocks of 64"):
        llama_jax.load(tmp_path / "small", quantize="nf4")
    with pytest.raises(ValueError, match="quantize must be one of nf4, nf4-single, got 'int3'"):
        llama_jax.load(checkpoint, quantize="int3")


def test_gradient_of_a_product(checkpoint):
    """That of the expanded weight; nothing of its size is kept for it."""
    llama = llama_jax.load(checkpoint, mesh="fsdp=4,tensor=2", quantize="nf4")
    weight = llama.model.blocks[0].mlp.w_gate.get_value()
    x = np.random.default_rng(0).standard_normal((4, 8, CONFIG.embed_dim)).astype(np.float32)
    with jax.set_mesh(llama.mesh):
        spec = llama.model.rules.spec(("batch", "seq", "act_embed"), x.shape)
        out = llama.model.rules.spec(("batch", "seq", "mlp"), (*x.shape[:2], CONFIG.mlp_dim))
        x = jax.device_put(x, spec)

        def of(w):
            return jax.jit(jax.grad(lambda x: jnp.sin(einsum("BTD,DF->BTF", x, w, out_sharding=out)).sum()))(x)

        np.testing.assert_allclose(of(weight), of(jax.jit(lambda w: w.dense())(weight)), rtol=1e-4, atol=1e-5)


def qlora(chats, source, output, **changes) -> Recipe:  # noqa: F811
    given = {
        "model": open_checkpoint(source).config, "data": Data(train=(str(chats),)),
        "batch": Batch(seq_len=96, sequences=8), "objective": "sft", "init_from": str(source), "output": str(output),
        "optimizer": Optimizer(Schedule(peak=1e-2, steps=4, kind="constant")), "quantize": "nf4",
        "checkpoints": Checkpoints(every=2), "mesh": "fsdp=4,tensor=2", "tensorboard": False,
        "adapter": Adapter(rank=4, alpha=8),
    }  # fmt: skip
    return Recipe(**{**given, **changes})


@pytest.fixture(scope="module")
def talker(model, tmp_path_factory):
    """A model that can be quantized, with the tokenizer of `model`."""
    folder = tmp_path_factory.mktemp("talker")
    write_hf(folder, dataclasses.replace(CONFIG, vocab_size=open_checkpoint(model).config.vocab_size), std=0.05)
    for file in model.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    return folder


def test_qlora(chats, talker, tmp_path):  # noqa: F811
    """Learns, resumes, is merged into the base that it saw, and knows it when it is loaded."""
    train(qlora(chats, talker, tmp_path / "run", steps=2))
    done = train(qlora(chats, talker, tmp_path / "run", resume="auto"))
    assert done.step == 4
    saved = tmp_path / "run/checkpoints/4"
    held = sum(file.stat().st_size for file in (saved / "params").rglob("*") if file.is_file())
    assert held < CONFIG.param_count() / 2
    with pytest.raises(ValueError, match="quantize"):
        train(qlora(chats, talker, tmp_path / "run", resume="auto", steps=5, quantize="nf4-single"))
    with pytest.raises(ValueError, match="quantized weights do not train: give an adapter"):
        train(qlora(chats, talker, tmp_path / "x", adapter=None))
    llama = llama_jax.load(tmp_path / "run")
    with jax.set_mesh(llama.mesh):
        assert isinstance(leaf_of(llama.model.blocks[0].mlp.w_down).base, NF4)
    ids = [[3, 5, 8, 13, 21, 34]]
    beside = llama_jax.logits(llama, ids)
    llama_jax.convert(tmp_path / "run", tmp_path / "merged", to="hf")
    merged = llama_jax.logits(llama_jax.load(tmp_path / "merged"), ids)
    np.testing.assert_allclose(merged, beside, atol=1e-4)
    for to in ("gguf", "native"):
        llama_jax.convert(tmp_path / "run", tmp_path / f"merged.{to}", to=to)
        np.testing.assert_allclose(llama_jax.logits(llama_jax.load(tmp_path / f"merged.{to}"), ids), merged, atol=1e-5)
    report = llama_jax.convert(tmp_path / "run", tmp_path / "other", to="hf", merge_into="original")
    (said,) = [text for text in report.warnings if "another model" in text]
    assert 5 < float(re.search(r"are ([\d.]+)% apart", said)[1]) < 15
    assert np.abs(llama_jax.logits(llama_jax.load(tmp_path / "other"), ids) - beside).max() > 1e-2


SIZED = dataclasses.replace(
    CONFIG, num_layers=8, embed_dim=1024, mlp_dim=4096, num_heads=16, num_kv_heads=4, vocab_size=256
)


def compiled(mesh, layers=SIZED.num_layers, **changes):
    recipe = Recipe(
        model=dataclasses.replace(SIZED, num_layers=layers), data=Data(train=()), batch=Batch(seq_len=64, sequences=8),
        dtype="bfloat16", remat="full", optimizer=Optimizer(Schedule(peak=1e-4, steps=10)), init_from="x",
        adapter=Adapter(rank=8, alpha=16), **changes,
    )  # fmt: skip
    with jax.set_mesh(sharding.make_mesh(SIZED, **sharding.parse_mesh(mesh))):
        program, args = build.abstract_step(recipe)
        return program.lower(*args).compile(), args


def test_memory_of_a_step():
    """Weights and optimizer of QLoRA: at most 45 % of LoRA's in bfloat16; and no expanded weight moves or is kept."""
    (plain, args), (ours, quantized) = (compiled("fsdp=4,tensor=2", quantize=name) for name in (None, "nf4"))
    held = [sum(x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state))
            for state in (args[0], quantized[0])]  # fmt: skip
    assert held[1] <= 0.45 * held[0]
    assert ours.memory_analysis().argument_size_in_bytes < 0.45 * plain.memory_analysis().argument_size_in_bytes
    half, _ = compiled("fsdp=4,tensor=2", SIZED.num_layers // 2, quantize="nf4")
    more = ours.memory_analysis().temp_size_in_bytes - half.memory_analysis().temp_size_in_bytes
    assert more < 2 * SIZED.embed_dim * SIZED.mlp_dim  # less than one matrix for four layers
    for line in re.findall(r"= .*(?:all-gather|all-to-all|collective-permute)\(.*", ours.as_text()):
        for kind, shape in re.findall(r"(\w+)\[([\d,]+)\]", line.split("(")[0]):
            size = np.prod([int(n) for n in shape.split(",")])
            assert kind == "u8" or size < SIZED.embed_dim * SIZED.mlp_dim // 8, line


def test_arithmetic_counts_the_bytes():
    """As the abstract model holds them, on one device and on eight."""
    for mesh in ("fsdp=1", "fsdp=4,tensor=2"):
        for name in ("nf4", "nf4-single", None):
            sizes = sharding.parse_mesh(mesh)
            job = Workload(SIZED, machine("v5e"), "train", 8, 64, sizes, adapter=Adapter(), quantize=name)
            devices = jax.devices()[: int(np.prod(list(sizes.values())))]
            with jax.set_mesh(sharding.make_mesh(SIZED, **sizes, devices=devices)):
                recipe = Recipe(model=SIZED, data=Data(train=()), batch=Batch(64, 8), dtype="bfloat16", quantize=name,
                                optimizer=Optimizer(Schedule(1e-4, 10)), adapter=Adapter())  # fmt: skip
                blocks = build.make_model(recipe, SIZED).blocks
                held = sum(
                    x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape)))
                    for path, x in jax.tree_util.tree_flatten_with_path(blocks)[0] if "norm" not in str(path)
                )  # fmt: skip
            assert block_bytes(job) == pytest.approx(held, rel=1e-4)


def test_a_recipe_is_planned_in_the_form_that_it_is_kept_in():
    """70B on v6e-8: with weights of four bits there is room to recompute less than with bfloat16's."""
    recipe = runpy.run_path(str(ROOT / "configs/qlora_llama31_70b.py"))["recipe"]()
    kept, plain = (of_recipe(x, "v6e-8") for x in (recipe, dataclasses.replace(recipe, quantize=None)))
    asked, _ = job(recipe.model, "v6e-8", "train", batch=8, seq_len=4096, adapter=recipe.adapter, quantize="nf4")
    assert (kept[1].mesh, kept[1].remat, kept[1].quantize) == (asked.mesh, asked.remat, "nf4")
    assert (kept[1].remat, plain[1].remat) == ("attention", "full")
