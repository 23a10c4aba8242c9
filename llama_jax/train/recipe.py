"""A run in words: what `configs/` return and the command line overrides. Every field is `--path.to.field value`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from llama_jax.config import ModelConfig
from llama_jax.config.adapter import Adapter
from llama_jax.config.quantization import Quantize

Remat = Literal["auto", "none", "matmuls", "attention", "full", "groups", "offload"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared corpora (`scripts/prepare_data.py`), or "stdlib:VOCABULARY": Python's standard library, made at once."""

    train: tuple[str, ...]
    """Folders of the corpora, or stdlib:2048 (Python's standard library with a vocabulary of that size), or orders:
    (conversations that are made, for the tokenizer of init_from)."""
    weights: tuple[float, ...] = ()
    """The share of each in the tokens; without, each counts as much as it is long."""
    validation: tuple[str, ...] = ()
    """Folders of what is held out."""
    threads: int = 4
    """Of each process, that read."""
    prefetch: int = 4
    """Steps that are read ahead."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """An early part of a run, with a smaller batch."""

    until_tokens: int
    """The stage ends after this many tokens of the run."""
    sequences: int
    """As of `Batch`: of its full length."""
    split: int = 1
    """Parts that each sequence is cut into: 2 trains at half the length."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    seq_len: int
    """Tokens in a sequence, in which documents are packed."""
    sequences: int
    """Of a step, over all devices."""
    microbatches: int = 0
    """Parts that are computed one after the other, their gradients summed in float32; 0 is what memory needs."""
    stages: tuple[Stage, ...] = ()
    """What comes before, with smaller batches (Llama 3)."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate."""

    peak: float
    """Its largest value."""
    steps: int
    """Updates of the whole schedule. It reaches `final` after the last of them: the last update, number steps - 1 from
    0, still has the rate before that (peak 1, linear, 12 steps, final 0.1: 0.175), as optax counts."""
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How it falls: wsd stays at the peak, and falls in a straight line in the last `decay_steps`."""
    warmup_steps: int = 0
    """In which it rises from 0 in a straight line."""
    final: float = 0.1
    """The value that it falls to, as a share of the peak: that of update number `steps`, and of all that follow."""
    decay_steps: int = 0
    """Of wsd only; 0 is a tenth of `steps`."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW; gradients are clipped by their global norm, and norms (the layers') do not decay."""

    schedule: Schedule
    b1: float = 0.9
    """Decay of the mean gradient."""
    b2: float = 0.95
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the square root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Times the learning rate, of every matrix."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    z_weight: float = 0.0
    """Of the z-loss, which keeps the softmax's denominator near 1; PaLM used 1e-4."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When the state is saved, beside the end and SIGTERM, and what is kept of it."""

    every: int = 1000
    """Steps from one to the next."""
    keep_last: int = 2
    """How many of the newest are kept ..."""
    keep_every: int = 0
    """... beside those of every so many steps ..."""
    keep_best: int = 1
    """... and so many with the lowest validation loss."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """The loss on what is held out."""

    every: int = 1000
    """Steps from one to the next; 0 is at the end only."""
    documents: int = 0
    """How many are used, the first ones; 0 is all."""
    answers: int = 0
    """Of conversations: to how many the model replies, before the first step and after the last; `exact_match` is the
    share of replies that are the answer to the letter."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Text that the model writes during the run."""

    prompts: tuple[str, ...] = ()
    """What it continues; spaces at an end are left to the model, as vocabularies join them to the word after."""
    every: int = 1000
    """Steps from one to the next; 0 is at the end only."""
    new_tokens: int = 64
    """For each prompt."""
    temperature: float = 0.0
    """0 takes the most likely token."""


@dataclasses.dataclass(frozen=True)
class Preference:
    """How two answers to a prompt are compared: of the objectives dpo, dpo-norm, ipo, hinge, simpo and orpo."""

    beta: float | None = None
    """How far the model may go from the reference; of orpo the weight of the odds ratio. Default: 5 of dpo-norm (Tulu
    3), 2 of simpo, else 0.1."""
    nll_weight: float | None = None
    """Of the loss of the better answer, as in supervised fine-tuning: without it, its probability may fall together
    with that of the other one. Default: 0.2 of dpo and dpo-norm, as Llama 3 has it, 1 of orpo, else 0."""
    label_smoothing: float = 0.0
    """Of dpo: the share of pairs whose answers may be exchanged."""
    gamma: float = 1.0
    """Of simpo: the margin that is aimed at."""
    ends: bool = False
    """Whether the tokens that end an answer count in the comparison; in Llama 3 they do not."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run."""

    model: ModelConfig
    """The architecture; that of `init_from`, where it is given."""
    data: Data
    """What it reads."""
    batch: Batch
    """What a step trains on."""
    optimizer: Optimizer
    """How it updates."""
    objective: str = "pretrain"
    """What is minimised: pretrain, the loss of every token that follows another; sft, that of the answers of
    conversations (`prepare-data --chat`); dpo, dpo-norm, ipo, hinge, simpo or orpo, that the better of two answers is
    the more probable one (`prepare-data --pairs`)."""
    preference: Preference = Preference()
    """Of the objectives that compare two answers."""
    adapter: Adapter | None = None
    """A LoRA adapter on `init_from`, which alone trains; --adapter.rank 0 trains all parameters."""
    quantize: Quantize | None = None
    """Of the weights that an adapter leaves as they are, the matrices of the layers: nf4, with double quantization, is
    4.13 bits a number (QLoRA), nf4-single 4.5 bits."""
    checkpoints: Checkpoints = Checkpoints()
    """What it saves."""
    validation: Validation = Validation()
    """What it is measured on."""
    samples: Samples = Samples()
    """What it shows."""
    init_from: str = ""
    """A checkpoint to continue from: whatever `load` takes. Empty: random weights."""
    seed: int = 0
    """Of the initial weights, and of the order of the documents."""
    steps: int = 0
    """Stops after so many, whatever the schedule; 0 is the schedule's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; auto is float32 on CPU and bfloat16 elsewhere. What trains is float32, what does not is of
    this dtype."""
    remat: Remat = "auto"
    """What the gradient keeps of a block: all, outputs of products, of attention, its input (full), that of every few
    blocks (groups), inputs in the host's memory (offload). auto: by the tuned table, else what fits by arithmetic."""
    attention: str = "auto"
    """Its implementation: auto, splash, cudnn, xla, cpu or reference; splash:512 with blocks of that size."""
    mesh: str = "auto"
    """Devices, such as fsdp=8,tensor=2 (axes data, fsdp, context, tensor); auto: by the tuned table, else all on
    fsdp."""
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of XLA, for the step; empty: those of the tuned table."""
    non_finite_limit: int = 5
    """Steps in a row without a finite loss and gradient, which change nothing, until the run stops."""
    tensorboard: bool = True
    """Writes OUTPUT/tensorboard."""
    wandb: str = ""
    """A project of Weights & Biases to log to (needs `pip install wandb`)."""
    output: str = ""
    """The folder of metrics, checkpoints and plots; empty: runs/NAME."""
    resume: Literal["never", "auto"] = "never"
    """auto resumes from the newest checkpoint in the output folder, if there is one."""
    profile: str = ""
    """Steps to trace, such as 10:13, into OUTPUT/profile (xprof, Perfetto)."""
    allow_changes: tuple[str, ...] = ()
    """Fields that a run may resume with other values, beside those that always may (docs/training.md): such as
    model.rope_theta. What changed is recorded in the checkpoints."""

    def __post_init__(self) -> None:
        if self.adapter and not self.adapter.rank:
            object.__setattr__(self, "adapter", None)

    @property
    def total_steps(self) -> int:
        """How many steps the run has."""
        return self.steps or self.optimizer.schedule.steps
