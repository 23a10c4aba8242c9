"""A LoRA adapter on Llama 3.1 8B Instruct, from your own conversations.

    python scripts/prepare_data.py chats.jsonl data/chats --chat --tokenizer meta-llama/Llama-3.1-8B-Instruct \\
        --max-tokens 4096 --show 3
    python scripts/train.py configs/lora_llama31_8b.py --data.train data/chats --steps 500
    python scripts/train.py configs/lora_llama31_8b.py --dry-run --machine v5litepod-8    # does it fit

The step compiled by libtpu 0.0.42 for v5litepod-8, 8 rows of 4096 tokens: 10.52 GB of a chip's 16.91 at the peak, on
fsdp=4,tensor=2 with remat matmuls. For v6e-8 16.4 of 33.5 GB (fsdp=8), and for
one H100, by XLA's CUDA compiler, 29.9 of 63.7 GB with one row.

Rank 16, alpha 32, all matrices of the layers, 2e-4 with a cosine: what torchtune, litgpt and axolotl publish for this
size, within a factor of two of each other. From Instruct: an adapter of the layers cannot teach a base model the tokens
that end a turn.
"""

from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """41.9 million parameters train, beside 8 billion in bfloat16."""
    return Recipe(
        model=PRESETS["llama3.1-8b"],
        init_from="meta-llama/Llama-3.1-8B-Instruct",
        data=Data(train=("data/chats",)),
        objective="sft",
        adapter=Adapter(rank=16, alpha=32.0),
        batch=Batch(seq_len=4096, sequences=8),
        optimizer=Optimizer(
            Schedule(peak=2e-4, steps=1000, kind="cosine", warmup_steps=30, final=0.0), b2=0.99, weight_decay=0.0
        ),
        checkpoints=Checkpoints(every=100),
    )
