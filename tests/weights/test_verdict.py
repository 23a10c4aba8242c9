"""One verdict on what a checkpoint is: heads, names, copies, indexes, system errors. transformers is the oracle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import llama_jax
from llama_jax.evaluate.compare import compare
from llama_jax.weights.formats import FORMATS
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.save import convert
from llama_jax.weights.source import CheckpointError, Tensor, UnreadableError
from tests.builders import one_device, tiny_config, write_hf

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(num_layers=1)
IDS = [[1, 20, 3, 200]]
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verdict") / "plain"
    write_hf(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def expected(plain) -> np.ndarray:
    return of_transformers(plain)


def of_transformers(folder: Path) -> np.ndarray:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def ours(path: Path) -> np.ndarray:
    return np.asarray(llama_jax.logits(llama_jax.load(path, mesh=one_device(), dtype="float32"), IDS))


def changed(plain: Path, to: Path, tensors: dict | None = None, **config: Any) -> Path:
    """A copy with other tensors and other keys of config.json."""
    shutil.copytree(plain, to)
    said = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(said | config))
    if tensors is not None:
        save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@contextlib.contextmanager
def bytes_read(monkeypatch) -> Iterator[list[int]]:
    read, found = Tensor.read, []

    def counting(self: Tensor, index: tuple[slice, ...] = ()) -> np.ndarray:
        out = read(self, index)
        found.append(out.nbytes)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "read", counting)
        yield found


# ---------------------------------------------------------------------------------------------------------------------
# The output head
# ---------------------------------------------------------------------------------------------------------------------


def test_the_stored_head_is_used_in_every_format(plain, expected, tmp_path, caplog):
    """A tied flag over another head: r01's case, in each format that has such a flag."""
    convert(plain, tmp_path / "meta", to="meta")
    (tmp_path / "meta" / "llama_jax.json").write_text(
        json.dumps({"max_seq_len": 512, "head_dim": 16, "tie_embeddings": True})
    )
    convert(plain, tmp_path / "native", to="native")
    said = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    hf = changed(plain, tmp_path / "hf", tie_word_embeddings=True)
    np.testing.assert_array_equal(of_transformers(hf), expected)  # transformers takes the stored head
    for format in ("hf", "meta", "native"):
        caplog.clear()
        np.testing.assert_allclose(ours(tmp_path / format), expected, atol=2e-5)
        (record,) = [r for r in caplog.records if r.name == "llama_jax"]
        assert "the stored head is used, and the model is not tied" in record.getMessage()
    convert(hf, tmp_path / "x.gguf", to="gguf")
    np.testing.assert_allclose(ours(tmp_path / "x.gguf"), expected, atol=2e-5)


def test_an_equal_head_is_tied_and_few_rows_tell_another(plain, tmp_path, caplog, monkeypatch):
    tensors = weights(plain)
    equal = changed(plain, tmp_path / "equal", tensors | {HEAD: tensors[EMBED]}, tie_word_embeddings=True)
    with bytes_read(monkeypatch) as read:
        checkpoint = open_checkpoint(equal)
    assert checkpoint.config.tie_embeddings
    assert sum(read) <= 2.6 * tensors[EMBED].nbytes  # the sample, and both tables once
    assert not caplog.records
    half = tensors[EMBED].astype(np.float16)
    narrow = changed(
        plain, tmp_path / "narrow", tensors | {EMBED: half.astype(np.float32), HEAD: half}, tie_word_embeddings=True
    )
    assert open_checkpoint(narrow).config.tie_embeddings  # the same numbers in another dtype
    last = tensors[EMBED].copy()
    last[-1, -1] += 1
    other = changed(plain, tmp_path / "other", tensors | {HEAD: last}, tie_word_embeddings=True)
    assert not open_checkpoint(other).config.tie_embeddings  # a row that no sample holds
    large = tmp_path / "large"
    config = tiny_config(num_layers=1, vocab_size=64_000)
    write_hf(large, config)
    different = changed(large, tmp_path / "different", tie_word_embeddings=True)
    with bytes_read(monkeypatch) as read:
        assert not open_checkpoint(different).config.tie_embeddings
    assert sum(read) <= 130 * 2 * 64 * 4


def test_a_head_alone_is_the_table_too(plain, tmp_path):
    """transformers ties them whichever of the two is stored."""
    tensors = weights(plain)
    tied = changed(plain, tmp_path / "tied", {k: x for k, x in tensors.items() if k != EMBED}, tie_word_embeddings=True)
    np.testing.assert_allclose(ours(tied), of_transformers(tied), atol=2e-5)


def test_one_storage_is_not_read(plain, tmp_path, monkeypatch):
    """torch.save of a tied model keeps one storage under both names."""
    folder = changed(plain, tmp_path / "torch", tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    state = dict(model.state_dict())
    state[HEAD] = state[EMBED]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).config.tie_embeddings


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

PREFIXES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled body": lambda name: name.replace("model.", "model._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "Lightning": lambda name: f"model.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "Lightning and torch.compile": lambda name: f"model._orig_mod.{name}",
    "no prefix": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_wrappers_names(plain, tmp_path, caplog, kind):
    tensors = {PREFIXES[kind](name): x for name, x in weights(plain).items()}
    checkpoint = open_checkpoint(changed(plain, tmp_path / "wrapped", tensors))
    for name, x in weights(plain).items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), x)
    (record,) = caplog.records
    assert "its names are those of a wrapped model" in record.getMessage()


@pytest.mark.parametrize("format", ["hf", "meta"])
@pytest.mark.parametrize(
    "keys", [("module",), ("state_dict",), ("model_state_dict",), ("model", "module"), ("network",)]
)
def test_models_inside_training_checkpoints(plain, tmp_path, keys, format):
    convert(plain, tmp_path / "c", to=format)
    before = {name: x.read().copy() for name, x in open_checkpoint(tmp_path / "c").tensors.items()}
    state = {f"module.{name}": torch.from_numpy(x) for name, x in before.items()}
    beside = {"optimizer": {"state": {}, "param_groups": []}, "dtype": torch.bfloat16, "at": torch.Size([1])}
    for key in keys[::-1]:
        state = {key: state, **beside}
    for file in (tmp_path / "c").glob("*.safetensors"):
        file.unlink()
    torch.save(state, tmp_path / "c" / {"hf": "pytorch_model.bin", "meta": "consolidated.00.pth"}[format])
    after = open_checkpoint(tmp_path / "c").tensors
    assert after.keys() == before.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name].read(), x)


def test_a_wrapped_copy_beside_the_model_is_not_taken(plain, tmp_path):
    tensors = weights(plain)
    folder = changed(plain, tmp_path / "two", tensors | {f"module.{name}": x + 1 for name, x in tensors.items()})
    with pytest.raises(CheckpointError, match="tensors that a Llama does not have, first 'module"):
        open_checkpoint(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Copies, indexes, folders
# ---------------------------------------------------------------------------------------------------------------------


def indexed(plain: Path, to: Path, parts: list[dict], index: dict[str, int], **config: Any) -> Path:
    changed(plain, to, **config)
    (to / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, to / name, {"format": "pt"})
    weight_map = {name: names[i] for name, i in index.items()}
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def test_copies_and_wrong_indexes(plain, expected, tmp_path):
    """Equal copies, the file that the index names, a wrong home, a tied head that no shard has."""
    tensors = weights(plain)
    first, *rest = sorted(tensors)
    parts = [{first: tensors[first], **{name: tensors[name] for name in rest[:5]}}, {n: tensors[n] for n in rest[5:]}]
    index = {name: int(name in parts[1]) for name in tensors}
    twice = indexed(plain, tmp_path / "twice", [parts[0], parts[1] | {first: tensors[first]}], index)
    np.testing.assert_allclose(ours(twice), expected, atol=2e-5)
    for kept in (0, 1):
        copies = [parts[0], parts[1] | {first: tensors[first] + 1}]
        folder = indexed(plain, tmp_path / f"named{kept}", copies, index | {first: kept})
        np.testing.assert_array_equal(open_checkpoint(folder).tensors[first].read(), tensors[first] + kept)
    moved = indexed(plain, tmp_path / "moved", parts, index | {first: 1})
    np.testing.assert_allclose(ours(moved), of_transformers(moved), atol=2e-5)
    body = {name: x for name, x in tensors.items() if name != HEAD}
    tied = indexed(plain, tmp_path / "tied", [body], dict.fromkeys(tensors, 0), tie_word_embeddings=True)
    np.testing.assert_allclose(ours(tied), of_transformers(tied), atol=2e-5)
    missing = indexed(plain, tmp_path / "missing", [body], dict.fromkeys(tensors, 0))
    with pytest.raises(CheckpointError, match="'lm_head.weight'; the index says that model-00001-of-00001.safetensors"):
        open_checkpoint(missing)


def test_the_folder_above(plain, tmp_path):
    """The root of a cached repository; a GGUF file under a config.json; Meta's weights under one."""
    hub = tmp_path / "models--some--model"
    for name in ("aaaa", "bbbb"):
        shutil.copytree(plain, hub / "snapshots" / name)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("bbbb")
    assert open_checkpoint(hub).path == hub / "snapshots" / "bbbb"
    convert(plain, tmp_path / "x.gguf", to="gguf")
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(plain / "config.json", beside)
    shutil.copy(tmp_path / "x.gguf", beside)
    (beside / "mmproj-x.gguf").write_bytes(b"x")
    assert open_checkpoint(beside).format == "gguf"
    convert(plain, tmp_path / "meta", to="meta")
    shutil.copy(plain / "config.json", tmp_path / "meta")
    assert open_checkpoint(tmp_path / "meta").format == "meta"
    (tmp_path / "meta" / "training_args.bin").write_bytes(b"x")
    assert open_checkpoint(tmp_path / "meta").format == "meta"


# ---------------------------------------------------------------------------------------------------------------------
# What is left out is told again; writers; the system
# ---------------------------------------------------------------------------------------------------------------------


def test_convert_and_verify_tell_what_was_left_out(plain, tmp_path):
    extra = {
        "global_step": np.array(1200),
        "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((64, 16), np.float32),
    }
    folder = changed(plain, tmp_path / "extra", weights(plain) | extra)
    report = convert(folder, tmp_path / "x.gguf", to="gguf")
    assert [text for text in report.warnings if "'global_step': counters" in text]
    assert [text for text in report.warnings if "cos_cached': RoPE tables" in text]
    found = compare(plain, folder, with_logits=False)
    assert found.problems(0) == []
    assert all(text.startswith("left out of the second: ") for text in found.left_out)
    assert len(found.left_out) == 2
    script = [sys.executable, ROOT / "scripts" / "verify.py", folder, plain, "--no-logits"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "left out of the first: 'global_step': counters" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), KeyError("x"), ValueError("odd"), RuntimeError("x")]
)
def test_writers_end_in_words(plain, tmp_path, monkeypatch, error):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(FORMATS["gguf"], "write", broken)
    with pytest.raises(CheckpointError) as caught:
        convert(plain, tmp_path / "x.gguf", to="gguf")
    message = str(caught.value)
    assert all(word in message for word in (str(plain), "as gguf to", str(tmp_path / "x.gguf"), "meta or native"))
    assert caught.value.__cause__ is error
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def without_privilege() -> Iterator[None]:
    """Root reads everything: for a moment, another user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", ""])
def test_no_permission_is_said_as_such(plain, file):
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = changed(plain, Path(top) / "model")
        (folder / "tokenizer.json").write_text("{}")
        for path in folder.iterdir():
            path.chmod(0o644)
        (folder / file).chmod(0)
        with without_privilege(), pytest.raises(UnreadableError, match="no permission to read it") as caught:
            open_checkpoint(folder)
        assert str(folder / file) in str(caught.value)
        assert isinstance(caught.value, OSError)
        folder.chmod(0o755)


def test_no_permission_inside_a_run(tmp_path):
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        run = Path(top) / "run" / "checkpoints"
        run.mkdir(parents=True)
        run.chmod(0)
        with without_privilege(), pytest.raises(UnreadableError, match="run/checkpoints: no permission to read it"):
            open_checkpoint(run.parent)
        run.chmod(0o755)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UnreadableError, match="loop: its symbolic links"):
        open_checkpoint(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreadableError, match="a file stands where"):
        open_checkpoint(tmp_path / "file" / "x")
