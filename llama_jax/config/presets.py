"""Every released Llama as one row.

A loaded model takes its configuration from its own file (`config.hf`, `config.meta`, `config.gguf`). The rows are for
planning, for training from scratch and for tests. Sources: Meta's model cards and `params.json`, the LLaMA, Llama 2,
Code Llama and Llama 3 papers.
"""

from __future__ import annotations

from llama_jax.config import ModelConfig, RopeScaling

# ---------------------------------------------------------------------------------------------------------------------
# The table. Columns: D, L, N, K, F, V, eps, theta, RoPE factor, context, tied.
# ---------------------------------------------------------------------------------------------------------------------


def _row(dim, layers, heads, kv, mlp, vocab, eps, theta, factor, context, tied=False) -> ModelConfig:
    scaling = RopeScaling(float(factor), 1.0, 4.0, 8192) if factor else None
    return ModelConfig(
        vocab_size=vocab, embed_dim=dim, mlp_dim=mlp, num_layers=layers, num_heads=heads, num_kv_heads=kv,
        head_dim=dim // heads, norm_eps=eps, rope_theta=float(theta), rope_scaling=scaling, max_seq_len=context,
        tie_embeddings=tied,
    )  # fmt: skip


# fmt: off
_ROWS = {
    # name (and -suffixes that share the row): D      L    N    K   F      V       eps   theta   factor context
    "llama1-7b":                         _row(4096,  32,  32,  32, 11008, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-13b":                        _row(5120,  40,  40,  40, 13824, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-33b":                        _row(6656,  60,  52,  52, 17920, 32000,  1e-6, 10_000,  None, 2048),
    "llama1-65b":                        _row(8192,  80,  64,  64, 22016, 32000,  1e-5, 10_000,  None, 2048),
    "llama2-7b chat":                    _row(4096,  32,  32,  32, 11008, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-13b chat":                   _row(5120,  40,  40,  40, 13824, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-34b chat":                   _row(8192,  48,  64,   8, 22016, 32000,  1e-5, 10_000,  None, 4096),
    "llama2-70b chat":                   _row(8192,  80,  64,   8, 28672, 32000,  1e-5, 10_000,  None, 4096),
    "codellama-7b instruct":             _row(4096,  32,  32,  32, 11008, 32016,  1e-5, 1_000_000, None, 16384),
    "codellama-7b-python":               _row(4096,  32,  32,  32, 11008, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-13b instruct":            _row(5120,  40,  40,  40, 13824, 32016,  1e-5, 1_000_000, None, 16384),
    "codellama-13b-python":              _row(5120,  40,  40,  40, 13824, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-34b instruct python":     _row(8192,  48,  64,   8, 22016, 32000,  1e-5, 1_000_000, None, 16384),
    "codellama-70b":                     _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 1_000_000, None, 16384),
    # Only the 70B base model had the long-context stage: Python and Instruct keep theta 10000 and 4096 tokens.
    "codellama-70b-instruct":            _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 10_000,  None, 4096),
    "codellama-70b-python":              _row(8192,  80,  64,   8, 28672, 32016,  1e-5, 10_000,  None, 4096),
    "llama3-8b instruct":                _row(4096,  32,  32,   8, 14336, 128256, 1e-5, 500_000, None, 8192),
    "llama3-70b instruct":               _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, None, 8192),
    "llama3.1-8b instruct":              _row(4096,  32,  32,   8, 14336, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.1-70b instruct":             _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.1-405b instruct":            _row(16384, 126, 128,  8, 53248, 128256, 1e-5, 500_000, 8,   131072),
    "llama3.2-1b instruct":              _row(2048,  16,  32,   8,  8192, 128256, 1e-5, 500_000, 32,  131072, True),
    "llama3.2-3b instruct":              _row(3072,  28,  24,   8,  8192, 128256, 1e-5, 500_000, 32,  131072, True),
    "llama3.3-70b-instruct":             _row(8192,  80,  64,   8, 28672, 128256, 1e-5, 500_000, 8,   131072),
    "smollm2-135m instruct":             _row(576,   30,   9,   3,  1536, 49152,  1e-5, 100_000, None, 8192, True),
}
# fmt: on


def _expand() -> dict[str, ModelConfig]:
    presets = {}
    for names, config in _ROWS.items():
        base, *suffixes = names.split()
        presets |= {base: config} | {f"{base}-{suffix}": config for suffix in suffixes}
    return presets


PRESETS: dict[str, ModelConfig] = _expand()
