"""Llama 2 70B from nothing, as its paper trained it: 2T tokens in batches of 4M at a length of 4096.

    python scripts/train.py configs/pretrain_llama2_70b.py                           # the same on each machine

The data were not published: `data/train` is a folder that `scripts/prepare_data.py --tokenizer` makes with Llama 2's
tokenizer.model. Adam's epsilon is the paper's 1e-5.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """69.0 billion parameters; 476,837 steps of 1024 sequences of 4096 tokens."""
    return Recipe(
        model=PRESETS["llama2-70b"],
        data=Data(train=("data/train",), validation=("data/validation",)),
        batch=Batch(seq_len=4096, sequences=1024),
        optimizer=Optimizer(Schedule(peak=0.00015, steps=476_837, warmup_steps=2000), eps=1e-5),
        checkpoints=Checkpoints(every=1000, keep_every=10_000),
    )
