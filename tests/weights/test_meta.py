"""Meta folders: a transformers model split as Meta does, by a script of its own, reads back bit for bit."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ConfigError
from llama_jax.config.presets import PRESETS
from llama_jax.weights import params
from llama_jax.weights.formats.meta import read_meta
from llama_jax.weights.source import CheckpointError, plain_tensor
from tests.builders import LLAMA32, hf_model, tiny_config

META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}  # fmt: skip
COLUMNS = ("wo.weight", "w2.weight")  # split along axis 1; all other matrices along 0
CONFIG = tiny_config(vocab_size=96, embed_dim=32, mlp_dim=96, num_heads=8, num_kv_heads=4, head_dim=4)
PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 96,
    "norm_eps": 1e-5,
    "vocab_size": 96,
}


def meta_state(config, model=None):
    """A random model's weights under Meta's names, q and k interleaved."""
    state = {}
    for name, x in (model or hf_model(config)).state_dict().items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads:  # the halves of each head become pairs
            x = torch.stack(x.reshape(heads, 2, -1, config.embed_dim).unbind(1), dim=2).reshape(x.shape)
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        state[name] = x
    return state


def split(state, ranks, embed_axis):
    """Each rank's state dict. Norms are views into a larger storage, as in some of Meta's files, and rank 0's count."""
    shards = [{} for _ in range(ranks)]
    for name, x in state.items():
        if x.ndim == 1:
            parts = [torch.cat([-x, x + rank, -x])[len(x) : 2 * len(x)] for rank in range(ranks)]
        else:
            axis = embed_axis if "tok_embeddings" in name else int(name.endswith(COLUMNS))
            parts = [part.contiguous() for part in x.chunk(ranks, axis)]
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def write(folder, shards, params=None, extra=None, *, single=False):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS if params is None else params))
    if extra is not None:
        (folder / "llama_jax.json").write_text(json.dumps(extra))
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / ("consolidated.pth" if single else f"consolidated.{rank:02}.pth"))
    return folder


@pytest.fixture(scope="module")
def state():
    return meta_state(CONFIG)


def assert_same(folder, state):
    assert folder.tensors.keys() == state.keys()
    for name, x in state.items():
        tensor = folder.tensors[name]
        assert (tensor.name, tensor.shape, tensor.nbytes) == (name, tuple(x.shape), x.numel() * x.element_size())
        np.testing.assert_array_equal(tensor.read().astype(np.float32), x.float().numpy())
    params.check(folder.tensors, folder.config, "meta", folder.path)


@pytest.mark.parametrize("embed_axis", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder(tmp_path, state, ranks, embed_axis, dtype):
    state = {name: x.to(dtype) for name, x in state.items()}
    tables = {"rope.freqs": torch.ones(2), "layers.1.attention.inner_attention.rope.freqs": torch.ones(2)}
    shards = [shard | tables for shard in split(state, ranks, embed_axis)]
    folder = read_meta(write(tmp_path, shards, PARAMS | {"vocab_size": -1}, single=ranks == 1 and embed_axis == 0))
    assert folder.config == CONFIG.replace(max_seq_len=4096)
    assert folder.params["dim"] == 32
    assert folder.extra == {}
    assert folder.path == tmp_path
    assert_same(folder, state)


def test_parameters_are_those_of_the_hugging_face_model(tmp_path, state):
    """Through the table, every part of every parameter is the same array."""
    hf = {name: plain_tensor(name, x.numpy()) for name, x in hf_model(CONFIG).state_dict().items()}
    meta = read_meta(write(tmp_path, split(state, 2, 1))).tensors
    size = params.sizes(CONFIG)
    for row, layer in params.parameters(CONFIG):
        starts = [(0, 0 if axis == "H" else size[axis] // 2) for axis in row.axes]  # no sharding splits heads
        for start in itertools.product(*starts):
            index = [slice(first, size[axis]) for first, axis in zip(start, row.axes, strict=True)]
            ours, theirs = (
                params.read(tensors[row.name(format, layer)], row, CONFIG, format, index)
                for tensors, format in ((meta, "meta"), (hf, "hf"))
            )
            np.testing.assert_array_equal(ours, theirs)


def test_eleven_ranks(tmp_path):
    """10 comes after 9, not after 1."""
    config = CONFIG.replace(embed_dim=22, mlp_dim=66, num_heads=11, num_kv_heads=11, head_dim=2, vocab_size=33)
    params = {"dim": 22, "n_layers": 2, "n_heads": 11, "multiple_of": 66, "norm_eps": 1e-6}
    state = meta_state(config)
    folder = read_meta(write(tmp_path, split(state, 11, 1), {"model": params}))
    assert folder.config == config.replace(max_seq_len=2048, norm_eps=1e-6)
    assert_same(folder, state)


@pytest.fixture(scope="module")
def in_four(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("four")
    return {axis: read_meta(write(path / str(axis), split(state, 4, axis))).tensors for axis in (0, 1)}


NAMES = ["tok_embeddings", "output", "norm", *(f"layers.1.{n}" for n in ("attention.wq", "attention.wo"))]
edges = st.one_of(st.none(), st.integers(-100, 100))
slices = st.builds(slice, edges, edges, st.one_of(st.none(), st.integers(1, 40), st.integers(-40, -1)))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([0, 1]), st.lists(slices, max_size=2))
def test_any_index(in_four, state, name, embed_axis, index):
    expected = state[f"{name}.weight"].numpy()
    index = tuple(index[: expected.ndim])
    read = in_four[embed_axis][f"{name}.weight"].read(index)
    np.testing.assert_array_equal(read, expected[index])
    assert read.dtype == expected.dtype


def test_reads_only_what_is_asked_for(in_four):
    """A part that one file holds is a view of that file; no other rank is touched."""
    wq, wo = (in_four[0][f"layers.0.attention.{name}.weight"] for name in ("wq", "wo"))
    for view in (wq.read((slice(8, 16),)), wq.read((slice(15, 7, -2),)), wo.read((slice(3, 9), slice(24, 32)))):
        assert not view.flags.owndata
        assert not view.flags.writeable
    assert wq.read((slice(7, 9),)).flags.writeable  # of two files: a copy
    with pytest.raises(IndexError, match="2 dimensions"):
        wq.read((slice(1),) * 3)


# ---------------------------------------------------------------------------------------------------------------------
# Heads that lie there twice, tied tables, what params.json cannot say
# ---------------------------------------------------------------------------------------------------------------------


def with_heads_twice(state, head_dim):
    def twice(x):
        return x.reshape(-1, head_dim, x.shape[1]).repeat_interleave(2, dim=0).flatten(0, 1)

    return {name: twice(x) if name.endswith(("wk.weight", "wv.weight")) else x for name, x in state.items()}


@pytest.mark.parametrize("kv_heads_said", [8, 4])
def test_kv_heads_twice(tmp_path, state, kv_heads_said):
    """The 405B model on 16 ranks has k0, k0, k1, k1, ..."""
    doubled = with_heads_twice(state, 4)
    assert doubled["layers.0.attention.wk.weight"].shape == (32, 32)
    folder = read_meta(write(tmp_path, split(doubled, 8, 0), PARAMS | {"n_kv_heads": kv_heads_said}))
    assert folder.config == CONFIG.replace(max_seq_len=4096)
    assert_same(folder, state)


@pytest.mark.parametrize("other", ["wk", "wv"])
def test_kv_heads_once(tmp_path, state, other):
    """As many ranks as key heads, and the heads are their own: all are kept."""
    doubled = with_heads_twice(state, 4)
    name = f"layers.0.attention.{other}.weight"
    doubled[name] = doubled[name].clone()
    doubled[name][-1, -1] += 1
    folder = read_meta(write(tmp_path, split(doubled, 8, 0), PARAMS | {"n_kv_heads": 8}))
    assert folder.config == CONFIG.replace(max_seq_len=4096, num_kv_heads=8)
    assert_same(folder, doubled)
    folder = read_meta(write(tmp_path / "four", split(state, 4, 0)))
    assert folder.config.num_kv_heads == 4


def test_tied(tmp_path):
    """Llama 3.2 1B by its shape, with a tiny vocabulary: tied if both tables begin alike."""
    params = {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
        "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 70,
    }  # fmt: skip
    table = torch.randn(70, 2048, generator=torch.Generator().manual_seed(0))
    expected = PRESETS["llama3.2-1b"].replace(vocab_size=70)
    assert expected.rope_scaling == LLAMA32
    for change, tied in ((0.0, True), (1.0, False)):
        output = table.clone()
        output[0, 0] += change
        shard = {"tok_embeddings.weight": table, "output.weight": output}
        folder = read_meta(write(tmp_path, [shard], params))
        assert folder.config == expected.replace(tie_embeddings=tied)
        assert folder.tensors.keys() == shard.keys()


def test_extra(tmp_path):
    """llama_jax.json says what params.json cannot; without it the heads would have another size."""
    config = CONFIG.replace(head_dim=16, tie_embeddings=True, rope_scaling=LLAMA32, rope_theta=5e5)
    state = meta_state(config)  # transformers ties, and its state has both tables
    scaling = {"factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 8192}
    extra = {"head_dim": 16, "max_seq_len": 512, "rope_theta": 5e5, "rope_scaling": scaling, "tie_embeddings": True}
    folder = read_meta(write(tmp_path, split(state, 2, 0), extra=extra))
    assert folder.config == config
    assert folder.extra == extra
    assert_same(folder, state)
    (tmp_path / "llama_jax.json").unlink()
    with pytest.raises(CheckpointError, match="wq"):
        params.check(*(lambda f: (f.tensors, f.config, "meta", f.path))(read_meta(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# Incomplete and other folders
# ---------------------------------------------------------------------------------------------------------------------


def refused(folder, words, error=CheckpointError):
    with pytest.raises(error, match=words) as caught:
        read_meta(folder)
    return str(caught.value)


def test_incomplete_folders(tmp_path, state):
    refused(tmp_path / "none", "no such folder|params.json: no such file")
    write(tmp_path, split(state, 4, 0))
    for missing, words in (
        (3, "has 3 of 4 files, and lacks consolidated.03.pth"),
        (1, "lacks consolidated.01.pth"),
        (0, "lacks consolidated.00.pth"),
    ):
        (tmp_path / f"consolidated.0{missing}.pth").unlink()
        assert str(tmp_path) in refused(tmp_path, words)
    (tmp_path / "consolidated.02.pth").unlink()
    refused(tmp_path, "lacks consolidated.00.pth; fetch")
    (tmp_path / "consolidated.999999999999.pth").write_bytes(b"x")
    refused(tmp_path, "lacks consolidated.00.pth")
    (tmp_path / "params.json").write_text("{")
    refused(tmp_path, "params.json: is not JSON")
    (tmp_path / "params.json").unlink()
    refused(tmp_path, "params.json: no such file")


def test_files_that_do_not_belong_together(tmp_path, state):
    first, second = split(state, 2, 0)
    name = "layers.1.feed_forward.w2.weight"
    for other in (second[name][:, 1:], second[name].half(), None):
        changed = {key: value for key, value in second.items() if key != name}
        write(tmp_path, [first, changed if other is None else changed | {name: other}])
        refused(tmp_path, f"consolidated.01.pth: '{name}' is not the same kind of tensor as in consolidated.00.pth")
    write(tmp_path, [first, second | {"bias": torch.ones(2)}])
    refused(tmp_path, "'bias' is not the same")


def test_other_models(tmp_path, state):
    shards = split(state, 1, 0)
    for key in ("quantization_args", "lora_args", "vision_chunk_size", "moe_args"):
        write(tmp_path, shards, PARAMS | {key: {}})
        refused(tmp_path, key, ConfigError)
    write(tmp_path, shards, extra={"num_heads": 3})
    refused(tmp_path, "llama_jax.json has unknown keys: num_heads", ConfigError)
    (tmp_path / "llama_jax.json").unlink()
    name = "layers.0.feed_forward.w1.weight"
    write(tmp_path, [shards[0] | {name: state[name].to(torch.float8_e4m3fn)}])
    refused(tmp_path, rf"'{name}' holds FP8 numbers.*-MP8 or -MP16")


def test_unknown_tensors_are_left_to_the_check(tmp_path, state):
    """Whatever is not as the table says is refused by `params.check`, by name."""
    cases = {
        "layers.0.attention.wq.bias": torch.ones(32),
        "layers.0.attention.wq.weight": torch.tensor(1.0),
        "layers.0.attention.wk.weight": torch.ones(4),
        "layers.0.feed_forward.w1.weight": torch.ones(48, 0),
        "tok_embeddings.weight": torch.tensor(1.0),
        "norm.weight": torch.ones(2, 32),
        "layers.1.ffn_norm.weight": None,
    }
    for name, x in cases.items():
        shards = [{key: value for key, value in shard.items() if key != name} for shard in split(state, 2, 0)]
        shards = [shard | ({} if x is None else {name: x}) for shard in shards]
        folder = read_meta(write(tmp_path, shards, PARAMS | {"vocab_size": -1}, {"tie_embeddings": True}))
        config = folder.config.replace(vocab_size=96)
        with pytest.raises(CheckpointError, match=name):
            params.check(folder.tensors, config, "meta", folder.path)


def test_split_is_metas():
    """The script above, against the published sizes of a file: 405B on 16 ranks, 51,268,302,389 bytes each."""
    config = PRESETS["llama3.1-405b"].replace(num_kv_heads=16)
    nbytes = 0
    for shape in params.expected(config, "meta").values():
        nbytes += 2 * math.prod(shape) // (16 if len(shape) > 1 else 1)
    assert 0 <= 51_268_302_389 - nbytes < 2_000_000
