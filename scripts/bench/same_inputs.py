"""The inputs of same.py: random models with tokenizers, and texts; made once, without llama_jax."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs home to the hills",
    "system user assistant what is the name of the river? it is a long story, said the wolf.",
    "In 1984, 12345 people read \u201cna\u00efve caf\u00e9\u201d; 3.14159 is not \u03c0.",
]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "llama1": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "llama31": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "tied": {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "llama3", **SCALING, "factor": 32.0}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "odd": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 100},
}


def make_inputs(folder: Path) -> None:
    """Random models with tokenizers in Hugging Face's format, and texts."""
    import numpy as np
    import sentencepiece
    import tokenizers as tk
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([tk.AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    facts = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, changes in MODELS.items():
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 320,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": False,
            "hidden_act": "silu", "torch_dtype": "float32", "attention_bias": False, **changes,
        }  # fmt: skip
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        random = np.random.default_rng(len(name))
        (folder / name).mkdir()

        def matrix(*shape, random=random):
            return (0.3 * random.standard_normal(shape)).astype(np.float32)

        D, F, V, H = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
        N, K = config["num_attention_heads"], config["num_key_value_heads"]
        tensors = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": 1 + matrix(D)}
        if not config["tie_word_embeddings"]:
            tensors["lm_head.weight"] = matrix(V, D)
        shapes = {
            "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D), "self_attn.v_proj": (K * H, D),
            "self_attn.o_proj": (D, N * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip
        for i in range(config["num_hidden_layers"]):
            tensors |= {f"model.layers.{i}.{key}.weight": matrix(*shape) for key, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{norm}.weight"] = 1 + matrix(D)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(facts))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, model_type="bpe", vocab_size=320,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    shutil.copytree(folder / "gqa", folder / "spm")
    (folder / "spm" / "tokenizer.json").unlink()
    (folder / "spm" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "spm" / "tokenizer.model").write_bytes(model.getvalue())
    texts = [" ".join(SENTENCES[(i + j) % 3] for j in range(i % 7 + 1)) for i in range(300)]
    (folder / "texts").mkdir()
    for i, text in enumerate(texts[:40]):
        (folder / "texts" / f"{i:03}.txt").write_text(text)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
