"""Supervised fine-tuning of all parameters of Llama 3.1 8B, from your own conversations.

    python scripts/prepare_data.py chats.jsonl data/chats --chat --tokenizer meta-llama/Llama-3.1-8B-Instruct \\
        --max-tokens 4096 --show 3
    python scripts/train.py configs/sft_llama31_8b.py --data.train data/chats --steps 1000
    python scripts/train.py configs/sft_llama31_8b.py --dry-run --machine v5litepod-16    # does it fit

2e-5 with a cosine, 64 rows of 4096 tokens, as Llama 2's paper and torchtune have it; two or three epochs.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """8 billion parameters, all of which train."""
    return Recipe(
        model=PRESETS["llama3.1-8b"],
        init_from="meta-llama/Llama-3.1-8B-Instruct",
        data=Data(train=("data/chats",)),
        objective="sft",
        batch=Batch(seq_len=4096, sequences=64),
        optimizer=Optimizer(Schedule(peak=2e-5, steps=1000, kind="cosine", warmup_steps=30, final=0.0)),
        checkpoints=Checkpoints(every=200),
    )
