"""Tiny models that several tests share: configurations, and random transformers models as checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers

from llama_jax import sharding
from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.model import Llama

LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
LLAMA32 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def slow(*values: Any) -> Any:
    """One case among others that cover it nearly as well: `python -m pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def tiny_config(**changes: Any) -> ModelConfig:
    """A Llama of 130 thousand parameters; every dimension has its own size, and most divide by 8 devices."""
    sizes = {
        "vocab_size": 256, "embed_dim": 64, "mlp_dim": 160, "num_layers": 2, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 16, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
        "max_seq_len": 512, "tie_embeddings": False,
    }  # fmt: skip
    return ModelConfig(**sizes | changes)


def one_device() -> jax.sharding.Mesh:
    """The first of the eight, for any model."""
    return sharding.make_mesh(tiny_config())


def mesh_on(text: str) -> str | jax.sharding.Mesh:
    """`text`, or for "tensor=1" one device of the eight."""
    return one_device() if text == "tensor=1" else text


def hf_config(config: ModelConfig) -> transformers.LlamaConfig:
    """The same architecture for transformers, spelled out here so that no code of the library takes part."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        assert isinstance(scaling, RopeScaling)
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )


def hf_model(
    config: ModelConfig, *, seed: int = 0, std: float = 0.1, embed_std: float | None = None
) -> transformers.LlamaForCausalLM:
    """A random transformers model in float32: matrices of deviation `std`, norms between 0.5 and 1.5."""
    model = transformers.LlamaForCausalLM(hf_config(config)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                small = embed_std is not None and "embed_tokens" in name
                parameter.normal_(0, embed_std if small else std, generator=generator)
    return model


def write_hf(
    folder: Path,
    model: ModelConfig | transformers.LlamaForCausalLM,
    *,
    max_shard_size: str | None = None,
    **options: Any,
) -> transformers.LlamaForCausalLM:
    """Saves a model as a Hugging Face folder, and returns it.

    Args:
      folder: where to.
      model: a transformers model, or a configuration, of which `hf_model` makes a random one.
      max_shard_size: such as "100KB", for a checkpoint of several files.
      **options: of `hf_model`.
    """
    if isinstance(model, ModelConfig):
        model = hf_model(model, **options)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    return model


def write_gguf(
    path: Path,
    config: ModelConfig,
    hf: transformers.LlamaForCausalLM,
    *,
    kind: str = "F32",
    more: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> Path:
    """Saves a model as llama.cpp's converter does, by the gguf package: matrices of a `kind` such as "Q8_0", and what
    `more` adds."""
    writer = gguf.GGUFWriter(path, "llama")
    more(writer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling:
        writer.add_tensor("rope_freqs.weight", _rope_freqs(config))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, parameter in hf.named_parameters():  # without lm_head where it is tied
        array = parameter.detach().numpy()
        for projection, n in heads.items():
            if projection in name:  # interleaved: 2i and 2i + 1 are a pair
                array = array.reshape(n, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        type_ = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(np.ascontiguousarray(array), type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rope_freqs(config: ModelConfig) -> np.ndarray:
    """What frequencies are divided by, in llama.cpp's words."""
    scaling = config.rope_scaling
    assert isinstance(scaling, RopeScaling)
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_max_seq_len / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def rebuild(model: Llama, config: ModelConfig, leaves: list[jax.Array] | None = None) -> Llama:
    """A model of another configuration with the same weights (or `leaves`); its mesh must be in use."""
    leaves = jax.tree.leaves(model) if leaves is None else leaves
    dtypes = {"dtype": model.dtype, "param_dtype": str(leaves[0].dtype)}
    other = Llama(config, rules=model.rules, stacked=model.stacked, rngs=None, **dtypes)
    return jax.tree.unflatten(jax.tree.structure(other), leaves)
