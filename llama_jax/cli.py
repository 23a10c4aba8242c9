"""Shared by the commands: options of model and sampling, clear failures, progress. JAX is imported when needed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.config.quantization import Quantize
from llama_jax.typing import JsonObject

if TYPE_CHECKING:
    from llama_jax.loaded import LoadedLlama

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclasses.dataclass
class ModelArgs:
    """Which model, and how it runs."""

    model: str = DEFAULT_MODEL
    """smollm2-135m-instruct (fetched once, 98 MB), a Hugging Face folder, a .gguf file or a Hugging Face hub id."""
    mesh: str | None = None
    """Devices, such as fsdp=2,tensor=4 (axes data, fsdp, context, tensor); default: the tuned table's, else tensor."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: float32 on CPU, bfloat16 on TPU and GPU."""
    max_seq_len: int | None = None
    """Slots of the key/value cache; default: what the call needs, up to the model's context."""
    attention: str | None = None
    """splash (TPU), cudnn (GPU), xla, cpu or reference; default: the fastest of the platform that is as exact."""
    quantize: Quantize | None = None
    """Store the matrices of the layers in NF4: with double quantization in 4.13 bits a number (nf4), or 4.5
    (nf4-single); default: that of the adapter's run, else none."""
    adapter: str | None = None
    """A LoRA adapter: a folder as PEFT saves it, or of a training run. Given as the model, it brings its base."""

    def load(self, *, chat_format: str | None = None) -> LoadedLlama:
        """Loads the model. Process 0's options count for all processes, which must have the same files."""
        import_jax()
        from llama_jax.distributed import agree, broadcast, process_count
        from llama_jax.distributed.agreement import fingerprint
        from llama_jax.weights.load import load
        from llama_jax.weights.peft import open_adapter

        options = broadcast(dataclasses.asdict(self))
        if process_count() > 1:
            options["model"], saved = open_adapter(options["model"], options["adapter"])
            options["adapter"] = broadcast(str(saved.path) if saved else None)  # of a run that saves, one checkpoint
            if options["adapter"]:
                agree({"adapter files": fingerprint(Path(options["adapter"]))})
        llama = load(options.pop("model"), adapters=options.pop("adapter"), **options, chat_format=chat_format)
        if process_count() > 1 and llama.checkpoint:
            agree({"model files": fingerprint(llama.checkpoint.path)})
        return llama


@dataclasses.dataclass
class ProcessArgs:
    """Several processes, such as one on each machine. Cloud TPU, GKE, SLURM and Open MPI need no options."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all; a port that is free there and open to the others."""
    num_processes: int | None = None
    """How many processes there are; 1 runs this one alone, whatever the launcher says."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 reads the input and prints."""

    def start(self) -> None:
        """Joins the other processes, if there are any. Afterwards only process 0 prints results and warnings."""
        import_jax()
        from llama_jax import distributed

        distributed.initialize(
            coordinator=self.coordinator, num_processes=self.num_processes, process_id=self.process_id
        )
        if distributed.process_count() == 1:
            return
        # Results go to a copy of standard output: Gloo prints a line for each device to the original.
        results = os.dup(1) if distributed.is_main() else os.open(os.devnull, os.O_WRONLY)
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = open(results, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        if not distributed.is_main():
            logging.getLogger("llama_jax").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")


@dataclasses.dataclass
class SamplingArgs:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; Meta's scripts use 0.6 with --top-p 0.9."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the most likely tokens that hold this much probability together."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the most likely one."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were there already less likely."""
    seed: int = 0
    """Of the random numbers."""

    def options(self) -> JsonObject:
        """Returns process 0's options for `generate` and `Conversation`, checked before anything is loaded."""
        import_jax()
        from llama_jax.distributed import broadcast
        from llama_jax.infer.sampling import Sampling

        options = broadcast(dataclasses.asdict(self))
        Sampling(**options)
        return options


@contextlib.contextmanager
def fail_clearly(*, code: int = 1) -> Iterator[None]:
    """Turns expected errors and Ctrl-C into one line on stderr and an exit code, and warnings into one line each.

    With several processes, an error or Ctrl-C ends them all, and the line names the process.

    Args:
      code: exit code of an expected error. That of Ctrl-C is 130, that of a closed pipe 141.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _one_line
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader left, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _end_all("nobody reads its output any more", 141)
            sys.exit(141)
        if os.environ.get("LLAMA_JAX_TRACEBACK"):
            raise
        _end_all(error, code)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        sys.stdout.flush()
        _end_all("interrupted", 130)
        print("interrupted", file=sys.stderr)
        os._exit(130)  # an orderly exit would crash while XLA still computes


def _one_line(message: Warning | str, *_: Any) -> str:
    return f"warning: {message}\n"


def _end_all(error: Exception | str, code: int) -> None:
    """Ends all processes where there are several, this one with `code`."""
    if distributed := sys.modules.get("llama_jax.distributed"):  # else none were started
        distributed.fail(error, code=code)


def import_jax() -> None:
    """Imports JAX and Flax. Ctrl-C ends the process at once while they are imported.

    A KeyboardInterrupt would be lost in JAX's callback of the garbage collector, or crash a C extension.
    """

    def leave(*_: object) -> None:
        os.write(sys.stderr.fileno(), b"interrupted\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    import llama_jax.model  # noqa: F401

    signal.signal(signal.SIGINT, before)
