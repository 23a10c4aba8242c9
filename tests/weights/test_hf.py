"""Hugging Face folders: files by the safetensors library read back, and incomplete or damaged folders."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from llama_jax.weights.formats.hf import read_hf
from llama_jax.weights.safetensors import DTYPES
from llama_jax.weights.source import CheckpointError

CONFIG = {"model_type": "llama", "hidden_size": 8}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), first=0, last=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "index",
    [
        (),
        (slice(2, 5),),
        (slice(None, None, 3), slice(1, None, 2)),
        (slice(7, 1, -2), slice(None, None, -1)),
        (slice(4, 4),),
        (slice(None), slice(6, 99)),
    ],
)
def test_numpy_file(folder, index):
    x = np.arange(63, dtype=np.float32).reshape(9, 7) - 31
    arrays = {kind: x.astype(dtype) for kind, dtype in DTYPES.items() if not kind.startswith(("BF", "F8"))}
    save_numpy({**arrays, "scalar": np.array(3, np.float32)}, folder / "model.safetensors", {"format": "np"})
    opened = read_hf(folder)
    assert opened.config == CONFIG
    assert opened.path == folder
    assert opened.tensors.keys() == {*arrays, "scalar"}
    for name, array in arrays.items():
        tensor = opened.tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == (
            name,
            (9, 7),
            array.dtype,
            array.nbytes,
        )
        actual = tensor.read(index)
        assert actual.dtype == array.dtype
        np.testing.assert_array_equal(actual, array[index])
        assert not actual.flags.writeable
    assert opened.tensors["scalar"].read() == 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_torch_file(folder, dtype, expected):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch({"x": x}, folder / "model.safetensors")
    actual = read_hf(folder).tensors["x"].read((slice(1, 4), slice(None, None, 2)))
    assert actual.dtype == expected
    np.testing.assert_array_equal(actual.astype(np.float32), x[1:4, ::2].to(torch.float32).numpy())


def shards(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    save_numpy({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float16)}, folder / names[0])
    save_numpy({"c": np.full((2, 2), 2.0)}, folder / names[1])
    return {"a": names[0], "b": names[0], "c": names[1]}


@pytest.mark.parametrize("indexed", [True, False])
def test_sharded(folder, indexed):
    weight_map = shards(folder)
    if indexed:
        write_index(folder, weight_map)
        save_numpy({"q": np.zeros(2)}, folder / "consolidated.safetensors")  # not in the index: not read
    tensors = read_hf(folder).tensors
    assert [tensors[name].read().ravel()[0] for name in "abc"] == [0, 1, 2]
    assert tensors.keys() == {*"abc"}


def test_single_file_wins_over_index(folder):
    write_index(folder, {"a": "gone.safetensors"})
    save_numpy({"a": np.ones(3)}, folder / "model.safetensors")
    assert read_hf(folder).tensors["a"].shape == (3,)


def test_incomplete_folders(folder):
    def refused(message):
        with pytest.raises(CheckpointError, match=message) as error:
            read_hf(folder)
        assert str(folder) in str(error.value)

    refused("has no .safetensors file; .*fetch")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused("pytorch_model.bin: not a torch file; .*fetch")
    weight_map = shards(folder)
    (folder / weight_map["c"]).rename(folder / "aside")
    refused("has 1 of the 2 parts of model; fetch the others")
    write_index(folder, weight_map | {"model.norm.weight": weight_map["c"]})
    refused("lacks model-00002-of-00002.safetensors, named in .*; fetch the missing files")
    (folder / "aside").rename(folder / weight_map["c"])
    write_index(folder, {**weight_map, "d": weight_map["a"]})
    assert read_hf(folder).absent == {"d": weight_map["a"]}
    assert read_hf(folder).left_out == [f"entries of {INDEX} that no file has: 'd'"]
    write_index(folder, {**weight_map, "a": weight_map["c"]})
    assert read_hf(folder).notes == [f"{INDEX} is wrong about the file of 'a'"]
    write_index(folder, {"a": "../a.safetensors"})
    refused("not a file name")
    write_index(folder, {})
    refused("no weight_map")
    (folder / INDEX).write_text('{"weight_map": ')
    refused("is not JSON")
    (folder / INDEX).unlink()
    save_numpy({"a": np.zeros(2)}, folder / "more.safetensors")
    assert read_hf(folder).left_out == ["a second copy, with the same numbers, of tensors in more.safetensors"]
    save_numpy({"a": np.ones(2)}, folder / "more.safetensors")
    refused("'a' is in model-00001-of-00002.safetensors and in more.safetensors, with other numbers")
    (folder / "config.json").write_text("[]")
    refused("not a JSON object")
    (folder / "config.json").unlink()
    refused("config.json: no such file")


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_hf(tmp_path / "none")


DATA = bytes(8)
DAMAGED = {
    "empty": (b"", "the file is empty"),
    "short": (b"abc", "in a file of 3"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "length": (struct.pack("<Q", 2**60) + b"{}", "a header of 1152921504606846976 bytes"),
    "json": (raw(b"{]"), "header cannot be read"),
    "utf-8": (raw(b'{"\xff": 1}'), "header cannot be read"),
    "deep": (raw(b"[" * 100_000), "header cannot be read"),
    "digits": (raw(b'{"x": ' + b"1" * 5000 + b"}"), "header cannot be read"),
    "list": (raw([]), "not a JSON object"),
    "duplicate": (raw(b'{"x": 1, "x": 1}'), "a name is there twice"),
    "entry": (raw({"x": {"dtype": "F32", "shape": [2]}}, DATA), "entry of 'x' lacks"),
    "offsets": (raw({"x": {**entry(), "data_offsets": [0, 4, 8]}}, DATA), "entry of 'x' lacks"),
    "dtype": (raw({"x": entry("F4")}, DATA), "'x' is stored as F4; supported are F64"),
    "negative": (raw({"x": entry(shape=(-2, -1))}, DATA), "impossible shape"),
    "float": (raw({"x": entry(shape=(2.0,))}, DATA), "impossible shape"),
    "rank": (raw({"x": entry(shape=(1,) * 99 + (2,))}, DATA), "impossible shape"),
    "zero": (raw({"x": entry(shape=(0, 2**70), last=0)}), "impossible shape"),
    "size": (raw({"x": entry(shape=(3,))}, DATA), "cannot be stored at bytes 0 to 8"),
    "product": (raw({"x": entry(shape=(2**32, 2**32))}, DATA), "cannot be stored at bytes"),
    "before": (raw({"x": entry(first=-8, last=0)}, DATA), "cannot be stored at bytes -8 to 0"),
    "overlap": (
        raw({"x": entry(), "y": entry(first=4, last=12)}, bytes(12)),
        "'y' begins at byte 4 .* 8 is expected",
    ),
    "gap": (raw({"x": entry(first=8, last=16)}, bytes(16)), "'x' begins at byte 8 of the data, where 0"),
    "cut short": (raw({"x": entry()}, DATA[:-1]), r"\d+ bytes are expected, and the file has \d+"),
    "too long": (raw({"x": entry()}, DATA + b"!"), "bytes are expected"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(folder, case):
    data, message = DAMAGED[case]
    path = folder / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_hf(folder)
    assert str(error.value).startswith(f"{path}: ")


def test_random_damage(folder):
    """Flipped and missing bytes: either the file reads, or a CheckpointError."""
    path = folder / "model.safetensors"
    save_numpy({"x": np.ones((4, 8), np.float32), "y": np.zeros(3, np.float16)}, path, {"format": "pt"})
    good = path.read_bytes()
    rng = random.Random(0)
    read = refused = 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([*b'09[]{},:"-', rng.randrange(256)])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            for tensor in read_hf(folder).tensors.values():
                assert tensor.read().shape == tensor.shape
            read += 1
        except CheckpointError:
            refused += 1
    assert read > 50
    assert refused > 200
