"""`load`: folders and files of one model give the same arrays, on every mesh, and damaged ones clear errors."""

from __future__ import annotations

import dataclasses
import json
import math

import gguf
import jax
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import llama_jax
from llama_jax import sharding
from llama_jax.config import ConfigError
from llama_jax.infer.generate import logits
from llama_jax.loaded import LoadedLlama
from llama_jax.ops.weights import name_of
from llama_jax.weights.load import read_model
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.source import CheckpointError
from tests.builders import LLAMA31, LLAMA32, hf_model, mesh_on, one_device, tiny_config, write_gguf, write_hf

CONFIG = tiny_config()
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24), np.int32)


@pytest.fixture(scope="module")
def hf():
    return hf_model(CONFIG)


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("single")
    write_hf(path, hf)
    return path


@pytest.fixture(scope="module")
def single(folder):
    """The model on one device."""
    return llama_jax.load(folder, mesh=one_device(), dtype="float32")


def leaves(llama_or_model) -> dict[str, jax.Array]:
    paths, _ = jax.tree_util.tree_flatten_with_path(getattr(llama_or_model, "model", llama_or_model))
    return {name_of(path): leaf for path, leaf in paths}


def assert_same(actual, expected):
    """The same arrays, bit for bit."""
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(leaf), err_msg=name)


# -----------------------------------------------------------------------------------------------------------
# Hugging Face folders
# -----------------------------------------------------------------------------------------------------------


def test_logits_equal_transformers(hf, single):
    with torch.no_grad():
        expected = hf(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(single, TOKENS)), expected, rtol=0, atol=1e-5)


def test_every_parameter_is_read(hf, single):
    """Each array against transformers' own, in the orientation that design and docstrings promise."""
    state = {name: value.numpy() for name, value in hf.state_dict().items()}
    ours = {name: np.asarray(leaf) for name, leaf in leaves(single).items()}
    D, K, G, H = CONFIG.embed_dim, CONFIG.num_kv_heads, CONFIG.num_groups, CONFIG.head_dim
    expected = {
        "embed": state["model.embed_tokens.weight"],
        "final_norm": state["model.norm.weight"],
        "lm_head": state["lm_head.weight"].T,
    }
    for i in range(CONFIG.num_layers):
        theirs = f"model.layers.{i}"
        expected |= {
            f"blocks.{i}.attn_norm": state[f"{theirs}.input_layernorm.weight"],
            f"blocks.{i}.attn.wq": state[f"{theirs}.self_attn.q_proj.weight"].T.reshape(D, K, G, H),
            f"blocks.{i}.attn.wk": state[f"{theirs}.self_attn.k_proj.weight"].T.reshape(D, K, H),
            f"blocks.{i}.attn.wv": state[f"{theirs}.self_attn.v_proj.weight"].T.reshape(D, K, H),
            f"blocks.{i}.attn.wo": state[f"{theirs}.self_attn.o_proj.weight"].T.reshape(K, G, H, D),
            f"blocks.{i}.mlp_norm": state[f"{theirs}.post_attention_layernorm.weight"],
            f"blocks.{i}.mlp.w_gate": state[f"{theirs}.mlp.gate_proj.weight"].T,
            f"blocks.{i}.mlp.w_up": state[f"{theirs}.mlp.up_proj.weight"].T,
            f"blocks.{i}.mlp.w_down": state[f"{theirs}.mlp.down_proj.weight"].T,
        }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_sharded_folder(hf, single, tmp_path):
    write_hf(tmp_path, hf, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(llama_jax.load(tmp_path, mesh=one_device(), dtype="float32"), single)


def test_default_dtype_on_cpu(folder, single):
    assert_same(llama_jax.load(folder, mesh=one_device()), single)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(folder, single, dtype):
    llama = llama_jax.load(folder, mesh=one_device(), dtype=dtype)
    assert llama.model.dtype == dtype
    for name, leaf in leaves(single).items():
        rounded = leaves(llama)[name]
        assert rounded.dtype == dtype
        np.testing.assert_array_equal(np.asarray(rounded), np.asarray(leaf).astype(rounded.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_exactly(tmp_path, dtype):
    hf = hf_model(CONFIG).to(dtype)
    write_hf(tmp_path, hf)
    llama = llama_jax.load(tmp_path, mesh=one_device(), dtype="float32")
    stored = hf.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(leaves(llama)["blocks.1.mlp.w_up"]), stored.T)


def test_tied_embeddings(tmp_path):
    config = tiny_config(tie_embeddings=True)
    hf = write_hf(tmp_path, config)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    llama = llama_jax.load(tmp_path, mesh="fsdp=2,tensor=4", dtype="float32")
    assert "lm_head" not in leaves(llama)
    with torch.no_grad():
        expected = hf(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(llama, TOKENS)), expected, rtol=0, atol=1e-5)


def test_tensors_of_old_files_that_are_no_parameters(folder, single, tmp_path):
    """RoPE tables, and a copy of tied embeddings."""
    copy(folder, tmp_path, add={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    assert_same(llama_jax.load(tmp_path, mesh=one_device(), dtype="float32"), single)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    copy(folder, tmp_path, changes={"tie_word_embeddings": True}, add={"lm_head.weight": table})
    assert "lm_head" not in leaves(llama_jax.load(tmp_path, mesh=one_device(), dtype="float32"))


# -----------------------------------------------------------------------------------------------------------
# Layouts and meshes
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=2,tensor=4"])
def test_stacked_layout(folder, single, mesh):
    mesh = sharding.make_mesh(CONFIG, **sharding.parse_mesh(mesh))
    model = read_model(open_checkpoint(folder), mesh, dtype="float32", stacked=True)
    assert model.stacked
    assert not single.model.stacked
    listed = leaves(single)
    for name, leaf in leaves(model).items():
        if name.startswith("blocks."):
            layers = [listed[name.replace("blocks.", f"blocks.{i}.")] for i in range(CONFIG.num_layers)]
            assert leaf.sharding.spec[0] is None
            np.testing.assert_array_equal(np.asarray(leaf), np.stack([np.asarray(x) for x in layers]))
        else:
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(listed[name]))
    stacked = LoadedLlama(CONFIG, model, None, mesh)
    np.testing.assert_allclose(logits(stacked, TOKENS), logits(single, TOKENS), rtol=0, atol=1e-5)


BOTH = ("tensor_kv", "tensor_q")
SPECS = {  # of embed, wq, wk, wo, w_gate, w_down, lm_head
    "fsdp=2,tensor=4": [
        P("tensor_kv", "fsdp"), P("fsdp", "tensor_kv", None, None), P("fsdp", "tensor_kv", None),
        P("tensor_kv", None, None, "fsdp"), P("fsdp", "tensor_kv"), P("tensor_kv", "fsdp"), P("fsdp", "tensor_kv"),
    ],
    "tensor=8": [
        P(BOTH, None), P(None, "tensor_kv", "tensor_q", None), P(None, "tensor_kv", None),
        P("tensor_kv", "tensor_q", None, None), P(None, BOTH), P(BOTH, None), P(None, BOTH),
    ],
    "data=2,fsdp=4": [
        P(None, "fsdp"), P("fsdp", None, None, None), P("fsdp", None, None), P(None, None, None, "fsdp"),
        P("fsdp", None), P(None, "fsdp"), P("fsdp", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mesh", SPECS)
def test_mesh(folder, single, mesh):
    llama = llama_jax.load(folder, mesh=mesh_on(mesh), dtype="float32")
    assert_same(llama, single)
    names = ["embed", *(f"blocks.1.{name}" for name in ("attn.wq", "attn.wk", "attn.wo", "mlp.w_gate", "mlp.w_down"))]
    specs = [leaves(llama)[name].sharding.spec for name in [*names, "lm_head"]]
    assert specs == SPECS[mesh]
    np.testing.assert_allclose(logits(llama, TOKENS), logits(single, TOKENS), rtol=0, atol=1e-5)


def test_default_mesh_puts_all_devices_on_tensor(folder, single):
    llama = llama_jax.load(folder)
    assert dict(llama.mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor_kv": 4, "tensor_q": 2}
    assert_same(llama, single)


def test_undivided_dimensions_stay_whole_and_loading_says_so(tmp_path, caplog):
    """3 kv heads on two devices: groups are split instead, so that a device's heads are not one run of rows."""
    config = tiny_config(num_heads=6, num_kv_heads=3, embed_dim=66, mlp_dim=161)
    write_hf(tmp_path, config)
    alone = llama_jax.load(tmp_path, mesh=one_device(), dtype="float32")
    assert not caplog.records
    llama = llama_jax.load(tmp_path, mesh="fsdp=4,tensor=2", dtype="float32")
    (record,) = caplog.records
    assert record.getMessage() == (
        "each device holds and computes all of some weights, because"
        " embed (66) does not divide by 4; mlp (161) does not divide by 2"
    )
    assert leaves(llama)["blocks.0.attn.wq"].sharding.spec == P(None, None, "tensor_q", None)
    assert leaves(llama)["blocks.0.mlp.w_up"].sharding.spec == P(None, None)
    assert_same(llama, alone)
    np.testing.assert_allclose(logits(llama, TOKENS), logits(alone, TOKENS), rtol=0, atol=1e-5)


def counting(checkpoint):
    """The checkpoint, and a list of (tensor name, elements) that grows with every read."""
    reads = []

    def wrap(tensor):
        def reader(index):
            part = tensor.reader(index)
            reads.append((tensor.name, part.size))
            return part

        return dataclasses.replace(tensor, reader=reader)

    tensors = {name: wrap(tensor) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors), reads


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_reads_only_what_devices_hold(hf, folder, single, tmp_path, kind, stacked):
    """Each part of a divided tensor is read by itself and once, whichever devices share it."""
    path = folder if kind == "hf" else write_gguf(tmp_path / "model.gguf", CONFIG, hf)
    checkpoint, reads = counting(open_checkpoint(path))
    mesh = sharding.make_mesh(CONFIG, fsdp=4, tensor=2)
    model = read_model(checkpoint, mesh, dtype="float32", stacked=stacked)
    if not stacked:
        assert_same(model, single)
    for name, tensor in checkpoint.tensors.items():
        sizes = [size for read, size in reads if read == name]
        ways = 8 if len(tensor.shape) == 2 else 4  # norms over fsdp alone
        assert sizes == [math.prod(tensor.shape) // ways] * ways, name


# -----------------------------------------------------------------------------------------------------------
# GGUF
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        tiny_config(tie_embeddings=True, head_dim=64, rope_theta=5e5, rope_scaling=LLAMA32, max_seq_len=131072),
        tiny_config(num_kv_heads=8, rope_theta=5e5, rope_scaling=LLAMA31, max_seq_len=131072),
    ],
    ids=["untied", "tied, factor 32", "MHA, factor 8"],
)
@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=2,tensor=4"])
def test_gguf_equals_hf_folder(tmp_path, config, mesh):
    hf = write_hf(tmp_path, config)
    path = write_gguf(tmp_path / "model.gguf", config, hf)
    llama = llama_jax.load(path, mesh=mesh_on(mesh), dtype="float32")
    assert llama.config == config
    assert llama.tokenizer is None
    assert_same(llama, llama_jax.load(tmp_path, mesh=one_device(), dtype="float32"))
    with torch.no_grad():
        expected = hf(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(llama, TOKENS)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
@pytest.mark.parametrize("mesh", ["tensor=1", "fsdp=4,tensor=2"])
def test_quantized_gguf_equals_dequantized_weights(hf, tmp_path, kind, mesh):
    path = write_gguf(tmp_path / "model.gguf", CONFIG, hf, kind=kind)
    rounded = hf_model(CONFIG)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                type_ = gguf.GGMLQuantizationType[kind]
                blocks = gguf.quants.quantize(parameter.numpy(), type_)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, type_)))
    write_hf(tmp_path, rounded)
    expected = llama_jax.load(tmp_path, mesh=one_device(), dtype="float32")
    assert_same(llama_jax.load(path, mesh=mesh_on(mesh), dtype="float32"), expected)


# -----------------------------------------------------------------------------------------------------------
# Bad input
# -----------------------------------------------------------------------------------------------------------


def copy(folder, to, *, changes=None, add=None, remove=()):
    """A copy of a folder with another configuration or other tensors."""
    config = json.loads((folder / "config.json").read_text()) | (changes or {})
    (to / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors") | (add or {})
    save_file({n: x for n, x in tensors.items() if n not in remove}, to / "model.safetensors")
    return to


def refused(path, error, *words, **options):
    """`load` raises exactly `error`, and its message holds every one of the words."""
    with pytest.raises(error) as caught:
        llama_jax.load(path, **{"mesh": one_device()} | options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_missing_tensors(folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    copy(folder, tmp_path, remove=[name])
    refused(tmp_path, CheckpointError, str(tmp_path), "1 of 21 tensors are missing", repr(name))
    copy(folder, tmp_path, remove=["lm_head.weight"])
    refused(tmp_path, CheckpointError, str(tmp_path), "'lm_head.weight'")
    copy(folder, tmp_path, changes={"num_hidden_layers": 3})
    refused(tmp_path, CheckpointError, "9 of 30", "'model.layers.2.input_layernorm.weight'", "more layers")


def test_wrong_shapes(folder, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    copy(folder, tmp_path, add={name: np.zeros((32, 64), np.float32)})
    refused(tmp_path, CheckpointError, str(tmp_path), repr(name), "[32, 64]", "[64, 64]")
    copy(folder, tmp_path, changes={"intermediate_size": 192})
    name = "model.layers.0.mlp.gate_proj.weight"
    refused(tmp_path, CheckpointError, str(tmp_path), repr(name), "[160, 64]", "[192, 64]")
    copy(folder, tmp_path, changes={"num_key_value_heads": 8})
    refused(tmp_path, CheckpointError, "k_proj", "[64, 64]", "[128, 64]")


def test_extra_tensors(folder, tmp_path):
    """A bias, and more layers than the configuration says: both would give other logits if they were left out."""
    name = "model.layers.0.self_attn.q_proj.bias"
    copy(folder, tmp_path, add={name: np.zeros(128, np.float32)})
    refused(tmp_path, CheckpointError, str(tmp_path), repr(name), "1 tensors that a Llama does not have")
    copy(folder, tmp_path, changes={"num_hidden_layers": 1})
    refused(tmp_path, CheckpointError, "9 tensors", "'model.layers.1.")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_safetensors(folder, tmp_path, keep):
    copy(folder, tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else keep])
    refused(tmp_path, CheckpointError, str(path), "fetch the file again")


def test_missing_shard(hf, tmp_path):
    write_hf(tmp_path, hf, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path, CheckpointError, str(tmp_path), gone.name)


def test_bad_gguf(hf, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", CONFIG, hf)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, CheckpointError, str(path), "fetch the file again")
    path.write_bytes(b"not a model")
    refused(path, CheckpointError, str(path), "GGUF")
    other = tiny_config(num_layers=3)
    write_gguf(path, other, hf)
    refused(path, CheckpointError, str(path), "'blk.2.attn_norm.weight'")


def test_gguf_with_another_rope_scaling(hf, tmp_path):
    """A table that is not of Llama 3.1's form, as long-context conversions have."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 4, 8, dtype=np.float32))
    for method in (writer.add_vocab_size, writer.add_context_length, writer.add_block_count):
        method(256)
    writer.add_feed_forward_length(160)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, ConfigError, str(path), "rope_freqs.weight")


def test_refused_configuration_names_the_folder(folder, tmp_path):
    copy(folder, tmp_path, changes={"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}})
    refused(tmp_path, ConfigError, str(tmp_path), "'yarn'")
    copy(folder, tmp_path, changes={"model_type": "mistral"})
    refused(tmp_path, ConfigError, str(tmp_path), "'mistral'")


def test_no_such_path(tmp_path):
    refused(tmp_path / "nowhere", CheckpointError, str(tmp_path / "nowhere"))
    refused(tmp_path, CheckpointError, str(tmp_path), "config.json")
    (tmp_path / "params.json").write_text("{}")
    refused(tmp_path, ConfigError, str(tmp_path), "params.json does not say dim")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"max_seq_len": 513}, "from 1 to the model's 512, got 513"),
        ({"max_seq_len": 0}, "from 1 to the model's 512, got 0"),
        ({"mesh": "tensor=16"}, "needs 16 devices, but there are 8"),
        ({"mesh": "model=2"}, "unknown axis 'model'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_wrong_arguments(folder, options, words):
    refused(folder, ValueError, words, **options)


def test_integer_weights_and_values_of_the_wrong_type_are_refused(tmp_path):
    """Both ran, or ended in a TypeError or a hang, before there was a check."""
    write_hf(tmp_path, CONFIG)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    for change in ({"rope_parameters": {"rope_theta": [1, 2]}}, {"num_hidden_layers": 10**9}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=tmp_path.name):
            llama_jax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: (8 * tensor).astype(np.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="holds int8 numbers"):
        llama_jax.load(tmp_path)
