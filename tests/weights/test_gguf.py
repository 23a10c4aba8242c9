"""GGUF: dequantization against the gguf package, files written by it, and damaged files."""

import random
import struct
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from llama_jax.weights.dequantize import BLOCK_FORMATS, dequantize
from llama_jax.weights.gguf_file import PLAIN_DTYPES, TYPE_NAMES, read_gguf
from llama_jax.weights.source import CheckpointError

HALF, QUARTER = np.float16(0.5).tobytes(), np.float16(0.25).tobytes()


def pattern(nbytes):
    return bytes((37 * i + 11) % 256 for i in range(nbytes))


def one_block(kind, data):
    return dequantize(np.frombuffer(data, np.uint8)[None], kind)


# Blocks and values worked out apart from any implementation: first values, last values, sum.
GOLDEN = {
    "Q4_0": (HALF + pattern(16), [1.5, -4, -1.5, 1, 3.5, -2, 0.5, 3], [], -15.5),
    "Q4_1": (HALF + QUARTER + pattern(16), [5.75, 0.25, 2.75, 5.25], [], 120.5),
    "Q5_0": (HALF + pattern(20), [7.5, 2, -3.5, 7], [], -21.5),
    "Q5_1": (HALF + QUARTER + pattern(20), [15.75, 10.25, 4.75, 15.25], [], 242.5),
    "Q8_0": (HALF + pattern(32), [5.5, 24, 42.5, 61], [], 8),
    "Q4_K": (HALF + QUARTER + pattern(140), [30.75, 58.25, -2.25, 25.25], [96.5, 114.5, 132.5, 15.5], 22252),
    "Q5_K": (
        HALF + QUARTER + pattern(172),
        [118.75, 58.25, 85.75, 25.25],
        [186.5, 204.5, 78.5, 105.5],
        46164,
    ),
    "Q6_K": (pattern(208) + HALF, [-715.5, 848, 291.5, -265], [85, 75, -20, -30], 2306),
}


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_dequantize_golden(kind):
    data, first, last, total = GOLDEN[kind]
    values = one_block(kind, data)
    np.testing.assert_array_equal(values[: len(first)], first)
    np.testing.assert_array_equal(values[len(values) - len(last) :], last)
    assert values.sum() == total


@pytest.mark.parametrize(
    ("kind", "block", "step"),
    [
        ("Q4_0", "b7b56c6c5c5b4b4a4a3a3929282818170706", 0.358),
        ("Q4_1", "b93449be80809191a2a2b3b3c4c4d5d5e6e6f7f7", 0.296),
        ("Q8_0", "c225bac0c7cdd4dae0e7edf3fa00060d131920262c333940464c53595f666c72797f", 0.0226),
    ],
)
def test_dequantize_inverts_quantization(kind, block, step):
    x = ((np.arange(32) - 11) / 7).astype(np.float32)
    assert gguf.quants.quantize(x, Type[kind]).tobytes().hex() == block
    # Rounding costs half a step; Q4_0 has no code for the largest value opposite in sign to its extreme.
    np.testing.assert_allclose(one_block(kind, bytes.fromhex(block)), x, atol=0.52 * step)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_dequantize_equals_gguf_package(kind):
    """Random bytes: every bit pattern of scales too, inf and NaN included; rows beyond one chunk."""
    nbytes = BLOCK_FORMATS[kind].nbytes
    blocks = np.random.default_rng(1).integers(0, 256, (3, 211, 5, nbytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.reshape(3, 211, -1), Type[kind])
    actual = dequantize(blocks, kind)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def write(path, tensors=(), values=(), **options):
    """A file by the gguf package, from (name, array, Type or None) and (method of its writer, key, ...)."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for method, *arguments in values:
        getattr(writer, method)(*arguments)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_type(tmp_path):
    scalars = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -5,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "▁Ünï🦙",
    }
    values = [(f"add_{kind}", f"x.{kind}", value) for kind, value in scalars.items()]
    arrays = {
        "ints": [1, -2, 3],
        "floats": [0.5, -1.5],
        "strings": ["a", "", "▁b"],
        "flags": [True, False, True],
    }
    values += [("add_array", f"x.{name}", value) for name, value in arrays.items()]
    metadata = read_gguf(write(tmp_path / "a.gguf", values=values)).metadata
    assert metadata["general.architecture"] == "llama"
    for kind, value in scalars.items():
        assert metadata[f"x.{kind}"] == value
        assert type(metadata[f"x.{kind}"]) is type(value)
    assert metadata["x.strings"] == arrays["strings"]
    for name in ("ints", "floats", "flags"):
        assert isinstance(metadata[f"x.{name}"], np.ndarray)
        assert metadata[f"x.{name}"].tolist() == arrays[name]


INDICES = [
    (),
    (slice(3, 7),),
    (slice(None, None, 2), slice(5, 40)),
    (slice(8, 2, -2), slice(None, None, -3)),
    (slice(None), slice(600, 250, -70)),
    (slice(2, 3), slice(300, 301)),
    (slice(4, 4), slice(None)),
    (slice(None), slice(9, 9)),
]


@pytest.mark.parametrize("alignment", [32, 128])
def test_tensors_of_every_type(tmp_path, alignment):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 768)).astype(np.float32)
    tensors, expected = [], {}
    for name in [*PLAIN_DTYPES, *BLOCK_FORMATS]:
        kind = Type[name]
        if name in ("F32", "F16", "F64") or name.startswith("I"):
            stored, values = (x * 50).astype(PLAIN_DTYPES[name]), (x * 50).astype(PLAIN_DTYPES[name])
        elif name in ("Q4_K", "Q5_K", "Q6_K"):  # the package cannot quantize to these
            stored = rng.integers(0, 64, (9, 3 * BLOCK_FORMATS[name].nbytes), np.uint8)
            values = gguf.quants.dequantize(stored, kind)
        else:
            stored = gguf.quants.quantize(x, kind)
            values = gguf.quants.dequantize(stored, kind)
        if name == "BF16":
            values = values.astype(ml_dtypes.bfloat16)
        tensors.append((name, stored, kind if stored.dtype == np.uint8 else None))
        expected[name] = values
    tensors.append(("vector", x[0], None))
    options = [("add_custom_alignment", alignment)]
    file = read_gguf(write(tmp_path / "a.gguf", tensors, options))
    assert list(file.tensors) == [*expected, "vector"]
    for name, values in expected.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, (9, 768), values.dtype)
        for index in INDICES:
            actual = tensor.read(index)
            assert actual.dtype == values.dtype
            np.testing.assert_array_equal(actual, values[index], err_msg=f"{name} {index}")
    assert file.tensors["Q4_1"].nbytes == 9 * 24 * 20
    np.testing.assert_array_equal(file.tensors["vector"].read((slice(3, 9),)), x[0, 3:9])
    with pytest.raises(IndexError, match="vector has 1 dimensions"):
        file.tensors["vector"].read((slice(1), slice(1)))


# Files written by hand, so that each can be wrong in one place.
def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def item(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


def info(name="x", dims=(32, 2), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(items=(), infos=(), data=b"", *, magic=b"GGUF", version=3, num_tensors=None, num_items=None, align=32):
    counts = (
        len(infos) if num_tensors is None else num_tensors,
        len(items) if num_items is None else num_items,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(items) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


FLOATS = np.arange(64, dtype=np.float32).tobytes()
U32 = struct.Struct("<I").pack
HUGE = 2**60
DAMAGED = {
    "empty": (b"", "the file is empty"),
    "magic": (raw(magic=b"GGML"), "not a GGUF file"),
    "four bytes": (b"GGUF", "the file ends at 4"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "version 1": (raw(version=1), "GGUF version 1"),
    "version 9": (raw(version=9), "GGUF version 9"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "items": (raw(num_items=HUGE), "the file ends at"),
    "tensors": (raw(num_tensors=HUGE), "the file ends at"),
    "key length": (raw([struct.pack("<Q", HUGE)]), "the file ends at"),
    "string length": (raw([item("a", 8, struct.pack("<Q", HUGE))]), "the file ends at"),
    "array length": (raw([item("a", 9, struct.pack("<IQ", 4, HUGE))]), "the file ends at"),
    "strings": (raw([item("a", 9, struct.pack("<IQ", 8, HUGE))]), "the file ends at"),
    "nested": (raw([item("a", 9, struct.pack("<IQ", 9, 1))]), "array of arrays"),
    "value type": (raw([item("a", 13, U32(1))]), "'a' has the unknown value type 13"),
    "bool": (raw([item("a", 7, b"\2")]), "other than 0 and 1"),
    "utf-8": (raw([item("a", 8, string(b"\xff"))]), "not UTF-8"),
    "same key": (raw([item("a", 4, U32(1))] * 2), "'a' is there twice"),
    "alignment 0": (raw([item("general.alignment", 4, U32(0))]), "general.alignment is 0"),
    "alignment 12": (raw([item("general.alignment", 4, U32(12))]), "power of two"),
    "alignment text": (raw([item("general.alignment", 8, string("32"))]), "general.alignment is '32'"),
    "split": (raw([item("split.count", 2, struct.pack("<H", 3))]), "one of the 3 parts .*-00001-of-00003.gguf"),
    "same tensor": (raw([], [info(), info()], FLOATS), "'x' is there twice"),
    "dimensions": (raw([], [info(dims=(1,) * 5)], FLOATS), "5 dimensions"),
    "dimension count": (raw([], [string("x") + U32(2**32 - 1)]), "4294967295 dimensions"),
    "product": (raw([], [info(dims=(2**32, 2**32, 2**32))], FLOATS), "needs a file of"),
    "zero": (raw([], [info(dims=(0, HUGE))], FLOATS), "impossible shape"),
    "type 31": (raw([], [info(kind=31)], FLOATS), "'x' is stored as type 31.*supported are F64"),
    "IQ2_XXS": (raw([], [info(kind=16)], FLOATS), "'x' is stored as IQ2_XXS.*llama-quantize"),
    "Q2_K": (raw([], [info(kind=10)], FLOATS), "stored as Q2_K"),
    "blocks": (raw([], [info(dims=(48, 2), kind=2)], FLOATS), r"\(2, 48\) cannot be Q4_0"),
    "offset": (raw([], [info(offset=HUGE)], FLOATS), "needs a file of"),
    "unaligned": (raw([], [info(dims=(4,), offset=4)], FLOATS), "not aligned to 32"),
    "overlap": (raw([], [info("x"), info("y", (32,), offset=128)], FLOATS), "'x' and 'y' overlap"),
    "cut short": (raw([], [info()], FLOATS)[:-1], "needs a file of 352 bytes, and this one has 351"),
}


def test_parts_of_a_split_checkpoint_are_one(tmp_path):
    arrays = {f"t{i}": np.full((2, 8), i, np.float32) for i in range(5)}
    values = [("add_uint32", "llama.block_count", 7)]
    write(tmp_path / "x.gguf", [(name, x, None) for name, x in arrays.items()], values, split_max_tensors=2)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        file = read_gguf(part)
        assert file.metadata["llama.block_count"] == 7
        assert file.tensors.keys() == arrays.keys()
        for name, x in arrays.items():
            np.testing.assert_array_equal(file.tensors[name].read(), x)
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 parts, first x-00002-of-00003\.gguf; fetch"):
        read_gguf(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.gguf: does not say that it is part 2 of 3"):
        read_gguf(parts[0])
    parts[1].write_bytes(second)
    (tmp_path / "renamed.gguf").write_bytes(second)
    with pytest.raises(CheckpointError, match="one of the 3 parts"):
        read_gguf(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    data, message = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ")
    assert ";" in str(error.value)  # the remedy follows


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="not a file"):
        read_gguf(tmp_path)


def test_version_2_and_hand_made_file(tmp_path):
    path = tmp_path / "a.gguf"
    items = [item("general.alignment", 4, U32(64)), item("a", 9, struct.pack("<IQ", 5, 0))]
    path.write_bytes(raw(items, [info(), info("y", (), offset=256)], FLOATS + FLOATS[4:8], version=2, align=64))
    file = read_gguf(path)
    np.testing.assert_array_equal(file.tensors["x"].read(), np.arange(64).reshape(2, 32))
    assert file.tensors["y"].read() == 1
    assert len(file.metadata["a"]) == 0


def test_type_numbers():
    assert {kind.value: kind.name for kind in Type if kind.value in TYPE_NAMES} == TYPE_NAMES


def test_random_damage(tmp_path):
    """Flipped and missing bytes: either the file reads, or a CheckpointError; and never much memory."""
    values = [
        ("add_string", "a", "text"),
        ("add_array", "tokens", ["x", "yz"] * 20),
        ("add_array", "n", [1, 2, 3]),
    ]
    x = np.ones((4, 64), np.float32)
    tensors = [("x", x, None), ("y", gguf.quants.quantize(x, Type.Q4_1), Type.Q4_1)]
    good = write(tmp_path / "good.gguf", tensors, values).read_bytes()
    header = good.index(np.ones(4, np.float32).tobytes())
    rng = random.Random(0)
    path = tmp_path / "damaged.gguf"
    read = refused = 0
    tracemalloc.start()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(header)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            for tensor in read_gguf(path).tensors.values():
                assert tensor.read().shape == tensor.shape
            read += 1
        except CheckpointError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read > 20
    assert refused > 200
    assert peak < 4 << 20
