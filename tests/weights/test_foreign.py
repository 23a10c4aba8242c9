"""docs/checkpoints.md, line by line: what is left out, and what each kind of foreign file is answered with.

The tables are read from the page, so that a line without a file here fails, and a file here without its line.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llama_jax.config import ConfigError
from llama_jax.weights.open import open_checkpoint
from llama_jax.weights.source import CheckpointError

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
V, D, F, H = 48, 16, 24, 4
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D,
    "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
PARAMS = {
    "dim": D, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": V, "norm_eps": 1e-5, "multiple_of": 8,
    "ffn_dim_multiplier": 0.5,
}  # fmt: skip
LAYER = "model.layers.0."
Q = LAYER + "self_attn.q_proj"


def llama() -> dict[str, np.ndarray]:
    """Random weights by Hugging Face's names."""
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D), LAYER + "input_layernorm": (D,)}
    shapes |= {LAYER + "post_attention_layernorm": (D,), Q: (D, D), LAYER + "self_attn.k_proj": (D // 2, D)}
    shapes |= {LAYER + "self_attn.v_proj": (D // 2, D), LAYER + "self_attn.o_proj": (D, D)}
    shapes |= {LAYER + f"mlp.{name}_proj": (F, D) for name in ("gate", "up")} | {LAYER + "mlp.down_proj": (D, F)}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: x for name, x in llama().items() if name not in names}


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {re.sub(old, new, name): x for name, x in llama().items()}


def meta() -> dict[str, np.ndarray]:
    """The same by Meta's names; heads are not permuted, which no test here minds."""
    ours = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "w1", "down": "w2", "up": "w3"}

    def name(text: str) -> str:
        for ending, other in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
            text = text.replace(ending, other)
        text = re.sub(r"self_attn\.(\w)_proj", lambda m: f"attention.{ours[m[1]]}", text)
        text = re.sub(r"mlp\.(\w+)_proj", lambda m: f"feed_forward.{ours[m[1]]}", text)
        text = text.replace("model.embed_tokens", "tok_embeddings").replace("lm_head", "output")
        return text.removeprefix("model.")

    return {name(key): x for key, x in llama().items()}


def quantized(**suffixes: np.ndarray) -> dict[str, np.ndarray]:
    """q_proj in tensors of other names."""
    return without(f"{Q}.weight") | {f"{Q}.{suffix.replace('__', '.')}": x for suffix, x in suffixes.items()}


def hf(folder: Path, tensors: dict[str, np.ndarray] | None = None, files: dict | None = None, **config) -> Path:
    """A Hugging Face folder; `files`: name -> bytes, or what JSON holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if tensors is not None:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return fill(folder, files or {})


def fill(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def file(path: Path, content: bytes) -> Path:
    path.write_bytes(content + bytes(100))
    return path


def ints(*shape: int, kind: type = np.int32) -> np.ndarray:
    return np.zeros(shape, kind)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def torch_folder(folder: Path, content: object, name: str = "pytorch_model.bin") -> Path:
    hf(folder)
    torch.save(content, folder / name)
    return folder


def tensors_of(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def pickled(folder: Path, value: object) -> Path:
    """A .bin of which a trainer's own object is a part."""
    hf(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {}, "args": value}, protocol=2))
    return folder


def gguf_file(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", **values: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_string(key.replace("__", "."), value)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def meta_folder(folder: Path, tensors: dict[str, np.ndarray], **more: object) -> Path:
    params = {
        "dim": D,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": V,
        "norm_eps": 1e-5,
        "multiple_of": 8,
    }
    fill(folder, {"params.json": params | {"ffn_dim_multiplier": 0.5}, **more})
    torch.save(tensors_of(tensors), folder / "consolidated.00.pth")
    return folder


def sharded(folder: Path, parts: list[dict[str, np.ndarray]], index: dict[str, int] | None = None, **config) -> Path:
    """A folder of several files; `index`: tensor -> number of its file, from 1."""
    hf(folder, **config)
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    if index is not None:
        weight_map = {name: names[i - 1] for name, i in index.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hub(folder: Path, *snapshots: str) -> Path:
    root = folder / "models--some--model"
    for name in snapshots:
        hf(root / "snapshots" / name, llama())
    return root


FP8 = ml_dtypes.float8_e4m3fn


def fp8(folder: Path, **more: np.ndarray) -> Path:
    """The numpy side of the safetensors library knows no FP8: written by torch."""
    from safetensors.torch import save_file as save_torch

    tensors = tensors_of(llama() | more)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    save_torch(tensors, hf(folder) / "model.safetensors")
    return folder


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
LORA = {f"{Q}.lora_A.weight": ones(2, D), f"{Q}.lora_B.weight": ones(D, 2)}
PACKED = {"qweight": ints(D // 8, D), "qzeros": ints(1, D // 8), "scales": ones(1, D)}
STATE = {"optimizer.pt": b"x", "scheduler.pt": b"x", "trainer_state.json": {}}

# Kind, as the page has it -> what makes such a folder or file and returns its path.
FOREIGN = {
    # adapters
    "a PEFT adapter's folder": lambda p: fill(p, {"adapter_config.json": ADAPTER, "adapter_model.safetensors": b"x"}),
    "a DoRA adapter's folder": lambda p: fill(p, {"adapter_config.json": ADAPTER | {"use_dora": True}}),
    "a prompt tuning adapter's folder": lambda p: fill(
        p, {"adapter_config.json": ADAPTER | {"peft_type": "PROMPT_TUNING"}}
    ),
    "an IA3 adapter's folder": lambda p: fill(p, {"adapter_config.json": ADAPTER | {"peft_type": "IA3"}}),
    "a PEFT adapter's weights alone": lambda p: fill(p, {"adapter_model.safetensors": b"x"}),
    "LoRA, not merged": lambda p: hf(p, renamed(r"q_proj\.weight", "q_proj.base_layer.weight") | LORA),
    "LoRA beside the weights": lambda p: hf(p, llama() | LORA),
    "LoRA of a PEFT model, prefixed": lambda p: hf(
        p, renamed("^", "base_model.model.") | {f"base_model.model.{k}": x for k, x in LORA.items()}
    ),
    "LoRA alone, under a config.json": lambda p: hf(p, LORA),
    "DoRA, not merged": lambda p: hf(p, llama() | LORA | {f"{Q}.lora_magnitude_vector.weight": ones(D)}),
    "IA3, not merged": lambda p: hf(p, llama() | {f"{Q}.ia3_l.default": ones(D, 1)}),
    "LoRA in GGUF": lambda p: gguf_file(
        p.with_suffix(".gguf"), {"blk.0.attn_q.weight.lora_a": ones(2, D)}, general__type="adapter"
    ),
    # quantizations
    "GPTQ, 2023": lambda p: hf(p, quantized(**PACKED), {"quantize_config.json": {"bits": 4}}),
    "GPTQ, with its configuration": lambda p: hf(p, quantized(**PACKED), quantization_config={"quant_method": "gptq"}),
    "AWQ": lambda p: hf(p, quantized(qweight=ints(D, D // 8), qzeros=ints(1, D // 8), scales=ones(1, D))),
    "AWQ, with its configuration": lambda p: hf(p, llama(), quantization_config={"quant_method": "awq"}),
    "bitsandbytes, 4 bits": lambda p: hf(
        p, llama() | {f"{Q}.weight": ints(D * D // 2, 1, kind=np.uint8), f"{Q}.weight.absmax": ones(4)}
    ),
    "bitsandbytes, 8 bits": lambda p: hf(p, llama() | {f"{Q}.weight": ints(D, D, kind=np.int8), f"{Q}.SCB": ones(D)}),
    "bitsandbytes, with its configuration": lambda p: hf(
        p, llama(), quantization_config={"quant_method": "bitsandbytes"}
    ),
    "compressed-tensors": lambda p: hf(
        p, quantized(weight_packed=ints(D, 2), weight_scale=ones(D, 1), weight_shape=ints(2))
    ),
    "FP8 with scales": lambda p: fp8(p, **{f"{Q}.weight_scale": ones(1)}),
    "FP8 with inverse scales": lambda p: fp8(p, **{f"{Q}.weight_scale_inv": ones(1, 1)}),
    "FP8 without scales": lambda p: fp8(p),
    "HQQ": lambda p: hf(p, quantized(W_q=ints(D, 2, kind=np.uint8), meta=ints(1, 1))),
    "EETQ": lambda p: hf(p, quantized(weight=ints(D, D, kind=np.int8), weight_scales=ones(D))),
    "exl2": lambda p: hf(p, quantized(q_weight=ints(2, D), q_invperm=ints(D, kind=np.int16), q_scale=ints(1, 2))),
    "AQLM": lambda p: hf(
        p, quantized(codes=ints(2, D, 1, kind=np.int8), codebooks=ones(1, 4, 1, 8), scales=ones(D, 1, 1, 1))
    ),
    "QuIP#": lambda p: hf(p, quantized(Qidxs=ints(D, 2, kind=np.int64), SU=ones(D))),
    "MLX": lambda p: hf(p, quantized(weight=ints(D, 2, kind=np.uint32), scales=ones(D, 1), biases=ones(D, 1))),
    "quanto": lambda p: hf(p, quantized(weight___data=ints(D, D, kind=np.int8), weight___scale=ones(D, 1))),
    "int8 with scales of an unknown method": lambda p: hf(
        p, llama() | {f"{Q}.weight": ints(D, D, kind=np.int8), f"{Q}.qscale": ones(D)}
    ),
    # parts and wrappers of training
    "ZeRO-3 placeholders": lambda p: hf(p, dict.fromkeys(llama(), ones(0))),
    "a ZeRO checkpoint's folder": lambda p: fill(
        p, {"zero_to_fp32.py": b"#", "global_step5/mp_rank_00_model_states.pt": b"x"}
    ),
    "a ZeRO step's folder": lambda p: fill(p, {"zero_pp_rank_0_mp_rank_00_optim_states.pt": b"x"}),
    "an FSDP checkpoint's folder": lambda p: fill(p, {"__0_0.distcp": b"x", ".metadata": b"x"}),
    "flat parameters of FSDP": lambda p: hf(p, {"_fsdp_wrapped_module._flat_param": ones(99)}),
    "Megatron's ranks": lambda p: fill(
        p, {"mp_rank_00/model_optim_rng.pt": b"x", "mp_rank_01/model_optim_rng.pt": b"x"}
    ),
    "Megatron's tensors": lambda p: hf(
        p, {"language_model.encoder.layers.0.self_attention.query_key_value.weight": ones(3 * D, D)}
    ),
    "a trainer's output folder": lambda p: fill(p, {"checkpoint-90/config.json": {}, "checkpoint-500/config.json": {}}),
    "a trainer's state alone": lambda p: fill(p, STATE),
    "an optimizer's state in place of the model": lambda p: torch_folder(
        p, {"state": {0: {"step": 1}}, "param_groups": []}
    ),
    "a pickled argparse.Namespace": lambda p: pickled(p, argparse.Namespace(lr=1e-5)),
    "a pickled number of NumPy": lambda p: pickled(p, np.float64(0.3)),
    "a pickled object of any class": lambda p: pickled(p, Opaque()),
    # other models
    "LLaVA's text tower": lambda p: hf(p, renamed("^", "language_model.")),
    "LLaVA's text tower, transformers 5": lambda p: hf(p, renamed(r"^model\.", "model.language_model.")),
    "LLaVA's projector and vision tower": lambda p: hf(p, llama() | {"model.mm_projector.0.weight": ones(D, 8)}),
    "Llama 3.2 Vision": lambda p: hf(
        p, renamed("^", "language_model.") | {"language_model.model.layers.1.cross_attn.q_proj.weight": ones(D, D)}
    ),
    "a reward model": lambda p: hf(
        p, without("lm_head.weight") | {"score.weight": ones(1, D)}, architectures=["LlamaForSequenceClassification"]
    ),
    "a classifier of tokens": lambda p: hf(p, without("lm_head.weight") | {"classifier.weight": ones(3, D)}),
    "a value head without an output head": lambda p: hf(
        p, without("lm_head.weight") | {"v_head.summary.weight": ones(1, D)}
    ),
    "a model for marking passages": lambda p: hf(p, without("lm_head.weight") | {"qa_outputs.weight": ones(2, D)}),
    "an embedding model": lambda p: hf(p, without("lm_head.weight"), architectures=["LlamaModel"]),
    "a tied model whose flag is lost": lambda p: hf(p, without("lm_head.weight")),
    "Qwen 2's biases": lambda p: hf(p, llama() | {f"{Q}.bias": ones(D)}),
    "Phi-3's fused projections": lambda p: hf(
        p, without(f"{Q}.weight") | {LAYER + "self_attn.qkv_proj.weight": ones(2 * D, D)}
    ),
    "Mixtral's experts": lambda p: hf(
        p, without(LAYER + "mlp.up_proj.weight") | {LAYER + "block_sparse_moe.experts.0.w1.weight": ones(F, D)}
    ),
    "Gemma's norms": lambda p: hf(p, llama() | {LAYER + "pre_feedforward_layernorm.weight": ones(D)}),
    "Qwen 3's norms": lambda p: hf(p, llama() | {LAYER + "self_attn.q_norm.weight": ones(H)}),
    "GPT-2's names": lambda p: hf(p, {"transformer.wte.weight": ones(V, D), "transformer.h.0.ln_1.weight": ones(D)}),
    "Mamba's names": lambda p: hf(p, {"backbone.layers.0.mixer.A_log": ones(D)}),
    "LitGPT's names": lambda p: hf(
        p, {"transformer.h.0.attn.attn.weight": ones(2 * D, D), "lm_head.weight": ones(V, D)}
    ),
    "torchtune's names": lambda p: hf(p, {"layers.0.sa_norm.scale": ones(D), "tok_embeddings.weight": ones(V, D)}),
    "Meta's names under a config.json": lambda p: hf(p, meta()),
    "Hugging Face's names under a params.json": lambda p: meta_folder(p, llama()),
    "GGUF's names in safetensors": lambda p: hf(
        p, {"blk.0.attn_q.weight": ones(D, D), "token_embd.weight": ones(V, D)}
    ),
    "more layers than the files hold": lambda p: hf(p, llama(), num_hidden_layers=3),
    "fewer layers than the files hold": lambda p: hf(
        p, llama() | {k.replace(".0.", ".1."): x for k, x in llama().items()}
    ),
    "a table larger than the vocabulary": lambda p: hf(p, llama(), vocab_size=V - 8),
    "a table resized without its head": lambda p: hf(
        p, llama() | {"model.embed_tokens.weight": ones(V + 8, D)}, vocab_size=V + 8
    ),
    "two different copies, without an index": lambda p: sharded(p, [llama(), {"model.norm.weight": 2 * ones(D)}]),
    "several models in one file": lambda p: hf(p, renamed("^", "policy.") | renamed("^", "ref.")),
    "a file without tensors": lambda p: torch_folder(p, {"model": {}, "step": 3}),
    # folders
    "the Hub's cache, several snapshots": lambda p: hub(p, "aaaa", "bbbb"),
    "the Hub's whole cache": lambda p: hub(p, "aaaa").parent,
    "a folder of folders": lambda p: hf(p / "7b", llama()).parent,
    "a tokenizer alone": lambda p: fill(p, {"tokenizer.json": {}, "tokenizer_config.json": {}}),
    "weights without config.json": lambda p: fill(p, {"model.safetensors": b"x"}),
    "Meta's weights without params.json": lambda p: fill(p, {"consolidated.00.pth": b"x", "tokenizer.model": b"x"}),
    "config.json without weights": lambda p: hf(p),
    "ONNX": lambda p: hf(p, files={"model.onnx": b"x"}),
    "TensorFlow": lambda p: hf(p, files={"tf_model.h5": b"x"}),
    "Flax": lambda p: hf(p, files={"flax_model.msgpack": b"x"}),
    "Core ML": lambda p: fill(p, {"Model.mlpackage/Manifest.json": {}}),
    "TensorRT": lambda p: fill(p, {"rank0.engine": b"x"}),
    "OpenVINO": lambda p: hf(p, files={"openvino_model.xml": b"x", "openvino_model.bin": b"x"}),
    "several GGUF files": lambda p: fill(p, {"a-q4.gguf": b"x", "a-q8.gguf": b"x"}),
    "a packed folder": lambda p: fill(p, {"model.tar.gz": b"x"}),
    "parts of `split` in a folder": lambda p: fill(p, {"x.gguf.part1of2": b"x", "x.gguf.part2of2": b"x"}),
    "a link that leads nowhere": lambda p: linked(hf(p)),
    "weights in a folder below": lambda p: fill(hf(p), {"model/model.safetensors": b"x"}),
    "Mistral's own format": lambda p: fill(p, {"params.json": PARAMS, "consolidated.safetensors": b"x"}),
    "JSON that was edited": lambda p: hf(p, llama(), {"config.json": b'{"model_type": "llama", "vocab_size": 32,}'}),
    "an expanded tensor in a torch file": lambda p: torch_folder(p, {"x": torch.ones(1).expand(9)}),
    # files
    "`.part1of2`": lambda p: file(p.with_name("x.Q8_0.gguf.part1of2"), b"GGUF"),
    "`-split-a`": lambda p: file(p.with_name("x.Q8_0.gguf-split-a"), b"GGUF"),
    "`.gguf.00`": lambda p: file(p.with_name("x.gguf.00"), b"GGUF"),
    "`.gguf.partaa`": lambda p: file(p.with_name("x.gguf.partaa"), b"GGUF"),
    "GGJT": lambda p: file(p.with_name("llama.ggmlv3.q4_0.bin"), b"tjgg"),
    "GGMF": lambda p: file(p.with_name("old.gguf"), b"fmgg"),
    "GGML": lambda p: file(p.with_name("older.bin"), b"lmgg"),
    "a GGML file's folder": lambda p: fill(p, {"llama.ggmlv3.q4_0.bin": b"tjgg"}),
    "a llamafile": lambda p: file(p.with_name("x.llamafile"), b"MZqFpD"),
    "a web page": lambda p: file(p.with_name("x.gguf"), b"<!DOCTYPE html><html>"),
    "a web page as safetensors": lambda p: hf(
        p, files={"model.safetensors": b"<!doctype html><html><head>" + bytes(50)}
    ),
    "a web page as torch's file": lambda p: hf(p, files={"pytorch_model.bin": b"<html><head>" + bytes(50)}),
    "torch's file named as safetensors": lambda p: hf(p, files={"model.safetensors": b"PK\3\4" + b"x" * 90}),
    "safetensors named as torch's file": lambda p: misnamed(hf(p, llama())),
    "text in place of a file": lambda p: hf(p, files={"model.safetensors": b"Access to this model is restricted.\n"}),
    "a gzip file": lambda p: file(p.with_name("x.gguf"), b"\x1f\x8b\x08"),
    "a HDF5 file": lambda p: file(p.with_name("x.h5"), b"\x89HDF\r\n"),
    "an ONNX file": lambda p: file(p.with_name("x.onnx"), b"\x08\x07"),
    "an unfinished download": lambda p: file(p.with_name("x.gguf.crdownload"), b"GG"),
    "one file of a folder": lambda p: hf(p, llama()) / "model.safetensors",
    "an importance matrix": lambda p: gguf_file(
        p.with_suffix(".gguf"), {"blk.0.attn_q.weight.in_sum2": ones(D)}, general__type="imatrix"
    ),
    "an image encoder (mmproj)": lambda p: gguf_file(
        p.with_suffix(".gguf"), {"v.blk.0.attn_q.weight": ones(D, D)}, "clip"
    ),
    "a vocabulary without weights": lambda p: gguf_file(p.with_suffix(".gguf"), {}),
    "a Git LFS pointer": lambda p: hf(
        p, files={"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid"}
    ),
}

LEFT_OUT = {
    "RoPE tables": lambda p: hf(p, llama() | {LAYER + "self_attn.rotary_emb.cos_cached": ones(1, 1, 64, H)}),
    "Meta's RoPE table": lambda p: meta_folder(p, meta() | {"freqs_cis": ones(64, H)}),
    "causal masks": lambda p: hf(
        p,
        llama()
        | {LAYER + "self_attn.bias": np.tri(64, dtype=bool)[None, None], LAYER + "self_attn.masked_bias": ones()},
    ),
    "position ids": lambda p: hf(p, llama() | {"model.position_ids": ints(1, 64, kind=np.int64)}),
    "counters": lambda p: hf(p, llama() | {"global_step": ints(kind=np.int64), "model.num_batches_tracked": ints(1)}),
    "an optimizer's moments": lambda p: hf(p, llama() | {f"{Q}.weight.exp_avg": ones(D, D)}),
    "a value head beside the output head": lambda p: hf(p, llama() | {"v_head.summary.weight": ones(1, D)}),
    "an equal copy in a second file": lambda p: sharded(
        p, [llama(), {"model.norm.weight": llama()["model.norm.weight"]}]
    ),
    "another copy that the index does not name": lambda p: sharded(
        p, [llama(), {"model.norm.weight": 2 * ones(D)} | {"extra": ints()}], dict.fromkeys(llama(), 1) | {"extra": 2}
    ),
    "index entries that no file has": lambda p: sharded(
        p, [without("lm_head.weight")], dict.fromkeys(llama(), 1), tie_word_embeddings=True
    ),
    "files of an index that nothing needs": lambda p: lost(
        sharded(p, [llama(), {"vision.x": ones(2)}], dict.fromkeys(llama(), 1) | {"vision.x": 2})
    ),
    "an adapter's files beside whole weights": lambda p: hf(p, llama(), {"adapter_config.json": ADAPTER}),
}
DAMAGE = {
    "a file cut short": lambda p: cut(hf(p, llama()) / "model.safetensors"),
    "an empty file": lambda p: hf(p, files={"model.safetensors": b""}),
    "a GGUF file cut short": lambda p: cut(gguf_file(p.with_suffix(".gguf"), {"x": ones(64, 64)})),
    "a torch file cut short": lambda p: cut(torch_folder(p, tensors_of(llama())) / "pytorch_model.bin"),
    "broken JSON": lambda p: hf(p, llama(), {"config.json": b'{"model_type": '}),
    "a part that is not there": lambda p: lost(sharded(p, [llama(), {"x": ones(2)}])),
}


class Opaque:
    """Of no library."""


def linked(folder: Path) -> Path:
    os.symlink("../../blobs/1234", folder / "model.safetensors")
    return folder


def misnamed(folder: Path) -> Path:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    return folder


def lost(folder: Path) -> Path:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def cut(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 40])
    return path if path.suffix == ".gguf" else path.parent


def table(title: str) -> dict[str, str]:
    """Kind -> answer, of the table below a heading of the page."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:2] == "| "
    ]
    return dict(rows[1:])


TABLES = {"What is left out": LEFT_OUT, "What foreign files are answered with": FOREIGN, "Damage": DAMAGE}
LINES = [(title, kind) for title, made in TABLES.items() for kind in dict.fromkeys([*table(title), *made])]


@pytest.mark.parametrize(("title", "kind"), LINES, ids=[kind for _, kind in LINES])
def test_every_line_of_the_page(tmp_path, caplog, title, kind):
    made, answers = TABLES[title], table(title)
    assert kind in answers, "a line is missing in docs/checkpoints.md"
    assert kind in made, "a line of docs/checkpoints.md has no file here"
    path = made[kind](tmp_path / "checkpoint")
    words = ".*".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", answers[kind].strip('"')))
    if made is LEFT_OUT:
        checkpoint = open_checkpoint(path)
        assert re.search(words, " and ".join(checkpoint.left_out))
        (record,) = caplog.records
        assert re.search("left out: .*" + words, record.getMessage())
        return
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(tmp_path) in message.split(": ")[0]
    assert re.search(words, message.replace(str(tmp_path / "checkpoint"), "FOLDER")), message
    blames = re.search("download or copy|fetch|incomplete", message)
    assert blames if made is DAMAGE else not re.search("download or copy|incomplete", message)
