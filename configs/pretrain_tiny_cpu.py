"""A small Llama learns Python from the standard library of the interpreter that runs it.

python scripts/train.py configs/pretrain_tiny_cpu.py
"""

from llama_jax.config import ModelConfig
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Samples, Schedule, Validation


def recipe() -> Recipe:
    """2.0 million parameters; 3.1 million tokens."""
    vocabulary = 2048
    return Recipe(
        model=ModelConfig(
            vocab_size=vocabulary, embed_dim=192, mlp_dim=512, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=32,
            norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, max_seq_len=512, tie_embeddings=True,
        ),
        data=Data(train=(f"stdlib:{vocabulary}",), validation=(f"stdlib:{vocabulary}",)),
        batch=Batch(seq_len=256, sequences=8),
        optimizer=Optimizer(Schedule(peak=2e-3, steps=1500, kind="wsd", warmup_steps=100, final=0.0, decay_steps=750)),
        checkpoints=Checkpoints(every=500),
        validation=Validation(every=0),
        samples=Samples(prompts=("def ",), every=500, new_tokens=96, temperature=0.7),
        remat="matmuls",
    )  # fmt: skip
