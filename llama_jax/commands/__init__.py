"""The command line: `llama-jax NAME`, and scripts/NAME.py in a clone, which run the same functions.

Each module here is one command. Its docstring is the help, `Args` its options; `main(args)` runs it and returns the
exit code (None is 0). `options(line)` may replace the usual parsing.
Help is written with the names of a clone (python scripts/chat.py), which `llama-jax` replaces with its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import operator
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from llama_jax.cli import fail_clearly
from llama_jax.typing import Foreign

COMMANDS = {
    "chat": "talk to a model",
    "generate": "continue prompts, or fill gaps",
    "convert": "convert a checkpoint: Hugging Face, Meta, GGUF, native",
    "verify": "compare two checkpoints",
    "plan": "does a model fit on a machine, and how fast could it be",
    "train": "train a model as a recipe says",
    "prepare-data": "turn text into the token shards of a corpus",
    "bench": "measure speed and memory (from a clone)",
    "doctor": "is this machine ready; if not, what to do",
}
_SCRIPT = re.compile(rf"(?<![\w/])(?:python )?(?:scripts/)?({'|'.join(COMMANDS).replace('-', '_')})\.py\b")
_COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
_Args = TypeVar("_Args")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The arguments of a command.

    Attributes:
      argv: what follows its name.
      program: `llama-jax NAME`; None for a script, whose name is in sys.argv.
    """

    argv: Sequence[str]
    program: str | None

    def parse(self, kind: type[_Args], text: str, **options: Any) -> _Args:
        """Returns the arguments as an instance of a dataclass. Help and usage errors end the process.

        Args:
          kind: the dataclass.
          text: the beginning of the help.
          options: of `tyro.cli`, in place of these.
        """
        import tyro

        if self.program:
            text = _SCRIPT.sub(lambda match: f"llama-jax {match[1].replace('_', '-')}", text)
        return tyro.cli(kind, **{"args": self.argv, "prog": self.program, "description": text} | options)


def main() -> None:
    """Runs `llama-jax NAME ...` with this process's arguments, and exits."""
    name, *argv = sys.argv[1:] or [""]
    if name in COMMANDS and not set(argv[:1]) & set(_COMPLETION):
        _run(name, CommandLine(argv, f"llama-jax {name}"))
    elif name in _COMPLETION or name in COMMANDS:
        _print_completion(argv if name in COMMANDS else [name, *argv])
    elif name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        print(f"llama-jax {_version()}")
    else:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        print(f"error: no command {name!r}: did you mean {near[0]}?" if near else _help(), file=sys.stderr)
        sys.exit(2)


def run_script(name: str) -> None:
    """Runs a command with this process's arguments, as the script of a clone, and exits."""
    _run(name, CommandLine(sys.argv[1:], None))


def _run(name: str, line: CommandLine) -> None:
    with fail_clearly(code=2 if name == "verify" else 1):  # 1 of verify is for checkpoints that differ
        module = _module(name)
        args = module.options(line) if hasattr(module, "options") else line.parse(module.Args, module.__doc__)
        code = module.main(args)
    sys.exit(code or 0)


def _module(name: str) -> Foreign:
    return importlib.import_module(f"llama_jax.commands.{name.replace('-', '_')}")


def _help() -> str:
    lines = (f"  {name:14}{text}" for name, text in COMMANDS.items())
    return "\n".join(["usage: llama-jax COMMAND [OPTIONS]\n", *lines, "\nllama-jax COMMAND --help has the options."])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("llama_jax")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _print_completion(argv: list[str]) -> None:
    """Prints or writes the completion of all commands, as the options of tyro in `argv` ask."""
    import tyro

    kinds: list[Any] = []
    for name in COMMANDS:
        with contextlib.suppress(FileNotFoundError):  # the benchmarks, outside a clone
            kinds.append(Annotated[_module(name).Args, tyro.conf.subcommand(name)])
    tyro.cli(functools.reduce(operator.or_, kinds), args=argv, prog="llama-jax")
