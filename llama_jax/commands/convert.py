"""Convert a checkpoint: Hugging Face, Meta, GGUF and native, each into each, exactly and in bounded memory.

    python scripts/convert.py meta-llama/Llama-3.2-1B-Instruct llama-1b.gguf --to gguf --quantize q8_0   # for llama.cpp
    python scripts/convert.py Meta-Llama-3-8B/original llama-8b --to hf                        # for transformers
    python scripts/convert.py llama-70b-hf llama-70b-meta --to meta --shards 8                 # for Meta's own code
    python scripts/convert.py llama-8b llama-8b-native --to native                             # for training
    python scripts/convert.py smollm2-135m-instruct smollm2 --to hf --dtype bfloat16
    python scripts/convert.py meta-llama/Llama-3.1-8B-Instruct merged --to hf --adapter runs/lora_llama31_8b

Weights pass through tensor by tensor: memory stays small whatever the model's size (native: the size of the model).
The destination appears when it is whole and has been read back and compared; an interruption leaves nothing there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Literal

import tyro

from llama_jax.cli import import_jax


@dataclasses.dataclass
class Args:
    source: tyro.conf.Positional[str]
    """A Hugging Face, Meta or native folder, a .gguf file, a Hugging Face hub id or smollm2-135m-instruct."""
    destination: tyro.conf.Positional[str]
    """A new folder, or a new .gguf file."""
    to: Literal["hf", "meta", "gguf", "native"]
    """What to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; default: as they are stored (float32 if they are quantized)."""
    shards: int = 1
    """meta: number of consolidated.NN.pth files, one a GPU of Meta's code."""
    max_shard_size: str = "5GB"
    """hf: most bytes of one safetensors file, such as 500MB or 5GB."""
    quantize: Literal["q8_0", "q4_0"] | None = None
    """gguf: quantize the matrices, to 8.5 or 4.5 bits a weight."""
    adapter: str | None = None
    """Add this LoRA adapter to the weights: a folder as PEFT saves it, or of a training run."""
    merge_into: Literal["seen", "original"] = "seen"
    """An adapter whose run quantized its base (QLoRA): add it to that quantized base, with which it was trained, or to
    the original weights, which are another model; how far they are apart is said."""
    overwrite: bool = False
    """Replace the checkpoint at the destination, once the new one is complete."""
    verify: bool = True
    """Read the result again and compare every number with the source."""
    json: bool = False
    """Print the report as one JSON object."""


def main(args: Args) -> None:
    if args.to == "native":
        import_jax()
    from llama_jax.weights.save import convert

    report = convert(
        args.source, args.destination, to=args.to, dtype=args.dtype, shards=args.shards,
        max_shard_size=args.max_shard_size, quantize=args.quantize, overwrite=args.overwrite,
        verify=args.verify, adapter=args.adapter, merge_into=args.merge_into,
    )  # fmt: skip
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    kind = f"{report.quantize or report.dtype}, {report.nbytes / 1e9:.2f} GB"
    checked = f", compared with the source in {report.verify_seconds:.1f} s" if args.verify else ", not verified"
    rate = report.nbytes / report.write_seconds / 1e6
    print(f"{report.path}: {kind}, written in {report.write_seconds:.1f} s ({rate:.0f} MB/s){checked}")
