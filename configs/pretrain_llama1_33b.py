"""LLaMA 1 33B from nothing, as its paper trained it: 1.4T tokens in batches of 4M, 0.00015 falling to a tenth.

    python scripts/train.py configs/pretrain_llama1_33b.py                           # the same on each machine

The corpora are folders that `scripts/prepare_data.py --tokenizer` makes with LLaMA's tokenizer.model; their weights are
the shares of the paper's table 1. Adam's epsilon is not in the paper: 1e-8 is PyTorch's and optax's default.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule

SHARES = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}


def recipe() -> Recipe:
    """32.5 billion parameters; 333,786 steps of 2048 sequences of 2048 tokens."""
    return Recipe(
        model=PRESETS["llama1-33b"],
        data=Data(
            train=tuple(f"data/{name}" for name in SHARES),
            weights=tuple(SHARES.values()),
            validation=("data/validation",),
        ),
        batch=Batch(seq_len=2048, sequences=2048),
        optimizer=Optimizer(Schedule(peak=0.00015, steps=333_786, warmup_steps=2000)),
        checkpoints=Checkpoints(every=1000, keep_every=10_000),
    )
