"""Prepare a corpus for training: text in, tokenised shards with a manifest out, in parallel.

    python scripts/prepare_data.py books/ wiki.jsonl.gz corpus --tokenizer Llama-3.2-1B    # the folder of a checkpoint
    python scripts/prepare_data.py c4/*.json.gz corpus --train-tokenizer 32000             # a vocabulary of its own
    python scripts/prepare_data.py src/ corpus --format text --glob '*.py' --train-tokenizer 8192
    python scripts/prepare_data.py hf:HuggingFaceFW/fineweb-edu:sample-10BT:train corpus --tokenizer Llama-3.2-1B
    zcat dump.gz | python scripts/prepare_data.py - corpus --format jsonl --tokenizer Llama-3.2-1B
    python scripts/prepare_data.py gs://b/c4/ gs://b/corpus --tokenizer Llama-3.2-1B --runner DataflowRunner \\
        --beam-options project=P region=R temp_location=gs://b/tmp
    python scripts/prepare_data.py chats.jsonl corpus --chat --tokenizer Llama-3.1-8B-Instruct --show 3
    python scripts/prepare_data.py preferences.jsonl corpus --pairs --tokenizer Llama-3.1-8B-Instruct

A text file is one document; so is a line of JSON lines, or a row. With --chat each row is a conversation (messages,
prompt and completion, Alpaca or ShareGPT: recognised), and a mask says which tokens are learned: the answers, each with
the token that ends it. Ctrl-C, a full disk or a lost machine costs the shards that were being written: the same command
continues with the others. scripts/train.py trains on the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    paths: tyro.conf.Positional[list[str]]
    """Files, folders, - for standard input, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT datasets; the last one is the new
    folder."""
    tokenizer: str | None = None
    """A checkpoint, as for --model elsewhere, or a tokenizer.json or tokenizer.model."""
    train_tokenizer: int | None = None
    """Instead: train a SentencePiece vocabulary of this size on the input."""
    tokenizer_sample_bytes: int = 1 << 28
    """About how much of the input to train it on."""
    field: str = "text"
    """Which field of JSON lines, Parquet files and datasets holds the text."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Of the files; auto goes by their names: .txt .md .jsonl .ndjson .json .parquet, also with .gz .bz2 .xz .zst."""
    glob: str = "*"
    """Which files of a folder."""
    invalid_utf8: Literal["error", "skip", "replace"] = "error"
    """What to do with a document that is not valid UTF-8 or holds NUL bytes (an escaped one in JSON is text)."""
    chat: bool = False
    """Rows are conversations, for supervised fine-tuning (objective sft)."""
    pairs: bool = False
    """Rows have two answers, of which one is preferred (objective dpo and its relatives): prompt, chosen and rejected;
    chosen and rejected that begin alike; or OpenAI's input, preferred_output and non_preferred_output."""
    chat_format: str | None = None
    """Of conversations: llama2, llama3, codellama70b, template or template:NAME; default: the tokenizer's own."""
    max_tokens: int | None = None
    """Of a conversation, of a pair of both together: a longer one loses whole turns from the front, after the system
    message, or is left out. Give the sequence length of the training. Default: none is cut."""
    show: int = 0
    """Print so many conversations, what is learned marked."""
    bos: bool | None = None
    """Whether BOS begins each document; default: as the tokenizer says. EOS always ends one."""
    shard_bytes: int | None = None
    """About how much input makes a shard; default: some 256 shards of 4 MiB to 1 GiB."""
    workers: int | None = None
    """Processes; default: one for each CPU."""
    runner: str = "local"
    """local, or a runner of Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner (extra beam)."""
    beam_options: tuple[str, ...] = ()
    """Options of the runner, as NAME=VALUE."""
    json: bool = False
    """Print the manifest as one JSON object."""


def main(args: Args) -> int:
    from llama_jax.data.corpus import open_corpus
    from llama_jax.data.manifest import MANIFEST
    from llama_jax.data.prepare import prepare as p

    *inputs, out = args.paths or [""]
    request = p.make_request(
        inputs, tokenizer=args.tokenizer, vocab_size=args.train_tokenizer, sample_bytes=args.tokenizer_sample_bytes,
        field=args.field, format=args.format, glob=args.glob, invalid_utf8=args.invalid_utf8,
        shard_bytes=args.shard_bytes, bos=args.bos, out=out, conversations=args.chat or args.pairs, pairs=args.pairs,
        chat_format=args.chat_format,
        max_tokens=args.max_tokens,
    )  # fmt: skip
    is_there = os.path.isfile(Path(os.path.expanduser(out)) / MANIFEST)
    if args.runner == "local":
        manifest = p.prepare(request, out, workers=args.workers)
    else:
        from llama_jax.data.prepare.beam import prepare_on_beam

        manifest = prepare_on_beam(request, out, runner=args.runner, options=args.beam_options)
    if is_there:
        print(f"{out}: was prepared already", file=sys.stderr)
    for why, count in manifest.skipped.items():
        print(f"warning: {count} {why} documents were left out", file=sys.stderr)
    for given in manifest.barren:
        print(f"error: {given}: gave no document: check it, or leave it out", file=sys.stderr)
    if (args.chat or args.pairs) and "://" not in out:
        from llama_jax.data.masks import report, show

        corpus = open_corpus(out)
        for line in report(corpus, args.chat_format):
            print(line, file=sys.stderr)
        if args.show:
            show(corpus, args.show, sys.stderr if args.json else sys.stdout)
    text = f"{manifest.documents} documents, {manifest.bytes} bytes, {manifest.tokens} tokens"
    print(json.dumps(dataclasses.asdict(manifest)) if args.json else f"{out}: {text}, {len(manifest.shards)} shards")
    return int(bool(manifest.barren))
