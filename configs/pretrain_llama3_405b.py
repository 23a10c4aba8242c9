"""Llama 3.1 405B from nothing, as its paper trained it: batches of 4M tokens at 4096, then 8M and 16M at 8192.

    python scripts/train.py configs/pretrain_llama3_405b.py                         # the same on each machine

The learning rate rises to 8e-5 in 8000 steps and falls to 8e-7 over 1,200,000. The first stage trains on halves of the
rows that the later ones take whole, so that no document is lost or repeated where the length changes. Documents in a
row do not see one another. Weight decay is not in the paper: 0.1 as for its predecessors.
`data/train` is made by `scripts/prepare_data.py --tokenizer` with Llama 3's tokenizer.model.
"""

from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule, Stage


def recipe() -> Recipe:
    """405.9 billion parameters; the paper stopped at 15.6T tokens, the schedule ends at 17.3T."""
    return Recipe(
        model=PRESETS["llama3.1-405b"].replace(
            rope_scaling=None, max_seq_len=8192
        ),  # as before the long-context stages
        data=Data(train=("data/train",), validation=("data/validation",)),
        batch=Batch(
            seq_len=8192,
            sequences=2048,
            stages=(
                Stage(until_tokens=252_000_000, sequences=512, split=2),
                Stage(until_tokens=2_870_000_000_000, sequences=1024),
            ),
        ),
        optimizer=Optimizer(Schedule(peak=8e-5, steps=1_200_000, warmup_steps=8000, final=0.01)),
        checkpoints=Checkpoints(every=500, keep_every=10_000),
    )
