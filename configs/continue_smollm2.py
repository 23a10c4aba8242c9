"""Continued pretraining: any checkpoint that `load` reads, on your own texts.

    python scripts/prepare_data.py my-texts/ data/mine --tokenizer smollm2-135m-instruct
    python scripts/train.py configs/continue_smollm2.py --data.train data/mine --steps 200

`--init-from` takes another checkpoint; its architecture counts, and its tokenizer must be the corpus's.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """135 million parameters; a short warm-up to a low rate, which falls to 0."""
    return Recipe(
        model=PRESETS["smollm2-135m"],
        init_from="smollm2-135m-instruct",
        data=Data(train=("data/train",)),
        batch=Batch(seq_len=512, sequences=8),
        optimizer=Optimizer(Schedule(peak=1e-4, steps=1000, kind="linear", warmup_steps=20, final=0.0)),
        checkpoints=Checkpoints(every=200),
    )
