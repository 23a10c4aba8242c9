"""torch's files: what torch writes we read, what we write it reads, and nothing in a hostile file runs or grows."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.weights import torch_file
from llama_jax.weights.sink import Entry
from llama_jax.weights.source import CheckpointError
from llama_jax.weights.torch_file import DTYPES, MAX_PICKLE, STORAGES, read_torch_file, write_torch_file


def as_numpy(tensor):
    """By bytes: numpy has no bfloat16."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(tensor.untyped_storage()), tuple(tensor.shape)


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        array = tensor.read()
        assert tensor.name == name
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert (array.tobytes(), array.shape) == as_numpy(expected[name])
        assert str(tensor.dtype) == str(expected[name].dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# Reading what torch wrote
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {str(dtype): dtype for dtype in [*STORAGES.values(), *DTYPES.values()]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_dtypes(tmp_path, name, protocol):
    numbers = torch.arange(24).remainder(2 if name == "bool" else 8)
    x = numbers.reshape(4, 6).to(getattr(torch, name))
    content = collections.OrderedDict(x=x, column=x[:, 1], transposed=x.T, empty=x[:0], scalar=x[1, 1], x_again=x)
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    tensors = read_torch_file(tmp_path / "a.pth")
    assert_same(tensors, content)
    assert {tensor.dtype for tensor in tensors.values()} == {NAMES[name]}
    rows = tensors["x"].read((slice(1, 4, 2), slice(None, 1, -1)))
    assert not rows.flags.writeable
    np.testing.assert_array_equal(rows.astype(int), numbers.reshape(4, 6).numpy()[1:4:2, :1:-1])


def test_modules(tmp_path):
    """Parameters, buffers, and the _metadata that a module's state_dict carries."""
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    assert_same(read_torch_file(tmp_path / "a.pth"), module.state_dict())
    parameters = dict(module.named_parameters())
    torch.save(parameters, tmp_path / "b.pth")
    assert_same(read_torch_file(tmp_path / "b.pth"), parameters)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_training_checkpoint(tmp_path, key):
    weights = {"x": torch.ones(3)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 1e-3, "betas": (0.9, None), "on": True}]}
    torch.save({"iteration": 2**40, key: weights, "optimizer": optimizer, 7: -1}, tmp_path / "a.pth")
    assert_same(read_torch_file(tmp_path / "a.pth"), weights)


def test_entries_that_are_no_tensors(tmp_path):
    torch.save({"x": torch.ones(3), "model": "llama", "step": 3, 5: torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_torch_file(tmp_path / "a.pth")) == ["x"]
    for content in (torch.ones(3), [torch.ones(3)], 3):
        torch.save(content, tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match="no dictionary of tensors; save the model's state_dict"):
            read_torch_file(tmp_path / "b.pth")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "a.pth"


@st.composite
def views(draw):
    """A view as indexing, transposing and splitting make them, of a storage that it shares."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    offset = draw(st.integers(0, 9))
    storage = torch.arange(offset + int(np.prod(shape)) + draw(st.integers(0, 9)), dtype=torch.int16)
    x = storage[offset : offset + int(np.prod(shape))].reshape(shape)
    x = x.permute(draw(st.permutations(range(x.ndim))))
    cuts = [
        slice(draw(st.integers(0, 5)), draw(st.one_of(st.none(), st.integers(0, 5))), draw(st.integers(1, 3)))
        for _ in shape
    ]
    return storage, x[tuple(cuts)]


@settings(max_examples=60, deadline=None)
@given(views())
def test_strides_and_offsets(scratch, pair):
    storage, view = pair
    torch.save({"view": view, "storage": storage}, scratch)
    assert_same(read_torch_file(scratch), {"view": view, "storage": storage})


def test_repacked_archive(tmp_path):
    """By another program, `zip -0`: another order, other extra fields, no alignment, a folder entry."""
    torch.save({"x": torch.arange(5.0)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        new.mkdir("a")
        for name in reversed(old.namelist()):
            new.writestr(name, old.read(name))
    assert_same(read_torch_file(tmp_path / "b.pth"), {"x": torch.arange(5.0)})


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def entry(name, array, cuts=3):
    pieces = np.array_split(array.reshape(-1), cuts)
    return Entry(name, array.shape, array.dtype, lambda: iter(pieces))


def test_written_file(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ["float32", "float16", ml_dtypes.bfloat16, "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]
    arrays = {f"layers.{i}.ü": rng.normal(0, 50, (7, 5, 3)).astype(kind) for i, kind in enumerate(kinds)}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.empty((2, 0, 3), np.float16), "long": np.arange(10_000)}
    path = tmp_path / "consolidated.00.pth"
    advanced = []
    write_torch_file(path, [entry(name, array) for name, array in arrays.items()], advanced.append)
    assert sum(advanced) == sum(array.nbytes for array in arrays.values())

    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert type(read) is collections.OrderedDict
        assert_same(read_torch_file(path), read)
        assert {name: as_numpy(tensor) for name, tensor in read.items()} == {
            name: (array.tobytes(), array.shape) for name, array in arrays.items()
        }
        assert all(tensor.is_contiguous() and tensor.storage_offset() == 0 for tensor in read.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every CRC-32
        assert archive.namelist()[0] == "archive/data.pkl"
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", path], check=True, capture_output=True)
    reader = torch._C.PyTorchFileReader(str(path))
    assert all(reader.get_record_offset(f"data/{i}") % 64 == 0 for i in range(len(arrays)))


def test_written_twice_alike(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name in ("a", "b"):
        write_torch_file(tmp_path / name, [entry("x", x)], lambda n: None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(FileExistsError):
        write_torch_file(tmp_path / "a", [entry("x", x)], lambda n: None)


def test_wrong_pieces(tmp_path):
    x = np.arange(6, dtype=np.float32)
    with pytest.raises(RuntimeError, match="x: 24 bytes were made, 28 expected"):
        write_torch_file(tmp_path / "a", [Entry("x", (7,), x.dtype, lambda: iter([x]))], lambda n: None)


def test_over_four_gigabytes(tmp_path):
    """Sparse on the disk and never held: the pieces are not written but skipped."""
    path, size = tmp_path / "a.pth", 2**32 + 64

    class Sparse(torch_file._ZipWriter):
        def write(self, buffer, /):
            if len(buffer) == 2**20:
                self.seek(2**20, os.SEEK_CUR)
                return len(buffer)
            return super().write(buffer)

    zeros, last = np.zeros(2**20, np.uint8), np.arange(64, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_file, "_ZipWriter", Sparse)
        big = Entry("big", (size,), np.dtype("u1"), lambda: iter([*[zeros] * 2**12, last]))
        write_torch_file(path, [big, entry("after", np.arange(3.0))], lambda n: None)
    assert path.stat().st_size > 2**32
    ours, theirs = read_torch_file(path), torch.load(path, weights_only=True, mmap=True)
    assert ours["big"].shape == theirs["big"].shape == (size,)
    assert ours["big"].read((slice(-65, None),)).tolist() == theirs["big"][-65:].tolist() == [0, *range(64)]
    assert ours["after"].read().tolist() == theirs["after"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile and damaged files
# ---------------------------------------------------------------------------------------------------------------------


def pack(path, program, storages=(), **members):
    """A torch file around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", "3\n")
        for key, data in enumerate(storages):
            archive.writestr(f"a/data/{key}", data)
        for name, data in members.items():
            archive.writestr(f"a/{name}", data)
    return path


def text(x):
    return b"X" + struct.pack("<I", len(x)) + x.encode()


def number(x):
    return pickle.dumps(x, protocol=2)[2:-1]


def tensor(offset=0, shape=(2,), strides=(1,), *, kind=b"FloatStorage", count=2, key="0", tag="storage"):
    """The instructions that torch writes for one tensor."""
    storage = b"(" + text(tag) + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    rest = number(offset) + number(shape) + number(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def state(value):
    return b"\x80\x02}" + text("x") + value + b"s."


STORAGE = struct.pack("<2f", 1, 2)


def test_hand_written_pickle(tmp_path):
    """The control of the tests below: unchanged, it reads."""
    path = pack(tmp_path / "a.pth", state(tensor()), [STORAGE])
    assert read_torch_file(path)["x"].read().tolist() == [1, 2]
    assert torch.load(path, weights_only=True)["x"].tolist() == [1, 2]


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read_torch_file(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_code_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    program = state(b"cposix\nsystem\n" + text(f"touch {canary}") + b"\x85R")
    assert "do not trust this file" in refused(pack(tmp_path / "a.pth", program), "asks for posix.system, which is not")
    assert not canary.exists()
    pickle.loads(program)  # the control
    assert canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "subprocess.Popen", "builtins.eval", "builtins.getattr", "__builtin__.exec", "torch.load",
        "torch.serialization.load", "torch._utils._rebuild_qtensor", "torch.nn.Module", "copyreg._reconstructor",
        "copy_reg._reconstructor", "_codecs.encode", "collections.OrderedDict.fromkeys", "pickle.loads",
        "llama_jax.weights.torch_file.read_torch_file", "torch.FloatStorage.x", "x" * 5000 + ".y",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_only_the_names_of_a_checkpoint(tmp_path, name, form):
    module, _, attribute = name.rpartition(".")
    instructions = {
        "GLOBAL": f"c{module}\n{attribute}\n".encode() + b")R",
        "STACK_GLOBAL": text(module) + text(attribute) + b"\x93)R",
        "INST": b"(" + f"i{module}\n{attribute}\n".encode(),
    }[form]
    message = refused(pack(tmp_path / "a.pth", state(instructions)), "do not trust this file")
    assert f"asks for {name[:150]}" in message if form != "INST" else "instruction INST" in message
    assert len(message) < 500 + len(str(tmp_path))


OTHER_INSTRUCTIONS = {
    "bytes": b"C\x02ab",
    "set": b"\x8f",
    "object": b"ccollections\nOrderedDict\n)\x81",
    "extension": b"\x82\x01",
    "text number": b"I1\n",
    "python 2 string": b"U\x02ab",
    "copy": b"N2",
    "big number": b"\x8b\x08\0\0\0" + bytes(8),
    "buffer": b"\x97",
}


@pytest.mark.parametrize("case", OTHER_INSTRUCTIONS)
def test_other_instructions(tmp_path, case):
    refused(pack(tmp_path / "a.pth", state(OTHER_INSTRUCTIONS[case])), "asks for the pickle instruction [A-Z_0-9]+ ")


IMPOSSIBLE = {
    "storage cut short": (tensor(count=3, shape=(3,)), "storage '0' shall have 12 bytes, and has 8"),
    "storage of 2**62": (tensor(count=2**62, shape=(2**62,)), "shall have 18446744073709551616 bytes, and has 8"),
    "negative storage": (tensor(count=-1), "shall have -4 bytes"),
    "no storage": (tensor(key="1"), "storage '1' shall have 8 bytes, and is not there"),
    "outside": (tensor(key="../data.pkl"), "is not there"),
    "untyped": (tensor(tag="module"), "not described as one"),
    "unknown storage": (tensor(kind=b"ComplexFloatStorage"), "asks for torch.ComplexFloatStorage"),
    "function as storage": (tensor(kind=b"float8_e5m2"), "not described as one"),
    "too long": (tensor(shape=(3,)), r"shape \[3\] is cut from a storage of 2 numbers"),
    "offset": (tensor(offset=1), "is cut from a storage of 2 numbers, and needs 3"),
    "stride": (tensor(strides=(2,)), "is cut from a storage of 2 numbers, and needs 3"),
    "huge offset": (tensor(offset=2**62), "is cut from"),
    "huge shape": (tensor(shape=(2**60,)), "is cut from"),
    "huge stride": (tensor(strides=(2**62,)), "is cut from"),
    "product wraps": (tensor(shape=(2**32, 2**32), strides=(0, 0)), "is cut from"),
    "sum wraps": (tensor(shape=(2, 3, 2), strides=(2**63 - 1, 1, 2)), "is cut from"),
    "beyond 64 bits": (tensor(strides=(2**64,)), "impossible"),
    "expanded": (tensor(shape=(1000,), strides=(0,)), "is cut from"),
    "negative offset": (tensor(offset=-1), "impossible offset, shape or stride"),
    "negative stride": (tensor(offset=1, strides=(-1,)), "impossible offset"),
    "negative shape": (tensor(shape=(-2, -1), strides=(1, 1)), "impossible offset"),
    "float": (tensor(offset=0.5), "impossible offset"),
    "truth": (tensor(shape=(True,)), "impossible offset"),
    "unequal": (tensor(strides=(2, 1)), "impossible offset"),
    "rank": (tensor(shape=(1,) * 65, strides=(1,) * 65), "impossible offset"),
    "vast and empty": (tensor(shape=(0, 2**62), strides=(1, 1)), "cannot be read"),
    "no tuple": (tensor(shape=2), "arguments of torch._utils _rebuild_tensor_v2 are wrong"),
    "few arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "arguments of .* are wrong"),
    "parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\nN\x85R", "arguments of .* are wrong"),
    "storage is called": (b"ctorch\nFloatStorage\n)R", "arguments of torch FloatStorage are wrong"),
    "dict of arguments": (b"ccollections\nOrderedDict\n}\x85R", "arguments of .* are wrong"),
    "text is called": (text("eval") + b")R", "a str, where a _Global is expected"),
    "state of a tensor": (tensor() + b"}b", "a ndarray, where a dict is expected"),
    "state of a class": (b"ccollections\nOrderedDict\n}b", "where a dict is expected"),
    "item of a class": (b"ccollections\nOrderedDict\nNNs", "."),
    "appended to text": (text("x") + b"Na", "a str, where a list is expected"),
    "deep key": (b"})" + b"\x85" * 100_000 + b"Ns", "a key of type tuple"),
    "odd items": (b"}(Nu", "cannot be read"),
    "underflow": (b"t", "cannot be read"),
    "no mark": (b"\x87\x87", "cannot be read"),
    "no memo": (b"h\x07", "cannot be read"),
    "unknown instruction": (b"\xff", "cannot be read"),
    "long text": (b"\x8d" + struct.pack("<Q", 2**60) + b"abc", "cannot be read"),
    "long bytes": (b"\x8e" + struct.pack("<Q", 2**40) + b"abc", "cannot be read"),
    "long bytearray": (b"\x96" + struct.pack("<Q", 2**36) + b"abc", "cannot be read"),
    "long number": (b"\x8b" + struct.pack("<I", 2**31 - 1) + b"abc", "cannot be read"),
    "long frame": (b"\x95" + struct.pack("<Q", 2**63) + b"N0", "."),
    "no utf-8": (b"X\x01\0\0\0\xff", "cannot be read"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_pickles(tmp_path, case):
    instructions, words = IMPOSSIBLE[case]
    refused(pack(tmp_path / "a.pth", state(instructions), [STORAGE]), words)


def test_deep_nesting(tmp_path):
    """Lists in lists are no tensor and no danger: nothing here recurses."""
    deep = b"]" * 50_000 + b"a" * 49_999
    assert not read_torch_file(pack(tmp_path / "a.pth", state(b")" + b"\x85" * 50_000)))
    assert not read_torch_file(pack(tmp_path / "b.pth", state(deep)))
    refused(pack(tmp_path / "c.pth", b"\x80\x02" + b"(" * 50_000 + b"."), "cannot be read")
    cycle = b"\x80\x02}q\0" + text("model") + b"h\0s."
    assert not read_torch_file(pack(tmp_path / "d.pth", cycle))


BOMBS = {
    "memo": state(b"Nr" + struct.pack("<I", 2**32 - 1) + b"0"),  # the pickle module makes 64 GB of it
    "doubling": state(b")" + b"q\0h\0\x86" * 1000),
    "long text": state(b"\x8d" + struct.pack("<Q", 2**60) + b"abc"),
    "long bytearray": state(b"\x96" + struct.pack("<Q", 2**36) + b"abc"),
    "huge shape": state(tensor(shape=(2**60,), strides=(0,))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_is_bounded(tmp_path, bomb):
    path = pack(tmp_path / "a.pth", BOMBS[bomb], [STORAGE])
    tracemalloc.start()
    try:
        if bomb == "doubling":
            assert not read_torch_file(path)
        else:
            refused(path, ".")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_large_pickle(tmp_path):
    path = pack(tmp_path / "a.pth", state(text("x" * MAX_PICKLE)))
    refused(path, "data.pkl has 4000016 bytes, more than the 4000000 of any Llama; save the")


def change_member(path, name, *, central=None, local=None):
    """Changes bytes of a member's two headers: {offset in the header: bytes}."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        directory = archive.start_dir
    entry = data.index(name.encode(), directory) - 46
    for start, changes in ((entry, central or {}), (info.header_offset, local or {})):
        for offset, new in changes.items():
            data[start + offset : start + offset + len(new)] = new
    path.write_bytes(data)


HEADERS = {
    "signature": ({"local": {0: b"PK\5\6"}}, "is not where its directory says"),
    "past the end": ({"central": {42: struct.pack("<I", 2**31)}}, "cannot be|cannot be read"),
    "longer": ({"central": {20: struct.pack("<2I", 2**31, 2**31)}}, "of 2147483648 bytes is not where"),
    "into the directory": ({"central": {20: struct.pack("<2I", 40, 40)}}, "is not where its directory says"),
    "long name": ({"local": {26: b"\xff\xff"}}, "is not where its directory says"),
    "compressed": ({"central": {10: b"\x08\0"}}, "'a/data/0' is compressed or encrypted.*torch.save it again"),
    "encrypted": ({"central": {8: b"\1\0"}}, "is compressed or encrypted"),
    "unlike sizes": ({"central": {24: b"\xff"}}, "is compressed or encrypted"),
    "shared": ({"central": {42: struct.pack("<I", 0)}}, "cannot be"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers(tmp_path, case):
    changes, words = HEADERS[case]
    path = pack(tmp_path / "a.pth", state(tensor()), [STORAGE])
    change_member(path, "a/data/0", **changes)
    refused(path, words)


def test_compressed_archive(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", state(text("x" * 10_000)))
    refused(path, "'a/data.pkl' is compressed")


def test_other_archives(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"x")
    refused(path, "a zip archive without data.pkl, not a torch file")
    refused(pack(tmp_path / "b.pth", state(tensor()), [STORAGE], byteorder=b"big"), "big-endian")
    path = pack(tmp_path / "c.pth", state(b"N"), **{"data.pkX": state(b"N")})
    path.write_bytes(path.read_bytes().replace(b"data.pkX", b"data.pkl"))
    refused(path, "is not where its directory says")
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"{name}/data.pkl", state(b"N"))
    refused(tmp_path / "d.pth", "without data.pkl")


def test_large_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_DIRECTORY", 100)
    refused(pack(tmp_path / "a.pth", state(tensor()), [STORAGE]), "its directory has 165 bytes, more than 100")


def old_format():
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


NOT_TORCH = {
    "empty": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "old": (old_format(), "old format, from before version 1.6; load it with torch.load"),
    "pickle": (pickle.dumps({"x": 1}), "old format"),
    "tar": (b"x" * 257 + b"ustar\0" + bytes(300), "old format"),
    "html": (b"<html>404", "not a torch file"),
    "zip's beginning": (b"PK\3\4" + bytes(100), "zip directory cannot be read"),
}


@pytest.mark.parametrize("case", NOT_TORCH)
def test_not_torch_files(tmp_path, case):
    data, words = NOT_TORCH[case]
    (tmp_path / "a.pth").write_bytes(data)
    refused(tmp_path / "a.pth", words)


def test_random_damage(tmp_path):
    """Flipped and missing bytes: either the file reads, or a CheckpointError."""
    path = tmp_path / "a.pth"
    base = torch.arange(60.0)
    torch.save({"x": base.reshape(6, 10)[1:, ::2], "y": torch.zeros(3, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    rng = random.Random(0)
    read = refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            for tensor in read_torch_file(path).values():
                assert tensor.read().shape == tensor.shape
                tensor.read().tobytes()  # touches every number
            read += 1
        except CheckpointError:
            refused += 1
    assert read > 200
    assert refused > 200
