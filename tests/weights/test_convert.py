"""Every format into every other: bit-exact, whole or not at all, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import tensorstore
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama_jax
from llama_jax.config import ConfigError, ModelConfig, RopeScaling
from llama_jax.text.samples import sample_texts
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.replace import replacing
from llama_jax.weights.save import convert
from scripts.bench.weights import peak_memory
from tests.builders import LLAMA31, LLAMA32, hf_model, mesh_on, one_device, slow, tiny_config, write_hf
from tests.text.helpers import random_texts

ROOT = Path(__file__).parents[2]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VARIANTS = {
    "MHA": tiny_config(num_heads=8, num_kv_heads=8, head_dim=8),
    "GQA": tiny_config(num_heads=16, num_kv_heads=8, head_dim=4),
    "tied, factor 8": tiny_config(
        num_kv_heads=8, head_dim=8, tie_embeddings=True, rope_theta=5e5, rope_scaling=LLAMA31
    ),
    "head_dim 64, factor 32": tiny_config(num_kv_heads=8, head_dim=64, rope_theta=5e5, rope_scaling=LLAMA32),
}


def hf_folder(folder: Path, config: ModelConfig, dtype: str) -> Path:
    write_hf(folder, hf_model(config).to(DTYPES[dtype]))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library, not ours, finds in a folder."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def assert_same(a: Path, b: Path) -> None:
    one, other = stored(a), stored(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    assert open_checkpoint(a).config == open_checkpoint(b).config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips_are_bit_exact(name, dtype, tmp_path):
    config = VARIANTS[name]
    hf = hf_folder(tmp_path / "hf", config, dtype)
    convert(hf, tmp_path / "native", to="native")
    for shards in (1, 2, 4, 8):
        meta = tmp_path / f"meta{shards}"
        convert(tmp_path / "native", meta, to="meta", shards=shards)
        assert len(list(meta.glob("consolidated.*.pth"))) == shards
        convert(meta, tmp_path / f"from-meta{shards}", to="hf", max_shard_size=40_000)
        assert_same(hf, tmp_path / f"from-meta{shards}")
    convert(hf, tmp_path / "x.gguf", to="gguf")
    convert(tmp_path / "x.gguf", tmp_path / "from-gguf", to="hf")
    assert_same(hf, tmp_path / "from-gguf")


@st.composite
def configs(draw) -> ModelConfig:
    kv, groups, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    scaling = draw(st.sampled_from([None, LLAMA31, LLAMA32, RopeScaling(2.5, 2.0, 3.0, 1000)]))
    return ModelConfig(
        vocab_size=draw(st.integers(3, 40)), embed_dim=kv * groups * draw(st.integers(1, 9)),
        mlp_dim=draw(st.integers(2, 40)), num_layers=draw(st.integers(1, 3)), num_heads=kv * groups,
        num_kv_heads=kv, head_dim=head_dim,
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 3e-5])), rope_theta=draw(st.sampled_from([1e4, 1e5, 5e5, 1e6])),
        rope_scaling=scaling, max_seq_len=draw(st.sampled_from([64, 2048, 131072])),
        tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(config=configs(), dtype=st.sampled_from(sorted(DTYPES)))
def test_any_small_model_survives_every_format(config, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    path = hf_folder(folder / "hf", config, dtype)
    for i, to in enumerate(("gguf", "native", "meta", "gguf", "meta", "native", "hf")):
        convert(path, folder / f"{i}{to}", to=to)
        path = folder / f"{i}{to}"
    assert_same(folder / "hf", path)


def test_a_converted_model_computes_the_same(tmp_path):
    """One Meta folder in four shards, and a native checkpoint on a mesh, against transformers."""
    config = VARIANTS["head_dim 64, factor 32"]
    hf = write_hf(tmp_path / "hf", config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 100))
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens)).logits.numpy()
    convert(tmp_path / "hf", tmp_path / "meta", to="meta", shards=4)
    convert(tmp_path / "hf", tmp_path / "native", to="native")
    for folder, mesh in (("meta", "tensor=1"), ("meta", "fsdp=2,tensor=4"), ("native", "fsdp=2,tensor=4")):
        llama = llama_jax.load(tmp_path / folder, mesh=mesh_on(mesh), dtype="float32")
        np.testing.assert_allclose(np.asarray(llama_jax.logits(llama, tokens)), expected, atol=1e-4)


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "native"])
def test_a_loaded_model_is_saved_as_it_is_on_the_devices(format, tmp_path):
    config = VARIANTS["tied, factor 8"]
    hf_folder(tmp_path / "hf", config, "float32")
    llama = llama_jax.load(tmp_path / "hf", mesh="fsdp=2,tensor=4", dtype="float32")
    path = tmp_path / ("x.gguf" if format == "gguf" else "out")
    llama_jax.save(llama, path, format=format)
    again = llama_jax.load(path, mesh=one_device(), dtype="float32")
    assert again.config == config
    for a, b in zip(jax.tree.leaves(llama.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_dtype_changes_only_where_asked_and_overflow_is_an_error(tmp_path):
    config = VARIANTS["GQA"]
    model = hf_model(config)
    write_hf(tmp_path / "hf", model)
    convert(tmp_path / "hf", tmp_path / "half", to="hf", dtype="bfloat16")
    for name, tensor in stored(tmp_path / "half").items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16()), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    write_hf(tmp_path / "large", model)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: holds numbers beyond the range of float16"):
        convert(tmp_path / "large", tmp_path / "out", to="hf", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "hf", "large"]


def test_old_torch_files_of_a_hugging_face_folder(tmp_path):
    config = VARIANTS["GQA"]
    model = write_hf(tmp_path / "hf", config)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    state = list(model.state_dict().items())
    files = {f"pytorch_model-0000{i}-of-00002.bin": dict(state[i - 1 :: 2]) for i in (1, 2)}
    for name, part in files.items():
        torch.save(part, old / name)
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(old, tmp_path / "out", to="hf")
    assert_same(tmp_path / "hf", tmp_path / "out")
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd"
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a file name"):
        convert(old, tmp_path / "out2", to="hf")


# ---------------------------------------------------------------------------------------------------------------------
# The real model.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert("smollm2-135m-instruct", folder, to="hf", max_shard_size=200_000_000)
    return folder


@pytest.mark.slow
def test_transformers_loads_the_export_of_smollm2(smollm2_hf):
    llama = llama_jax.load("smollm2-135m-instruct", mesh=one_device(), dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_hf)
    texts = [*sample_texts(), *random_texts(100, seed=5)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == llama.tokenizer.encode(text), text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == llama.chat_format.prompt(messages)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits.numpy()
        exact = model.double()(torch.tensor([prompt])).logits.numpy()
    ours = np.asarray(llama_jax.logits(llama, [prompt]))
    largest = np.abs(exact).max()
    differences = [float(np.abs(a - b).max()) for a, b in ((ours, theirs), (ours, exact), (theirs, exact))]
    print(f"ours to theirs, ours to float64, theirs to float64: {differences}, logits up to {largest:.1f}")
    # Logits reach 38, and float32 rounding alone moves transformers' own by 1e-4: 1e-5 counts relative to the largest.
    assert differences[0] <= 1e-5 * largest
    assert differences[1] <= 2 * differences[2]


@pytest.mark.slow
def test_conversion_holds_little_memory(smollm2_hf, tmp_path):
    largest = 49152 * 576 * 4
    for to, destination in (("meta", tmp_path / "meta"), ("gguf", tmp_path / "x.gguf")):
        with peak_memory() as memory:
            convert(smollm2_hf, destination, to=to)
        assert memory.peak - memory.before <= 2.5 * largest, to
    model = hf_model(tiny_config(), std=0.02)  # Orbax's and JAX's own memory is not what is asked for
    model.save_pretrained(tmp_path / "tiny")
    convert(tmp_path / "tiny", tmp_path / "tiny-native", to="native")
    with peak_memory() as memory:
        convert(smollm2_hf, tmp_path / "native", to="native")
    assert memory.peak - memory.before <= 134_515_008 * 4 + 2.5 * largest
    with peak_memory() as memory:
        convert(tmp_path / "native", tmp_path / "hf", to="hf")
    assert memory.peak - memory.before <= 2.5 * largest
    assert_same(smollm2_hf, tmp_path / "hf")


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, slow(10)])
def test_a_killed_conversion_leaves_nothing_that_looks_complete(smollm2_hf, tmp_path, kills):
    destination = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), str(smollm2_hf), str(destination), "--to", "meta"]
    random = np.random.default_rng(0)
    start = time.perf_counter()
    subprocess.run([*command, "--json"], check=True, capture_output=True)
    whole = time.perf_counter() - start
    finished = 0
    for i in range(kills):
        destination.joinpath("consolidated.00.pth").unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", destination], check=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.2, 1.0) * whole)
        process.send_signal((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[i % 3])
        process.wait()
        if destination.exists():
            finished += 1
            assert open_checkpoint(destination).config == open_checkpoint(smollm2_hf).config
    assert finished < kills, "no conversion was interrupted"
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the rerun removes what was left behind"


def test_a_destination_is_replaced_only_when_asked_and_only_at_the_end(tmp_path):
    hf = hf_folder(tmp_path / "hf", VARIANTS["GQA"], "float32")
    with pytest.raises(FileExistsError, match="already exists.*--overwrite"):
        convert(hf, hf, to="hf")
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not only, a checkpoint"):
        convert(hf, other, to="hf", overwrite=True)
    before = stored(hf)
    convert(hf, hf, to="hf", overwrite=True, dtype="bfloat16")
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in stored(hf).items())
    (tmp_path / "x.gguf").write_bytes(b"GGUF, an old one")
    convert(hf, tmp_path / "x.gguf", to="gguf", overwrite=True)
    assert open_checkpoint(tmp_path / "x.gguf").config == VARIANTS["GQA"]
    convert(hf, tmp_path / "x.gguf", to="hf", overwrite=True)  # a folder in the place of a file
    assert_same(hf, tmp_path / "x.gguf")
    (tmp_path / "notes.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not only, a checkpoint"):
        convert(hf, tmp_path / "notes.txt", to="gguf", overwrite=True)
    (hf / "original").mkdir()  # where Meta's folders lie, and perhaps the source
    with pytest.raises(FileExistsError, match="not only, a checkpoint"):
        convert(tmp_path / "x.gguf", hf, to="hf", overwrite=True)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_destination_as_it_was(failure, tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "config.json").write_text("{}")
    (destination / "model.safetensors").write_text("")

    def write_half() -> None:
        with replacing(destination, overwrite=True) as partial:
            partial.mkdir()
            (partial / "config.json").write_text("half")
            raise failure

    with pytest.raises(type(failure)) as caught:
        write_half()
    assert isinstance(failure, KeyboardInterrupt) or "the disk is full" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (destination / "config.json").read_text() == "{}"


def test_a_running_conversion_keeps_its_files_and_a_dead_one_does_not(tmp_path):
    destination = tmp_path / "out"
    dead = subprocess.Popen(["true"])
    dead.wait()
    with replacing(destination, overwrite=False) as partial:
        name, mine = partial.name, f"-{os.getpid()}-"
        partial.mkdir()
        (partial / "new").touch()
        running, abandoned, moved_away = (
            tmp_path / name.replace(mine, other) for other in (f"-{os.getppid()}-", f"-{dead.pid}-", f"-{dead.pid}-9")
        )
        moved_away = moved_away.with_name(f"{moved_away.name}-old")
        others = (tmp_path / f"{name}-notes.txt", running, abandoned, moved_away)
        for path in others:
            path.mkdir()
        (moved_away / "old").touch()
    assert (destination / "new").exists()
    shutil.rmtree(destination)
    with pytest.raises(FileExistsError), replacing(destination, overwrite=False):
        pass  # killed between two renames: what was there is put back
    assert (destination / "old").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", running.name, f"{name}-notes.txt"])


def test_arguments_that_make_no_sense_are_refused_before_anything_is_read(tmp_path):
    hf = hf_folder(tmp_path / "hf", VARIANTS["GQA"], "float32")
    for options, words in (
        ({"to": "hf", "quantize": "q8_0"}, "--to gguf"),
        ({"to": "gguf", "shards": 2}, "--to meta"),
        ({"to": "pth"}, "choose one of hf, meta, gguf, native"),
        ({"to": "hf", "dtype": "int8"}, "float32, bfloat16, float16"),
        ({"to": "gguf", "quantize": "q2_k"}, "q8_0, q4_0"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(hf, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match=r"--shards 3 does not divide num_kv_heads \(8\)"):
        convert(hf, tmp_path / "out", to="meta", shards=3)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


# ---------------------------------------------------------------------------------------------------------------------
# What must not pass silently.
# ---------------------------------------------------------------------------------------------------------------------


def edited(folder: Path, name: str, value: float, *, dtype: str = "bfloat16") -> Path:
    """A model with one number of its output head changed, another one infinite beside it."""
    model = hf_model(VARIANTS["GQA"]).to(DTYPES[dtype])
    with torch.no_grad():
        model.lm_head.weight[3, :2] = torch.tensor([value, torch.inf if name == "inf" else 0.0])
    write_hf(folder, model)
    return folder


@pytest.mark.parametrize("to", ["hf", "meta", "gguf", "native"])
def test_no_number_becomes_infinite(to, tmp_path):
    hf = edited(tmp_path / "hf", "inf", 1e5)
    with pytest.raises(ValueError, match=r"(lm_head|output)\.weight: holds numbers beyond the range of float16"):
        convert(hf, tmp_path / "out", to=to, dtype="float16")
    hf = edited(tmp_path / "hf2", "", 1e5)
    convert(hf, tmp_path / "out", to=to)  # bfloat16 holds it


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e7])
def test_a_number_that_spoils_its_block_is_not_quantized(value, tmp_path):
    with pytest.raises(ValueError, match=r"output\.weight: holds numbers that Q8_0 cannot"):
        convert(edited(tmp_path / "hf", "", value), tmp_path / "x.gguf", to="gguf", quantize="q8_0")


def test_numbers_that_no_format_keeps_need_a_dtype(tmp_path):
    write_hf(tmp_path / "hf", hf_model(VARIANTS["GQA"]).double())
    for to in ("gguf", "native"):
        with pytest.raises(ValueError, match="holds float64 numbers: say what to make of them"):
            convert(tmp_path / "hf", tmp_path / "out", to=to)
        assert convert(tmp_path / "hf", tmp_path / to, to=to, dtype="float32").dtype == "float32"


def test_a_tied_model_with_another_head_keeps_it(tmp_path):
    """An equal head is none of its own; another one is what transformers computes with, and is written."""
    config = VARIANTS["tied, factor 8"]
    hf = hf_folder(tmp_path / "hf", config, "float32")
    tensors = stored(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "same", to="hf")
    assert stored(tmp_path / "same").keys() == tensors.keys() - {"lm_head.weight"}
    tensors["lm_head.weight"][-1, -1] += 1
    safetensors.torch.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "out", to="hf")
    oracle = transformers.LlamaForCausalLM.from_pretrained(hf).lm_head.weight
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], oracle)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_damaged_native_checkpoint_is_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf", VARIANTS["GQA"], "float32")
    convert(hf, tmp_path / "native", to="native")
    params = tmp_path / "native" / "params"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": params.as_uri()}).result()
    chunk = next(key for key in store.list().result() if key.startswith(b"blocks.mlp.w_up/c/"))
    store.delete_range(tensorstore.KvStore.KeyRange(chunk, chunk + b"\0")).result()
    with pytest.raises(ValueError, match=r"params: 'blocks.mlp.w_up' cannot be read"):
        convert(tmp_path / "native", tmp_path / "out", to="hf")
    (params / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="params: not a checkpoint that Orbax can read"):
        convert(tmp_path / "native", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
