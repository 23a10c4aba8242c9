"""Continue prompts with a Llama; all prompts run as one batch.

    python scripts/generate.py --prompt "The capital of France is" --prompt "def fibonacci(n):" --max-new-tokens 32
    python scripts/generate.py --prompts-file prompts.txt --json > completions.jsonl

    python scripts/generate.py --prompt "Once" --coordinator 10.0.0.2:8482 --num-processes 2 --process-id 0    # and 1

Several processes (the same command on each machine; on Cloud TPU, GKE, SLURM and Open MPI without the three options)
compute together what one would: process 0 reads the prompts and prints.
--json prints one object per prompt and line: prompt, text, tokens, finish_reason (and logprobs with --logprobs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import tyro

from llama_jax.cli import ModelArgs, ProcessArgs, SamplingArgs, fail_clearly, token_progress


@dataclasses.dataclass
class Args:
    prompt: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """A prompt; may be given several times."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, or a .jsonl file of {"prompt": ...}; - is standard input."""
    max_new_tokens: int = 128
    """Most tokens for each prompt."""
    stop: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """A text that ends a completion; may be given several times."""
    logprobs: bool = False
    """Add each token's log-probability to the JSON."""
    json: bool = False
    """Print one JSON object per prompt."""
    model: tyro.conf.OmitArgPrefixes[ModelArgs] = dataclasses.field(default_factory=ModelArgs)
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = dataclasses.field(default_factory=SamplingArgs)
    processes: tyro.conf.OmitArgPrefixes[ProcessArgs] = dataclasses.field(default_factory=ProcessArgs)


def read_prompts(args: Args) -> list[str]:
    prompts = list(args.prompt)
    file = args.prompts_file
    if file is not None:
        try:
            text = (sys.stdin.read() if sys.stdin else "") if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from None
        text = text.removeprefix("\ufeff")  # a byte order mark is no part of the first prompt
        lines = [(f"{file}: line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        prompts += [read_object(*line) if file.suffix == ".jsonl" else line[1] for line in lines]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE")
    return prompts


def read_object(where: str, line: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        if isinstance(prompt := json.loads(line)["prompt"], str):
            return prompt
    raise ValueError(f'{where} is not an object like {{"prompt": "text"}}: {line[:60]}')


def main(args: Args) -> None:
    args.processes.start()
    from llama_jax import generate
    from llama_jax.distributed import broadcast, is_main

    prompts = broadcast(read_prompts(args) if is_main() else None)
    max_new_tokens, stop = broadcast((args.max_new_tokens, args.stop))
    sampling = args.sampling.options()
    llama = args.model.load()
    for prompt in prompts:
        if is_main() and prompt.endswith(" "):
            print(
                f"{prompt[-40:]!r}: ends in a space, but vocabularies join a space to the word after it; the model"
                " goes on better without",
                file=sys.stderr,
            )

    with token_progress(len(prompts) * max_new_tokens) as advance:
        completions = generate(
            llama, prompts, max_new_tokens=max_new_tokens, stop=stop, logprobs=args.logprobs,
            on_tokens=advance, **sampling,
        )  # fmt: skip
    for prompt, completion in zip(prompts, completions, strict=True):
        if args.json:
            result = {"prompt": prompt} | dataclasses.asdict(completion)
            if not args.logprobs:
                del result["logprobs"]
            print(json.dumps(result, ensure_ascii=False))
        else:
            print(prompt + completion.text)
            if len(prompts) > 1:
                print("-" * 40)


if __name__ == "__main__":
    with fail_clearly():
        main(tyro.cli(Args, description=__doc__))
