"""DPO on Llama 3.1 8B Instruct: from pairs of answers, of which one is preferred, by an adapter.

    python scripts/prepare_data.py preferences.jsonl data/pairs --pairs --tokenizer meta-llama/Llama-3.1-8B-Instruct \\
        --max-tokens 4096 --show 3
    python scripts/train.py configs/dpo_llama31_8b.py --data.train data/pairs --steps 500
    python scripts/train.py configs/dpo_llama31_8b.py --adapter.rank 0 --optimizer.schedule.peak 5e-7  # all parameters
    python scripts/train.py configs/dpo_llama31_8b.py --objective ipo     # or dpo-norm, hinge, simpo, orpo

As Llama 3 has it: beta 0.1, 0.2 of the better answer's own loss, and the tokens that end an answer are not compared.
The reference is the model without its adapter; where all parameters train, its log-probabilities are computed once,
before the first step. Watch `chosen_logp` beside the margin: where both fall, the rate is too high. An adapter takes
5e-6, all parameters 5e-7 (Zephyr, Tulu 3). Memory is that of lora_llama31_8b: rows hold two answers, and the weights
are there once.
"""

from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """41.9 million parameters train, beside 8 billion in bfloat16."""
    return Recipe(
        model=PRESETS["llama3.1-8b"],
        init_from="meta-llama/Llama-3.1-8B-Instruct",
        data=Data(train=("data/pairs",)),
        objective="dpo",
        adapter=Adapter(rank=16, alpha=32.0),
        batch=Batch(seq_len=4096, sequences=16),
        optimizer=Optimizer(
            Schedule(peak=5e-6, steps=500, kind="linear", warmup_steps=50, final=0.0), b2=0.99, weight_decay=0.0
        ),
        checkpoints=Checkpoints(every=100),
    )
