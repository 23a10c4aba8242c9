"""Checkpoints that bitsandbytes quantized to NF4 (`*-bnb-4bit`): each matrix as one tensor again.

Such a matrix is a handful of tensors: its packed codes, their magnitudes, and a few bytes of JSON that say how to read
them. The numbers are read as they are; what computes with them need not expand them (`ops.quantized`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from llama_jax.config.quantization import BLOCK, CODES, SCALE_BLOCK, SCALES
from llama_jax.typing import Fields
from llama_jax.weights.checkpoint import DTYPES
from llama_jax.weights.nf4 import Blocks
from llama_jax.weights.source import CheckpointError, Index, Tensor

STATE = ".quant_state.bitsandbytes__nf4"
LARGEST = 3e38  # of float32
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def is_nf4(config: Fields) -> bool:
    """Returns whether a config.json says that its weights are in NF4, by bitsandbytes."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    return bool(said.get("load_in_4bit")) and said.get("bnb_4bit_quant_type") == "nf4"


def joined(tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """Returns the tensors with each matrix in NF4 as one, [out, in], of the dtype that it had before.

    Args:
      tensors: of all files, by name.
      path: for messages.

    Raises:
      CheckpointError: a part is missing, or has another form than bitsandbytes writes.
    """
    states = [name for name in tensors if name.endswith(STATE)]
    parts = {f"{name.removesuffix(STATE)}.{part}" for name in states for part in PARTS} | set(states)
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name in states:
        weight = name.removesuffix(STATE)
        found[weight] = _tensor(weight, tensors, path)
    return found


def _tensor(name: str, tensors: Mapping[str, Tensor], path: object) -> Tensor:
    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name}: {problem}: fetch the files again, or take the weights in bfloat16")

    try:
        state = json.loads(tensors[name + STATE].read().tobytes())
        rows, columns = state["shape"]
        dtype = DTYPES[state["dtype"]]
        double = "nested_blocksize" in state
        expected = {"quant_type": "nf4", "blocksize": BLOCK} | ({"nested_blocksize": SCALE_BLOCK} if double else {})
        mean = state["nested_offset"] if double else 0.0
        if any(type(size) is not int for size in (rows, columns)):
            raise ValueError(f"shape {state['shape']}")
        if type(mean) is not float or not abs(mean) < LARGEST:
            raise ValueError(f"nested_offset {mean}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise refuse(f"its quant_state cannot be read ({type(error).__name__}: {error})") from error
    for key, value in expected.items():
        if state.get(key) != value:
            raise refuse(f"{key} is {state.get(key)!r}, and this library reads {value!r}")
    if rows < 1 or columns < 1 or columns % BLOCK:
        raise refuse(f"a matrix of {rows} x {columns} does not divide into blocks of {BLOCK}")
    count = rows * columns // BLOCK
    if tensors[name].nbytes != rows * columns // 2:  # of any dtype: bnb_4bit_quant_storage packs the bytes in others
        raise refuse(f"holds {tensors[name].nbytes} bytes, and {rows * columns // 2} are needed")
    sizes: dict[str, tuple[int, tuple[str, ...]]] = {
        f"{name}.absmax": (count, ("uint8",) if double else ("float32",)),
        f"{name}.quant_map": (len(CODES), ("float32",)),
    }  # fmt: skip
    if double:
        sizes[f"{name}.nested_absmax"] = -(-count // SCALE_BLOCK), ("float32",)
        sizes[f"{name}.nested_quant_map"] = len(SCALES), ("float32",)
    for part, (size, dtypes) in sizes.items():
        if part not in tensors:
            raise refuse(f"{part} is missing")
        tensor = tensors[part]
        if int(np.prod(tensor.shape)) != size or tensor.dtype.name not in dtypes:
            raise refuse(f"{part} holds {list(tensor.shape)} {tensor.dtype} numbers, and {size} {dtypes[0]} are needed")
    if not np.array_equal(tensors[f"{name}.quant_map"].read().ravel(), np.array(CODES, np.float32)):
        raise refuse("quant_map has other numbers than NF4's")

    def blocks() -> Blocks:
        codes = np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).reshape(rows, columns // 2)
        absmax = tensors[f"{name}.absmax"].read().reshape(rows, columns // BLOCK)
        scales = tensors[f"{name}.nested_absmax"].read().ravel() if double else None
        if scales is None:
            return Blocks(codes, absmax)
        # Its numbers depend on the machine that quantized, in the last bit.
        return Blocks(codes, absmax, scales, np.float32(mean), tensors[f"{name}.nested_quant_map"].read().ravel())

    def reader(index: Index) -> np.ndarray:
        first, *rest = index or (slice(None),)
        return blocks().dense(first)[(slice(None), *rest)].astype(dtype)

    nbytes = tensors[name].nbytes + sum(tensors[part].nbytes for part in sizes)
    return Tensor(name, (rows, columns), dtype, nbytes, reader, blocks, double)
