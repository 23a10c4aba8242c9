"""Talk to a Llama: one answer for a question, or a conversation that remembers.

    python scripts/chat.py "What is the capital of France?"
    python scripts/chat.py                     # a conversation; /reset starts over, /quit or Ctrl-D ends it

On several devices each weight is split over all of them; --mesh fsdp=2,tensor=4 splits another way.
Several processes (the same command on each machine; on Cloud TPU, GKE, SLURM and Open MPI without more options) answer
together: process 0 reads and prints.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from llama_jax.cli import ModelArgs, ProcessArgs, SamplingArgs


@dataclasses.dataclass
class Args:
    question: Annotated[str | None, tyro.conf.Positional] = None
    """What to ask; leave it out for a conversation."""
    system: str | None = None
    """A system message to begin with."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""
    chat_format: str | None = None
    """llama2, llama3, codellama70b or template (template:NAME, one of several); default: the checkpoint's own."""
    model: tyro.conf.OmitArgPrefixes[ModelArgs] = dataclasses.field(default_factory=ModelArgs)
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = dataclasses.field(default_factory=SamplingArgs)
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def main(args: Args) -> None:
    args.processes.start()
    sampling = args.sampling.options()
    from llama_jax import Conversation
    from llama_jax.distributed import broadcast, is_main, process_count

    question, system, max_new_tokens, chat_format = broadcast(
        (args.question, args.system, args.max_new_tokens, args.chat_format)
    )
    llama = args.model.load(chat_format=chat_format)

    def conversation() -> Conversation:
        messages = [{"role": "system", "content": system}] if system else []
        return Conversation(llama, messages, max_new_tokens=max_new_tokens, **sampling)

    if question is not None:
        show(conversation().ask(question))
        return
    talk = conversation()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 become U+FFFD
    if sys.stdin and sys.stdin.isatty() and is_main():
        stop = "stops an answer" if process_count() == 1 else "ends all processes"
        print(f"Ask something. /reset starts over, /quit or Ctrl-D ends, Ctrl-C {stop}.", file=sys.stderr)
    while (line := broadcast(read() if is_main() else None)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            talk = conversation()
        elif line:
            try:
                show(talk.ask(line))
            except ValueError as error:
                if is_main():
                    print(f"{error}\n(/reset starts a new conversation)", file=sys.stderr)
            except KeyboardInterrupt:
                if process_count() > 1:  # the others cannot stop at the same token
                    raise
                print(" [stopped]", file=sys.stderr)


def read() -> str | None:
    """Returns the next line without its end; None at the end of the input."""
    if sys.stdin is None:  # closed
        return None
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
