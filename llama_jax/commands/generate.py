"""Continue prompts with a Llama; all prompts run as one batch.

    python scripts/generate.py --prompt "The capital of France is" --prompt "def fibonacci(n):" --max-new-tokens 32
    python scripts/generate.py --prompts-file prompts.txt --json > completions.jsonl
    python scripts/generate.py --model codellama/CodeLlama-7b-hf --prefix "def add(a, b):" --suffix "return c"
    python scripts/generate.py --prompt "Once" --coordinator 10.0.0.2:8482 --num-processes 2 --process-id 0    # and 1

Several processes (the same command on each machine; on Cloud TPU, GKE, SLURM and Open MPI without the three options)
compute together what one would: process 0 reads the prompts and prints.
--prefix and --suffix ask for the text between the two, which Code Llama 7B and 13B were trained to write (not their
Python models, not 34B and 70B).
--json prints one object per prompt and line: prompt (or prefix and suffix), text, tokens, finish_reason (and logprobs
with --logprobs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import tyro

from llama_jax.cli import ModelArgs, ProcessArgs, SamplingArgs


@dataclasses.dataclass
class Args:
    prompt: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """A prompt; may be given several times."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, or a .jsonl file of {"prompt": ...} (or of {"prefix": ..., "suffix": ...});
    - is standard input."""
    prefix: str | None = None
    """The text before a gap that the model is to fill."""
    suffix: str | None = None
    """The text after that gap."""
    suffix_first: bool = False
    """Show the model the suffix before the prefix (the Code Llama paper's SPM); for prefixes that end within a word."""
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


def read_prompts(args: Args) -> list[str] | list[tuple[str, str]]:
    """Returns the prompts, or the gaps to fill as (prefix, suffix)."""
    prompts: list = list(args.prompt)
    file = args.prompts_file
    if args.prefix is not None or args.suffix is not None:
        if prompts or file:
            raise ValueError("--prefix and --suffix fill one gap: leave out --prompt and --prompts-file")
        prompts = [(args.prefix or "", args.suffix or "")]
    if file is not None:
        try:
            text = (sys.stdin.read() if sys.stdin else "") if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from None
        text = text.removeprefix("\ufeff")  # a byte order mark is not part of the first prompt
        lines = [(f"{file}: line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        prompts += [read_object(*line) if file.suffix == ".jsonl" else line[1] for line in lines]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE, or --prefix and --suffix of a gap")
    if len(set(map(type, prompts))) > 1:
        raise ValueError(f"{file}: has prompts and gaps to fill: ask for either, in runs of their own")
    if args.suffix_first and isinstance(prompts[0], str):
        raise ValueError("--suffix-first needs a gap to fill: give --prefix and --suffix")
    return prompts


def read_object(where: str, line: str) -> str | tuple[str, str]:
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(line):
            case {"prompt": str(prompt)}:
                return prompt
            case {"prefix": str(prefix), "suffix": str(suffix)}:
                return prefix, suffix
    raise ValueError(f'{where} is not an object like {{"prompt": "text"}}: {line[:60]}')


def main(args: Args) -> None:
    args.processes.start()
    from llama_jax import generate, infill
    from llama_jax.distributed import broadcast, is_main
    from llama_jax.progress import token_progress

    prompts = broadcast(read_prompts(args) if is_main() else None)
    max_new_tokens, stop, suffix_first = broadcast((args.max_new_tokens, args.stop, args.suffix_first))
    gaps = not isinstance(prompts[0], str)
    sampling = args.sampling.options()
    llama = args.model.load()
    for prompt in prompts:
        if is_main() and not gaps and prompt.endswith(" "):
            print(
                f"{prompt[-40:]!r}: ends in a space, but vocabularies join a space to the word after it; the model"
                " continues better without",
                file=sys.stderr,
            )

    with token_progress(len(prompts) * max_new_tokens, shown=is_main()) as advance:
        options = {"max_new_tokens": max_new_tokens, "stop": stop, "logprobs": args.logprobs, "on_tokens": advance}
        if gaps:
            completions = infill(llama, prompts, suffix_first=suffix_first, **options, **sampling)
        else:
            completions = generate(llama, prompts, **options, **sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        if args.json:
            asked = dict(zip(("prefix", "suffix"), prompt, strict=True)) if gaps else {"prompt": prompt}
            result = asked | dataclasses.asdict(completion)
            if not args.logprobs:
                del result["logprobs"]
            print(json.dumps(result, ensure_ascii=False))
        else:
            print(completion.text.join(prompt) if gaps else prompt + completion.text)
            if len(prompts) > 1:
                print("-" * 40)
