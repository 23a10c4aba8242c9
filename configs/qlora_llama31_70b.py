"""QLoRA on Llama 3.1 70B Instruct: a LoRA adapter beside weights of 4.13 bits, from your own conversations.

    python scripts/prepare_data.py chats.jsonl data/chats --chat --tokenizer meta-llama/Llama-3.1-70B-Instruct \\
        --max-tokens 4096 --show 3
    python scripts/train.py configs/qlora_llama31_70b.py --data.train data/chats --steps 500
    python scripts/train.py configs/qlora_llama31_70b.py --dry-run --machine v6e-8    # does it fit
    python scripts/convert.py runs/qlora_llama31_70b merged --to hf    # into the NF4 weights that it was trained on

The step compiled by libtpu 0.0.42 for v6e-8, 8 rows of 4096 tokens: 28.36 GB of a chip's 33.54 at the peak, on fsdp=8
with remat attention; the weights are 5.53 GB of that. For one H100, by XLA's CUDA compiler, 50.88 of 63.73 GB with one
row and remat full. unsloth/Llama-3.3-70B-Instruct-bnb-4bit and its like are read as they are.

Rank 16 and 1e-4, as the QLoRA paper has it for 65B (rank 64 there), batches of 8 x 4096 tokens.
"""

from llama_jax.config.adapter import Adapter
from llama_jax.config.presets import PRESETS
from llama_jax.train.recipe import Batch, Checkpoints, Data, Optimizer, Recipe, Schedule


def recipe() -> Recipe:
    """207 million parameters train, beside 70 billion in NF4."""
    return Recipe(
        model=PRESETS["llama3.1-70b"],
        init_from="meta-llama/Llama-3.1-70B-Instruct",
        data=Data(train=("data/chats",)),
        objective="sft",
        adapter=Adapter(rank=16, alpha=32.0),
        quantize="nf4",
        batch=Batch(seq_len=4096, sequences=8),
        optimizer=Optimizer(
            Schedule(peak=1e-4, steps=1000, kind="cosine", warmup_steps=30, final=0.0), b2=0.99, weight_decay=0.0
        ),
        checkpoints=Checkpoints(every=50),
    )
