"""Llama 3 70B from nothing: 15T tokens at a length of 8192, the learning rate of its paper.

    python scripts/train.py configs/pretrain_llama3_70b.py                           # the same on each machine

The paper gives the peak for this size and the rest for 405B only: the batch of 16M tokens and 8000 steps of warm-up are
taken from there, the cosine's end at a tenth from its predecessors. Documents in a row do not see one another.
`data/train` is made by `scripts/prepare_data.py --tokenizer` with Llama 3's tokenizer.model.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """70.6 billion parameters; 894,070 steps of 2048 sequences of 8192 tokens, 15T in all."""
    return Recipe(
        model=PRESETS["llama3-70b"],
        data=Data(train=("data/train",), validation=("data/validation",)),
        batch=Batch(seq_len=8192, sequences=2048),
        optimizer=Optimizer(Schedule(peak=0.00015, steps=894_070, warmup_steps=8000, final=0.1)),
        checkpoints=Checkpoints(every=1000, keep_every=10_000),
    )
