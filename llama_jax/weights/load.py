"""`load`: from a name, a folder or a file to a model on the devices.

JAX is imported inside the functions, so that `llama_jax.load` costs nothing until it is called.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.loaded import LoadedLlama
from llama_jax.progress import SMALL as FAST
from llama_jax.progress import progress
from llama_jax.typing import Foreign

if TYPE_CHECKING:
    import jax

    from llama_jax.model import Llama
    from llama_jax.ops.quantized import NF4
    from llama_jax.weights.checkpoint import Checkpoint
    from llama_jax.weights.source import Index, Tensor

log = logging.getLogger("llama_jax")

SMALL = 1 << 16  # elements that are not worth an exchange


def load(
    name: str | Path,
    *,
    mesh: str | jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    chat_format: str | None = None,
    attention: str | None = None,
    quantize: str | None = None,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
) -> LoadedLlama:
    """Loads a Llama, tensor by tensor, each device's part straight to the device.

    Args:
      name: "smollm2-135m-instruct" (fetched once, 98 MB), a Hugging Face folder, a `.gguf` file, or a Hugging Face hub
        id such as "meta-llama/Llama-3.2-1B-Instruct".
      mesh: "fsdp=2,tensor=4", or a mesh of `sharding.make_mesh`; None puts all devices on `tensor`.
      dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is float32 on CPU (which runs
        bfloat16 ten times slower) and bfloat16 on TPU and GPU.
      max_seq_len: size of every cache, in tokens; None fits it to each call.
      chat_format: "llama2", "llama3", "codellama70b", "template" or "template:NAME"; None is the checkpoint's own, or a
        guess that a warning names.
      attention: "splash", "cudnn", "xla", "cpu" or "reference", see `ops.attention.dot_product_attention`; None chooses
        by platform.
      quantize: "nf4" stores the matrices of the layers in NF4 with double quantization, 4.13 bits a number,
        "nf4-single" in 4.5 bits; bit for bit as bitsandbytes, and of its checkpoints the numbers that they hold. None
        is what the adapter's run had, else all are expanded.
      adapters: the folder of a LoRA adapter as PEFT saves it, or of a training run that made one. Its weights stay
        beside those of the model. Where `name` is such a folder, the model is its base. Several, {"name": folder}, are
        loaded side by side, and each prompt of `generate` and each conversation chooses one, or none.

    Raises:
      CheckpointError: the checkpoint cannot be fetched or read; says which file and what to do.
      ConfigError: it is a model that this library cannot compute exactly.
      ValueError: an argument is wrong.
    """
    import jax

    from llama_jax import sharding
    from llama_jax.compilation_cache import use_compilation_cache
    from llama_jax.config.quantization import check_quantize
    from llama_jax.model import flatten_heads
    from llama_jax.ops.attention import check_implementation
    from llama_jax.text.chat import format_named
    from llama_jax.weights.checkpoint import DTYPES
    from llama_jax.weights.open import open_checkpoint
    from llama_jax.weights.peft import (
        load_several,
        open_adapter,
        open_several,
        own_tokenizer,
        quantize_of,
        warn_of_tokenizers,
    )

    if chat_format is not None:
        format_named(chat_format)
    several = adapters if isinstance(adapters, Mapping) else {}
    name, saved = open_adapter(name, None if isinstance(adapters, Mapping) else adapters)
    if saved and several:
        raise ValueError(f"{name}: brings an adapter of its own: give the model that all of them are for")
    each = open_several(name, several)
    checkpoint = open_checkpoint(name)
    config = checkpoint.config
    if saved:
        saved.check(config)
        if quantize is None and saved.quantize:
            quantize = saved.quantize
    if quantize is None and each:
        quantize = quantize_of(each)
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise ValueError(f"max_seq_len must be from 1 to the model's {config.max_seq_len}, got {max_seq_len}")
    use_compilation_cache()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_implementation(attention)
    check_quantize(quantize)
    if mesh is None or isinstance(mesh, str):
        mesh = sharding.mesh_of(config, mesh)
    model = read_model(checkpoint, mesh, dtype=dtype, attention=attention, quantize=quantize)
    tokenizer = checkpoint.tokenizer
    with jax.set_mesh(mesh):
        if saved:
            model = saved.load(model)
            tokenizer = own_tokenizer(saved, config) or tokenizer
        elif several:
            model = load_several(model, each)
            warn_of_tokenizers(each, tokenizer)
        if mesh.devices.flat[0].platform == "tpu":
            model = flatten_heads(model)
    return LoadedLlama(config, model, tokenizer, mesh, max_seq_len, chat_format, checkpoint, tuple(several))


def read_model(
    checkpoint: Checkpoint,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str | None,
    stacked: bool = False,
    attention: str | None = None,
    quantize: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Llama:
    """Reads the weights, one tensor at a time, into a model on `mesh`.

    Each process reads only the byte ranges that its devices hold. Where several processes hold the same shard, each
    reads part of it and they exchange the parts. Host memory beyond the model's own: about two of the largest tensors.

    Args:
      checkpoint: what to read.
      mesh: where to.
      dtype: of parameters and computation; None keeps each parameter as it is stored.
      stacked: the layout of blocks, see `model.Llama`.
      attention: name of the attention implementation.
      quantize: form of the layers' matrices, of `config.quantization.Quantize`; None is `dtype`.
      advance: called with the number of bytes that this process has just read; None shows progress on process 0.
    """
    import jax

    from llama_jax.distributed import is_main
    from llama_jax.model import Llama
    from llama_jax.model.quantize import quantized
    from llama_jax.ops.quantized import NF4
    from llama_jax.ops.weights import is_leaf, name_of
    from llama_jax.sharding import ShardingRules, whole_weights
    from llama_jax.weights.quantized import QuantizedParameter, form_of

    rules = ShardingRules()
    main = dtype or str(checkpoint.dtype)
    with jax.set_mesh(mesh):
        abstract = Llama(
            checkpoint.config,
            rules=rules,
            dtype=main,
            param_dtype=main,
            stacked=stacked,
            attention=attention,
            rngs=None,
        )
        abstract = quantized(abstract, form_of(checkpoint, quantize))
        whole = whole_weights(rules.undivided(checkpoint.config))
    if whole:
        log.warning("%s", whole)
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_leaf)
    parameters = [
        QuantizedParameter(checkpoint, name_of(path), _on(mesh, leaf)) if isinstance(leaf, NF4)
        else _Parameter(checkpoint, name_of(path), leaf.shape, jax.NamedSharding(mesh, leaf.sharding.spec))
        for path, leaf in paths
    ]  # fmt: skip
    if advance or not is_main():
        shown = contextlib.nullcontext(advance or (lambda done: None))
    else:
        shown = progress("Loading", sum(parameter.bytes_to_read() for parameter in parameters), least=FAST)
    with shown as done:
        arrays = [parameter.read(dtype, done) for parameter in parameters]
    return jax.tree_util.tree_unflatten(treedef, arrays)


def _on(mesh: jax.sharding.Mesh, leaf: NF4) -> NF4:
    """An abstract leaf on the devices."""
    import jax

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(place, leaf)


class _Parameter:
    """One parameter of the model: where it is stored, and which parts of it this process reads."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], sharding: Foreign):
        from llama_jax.weights import params

        self._checkpoint, self._shape, self._sharding = checkpoint, shape, sharding
        place = params.place_of(name, checkpoint.config.layers)
        self._row, self._stacked = place.spec, place.stacked
        layers: Sequence[int | None] = [None] if place.layers is None else place.layers
        self._layers = layers if place.stacked else layers[:1]
        self._reading = self._shared_out()

    def bytes_to_read(self) -> int:
        """Bytes of the file that this process reads: each part once, however many of its devices hold it."""
        indices = self._reading.addressable_devices_indices_map(self._shape).values()
        parts = {_key(index): index for index in indices}.values()
        return sum(self._nbytes(tensor, within) for index in parts for tensor, within in self._tensors(index))

    def read(self, dtype: str | None, advance: Callable[[int], None]) -> jax.Array:
        """Reads those parts, straight to the devices; all processes must call it."""
        import jax
        import numpy as np

        from llama_jax.weights import params
        from llama_jax.weights.checkpoint import DTYPES
        from llama_jax.weights.source import cast, common_dtype

        checkpoint, row = self._checkpoint, self._row
        target = DTYPES[dtype] if dtype else common_dtype(checkpoint.dtype_of(row, i) for i in self._layers)

        def one(tensor: Tensor, index: Index) -> np.ndarray:
            x = cast(params.read(tensor, row, checkpoint.config, checkpoint.format, index), target, tensor.name)
            advance(self._nbytes(tensor, index))
            return x

        seen: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one read

        def part(index: Any) -> np.ndarray:
            key = _key(index)
            if key not in seen:
                tensors = self._tensors(index)
                if self._stacked:
                    out = np.empty([len(range(n)[s]) for n, s in zip(self._shape, index, strict=True)], target)
                    for to, piece in zip(out, tensors, strict=True):
                        to[...] = one(*piece)
                else:
                    out = np.ascontiguousarray(one(*tensors[0]))
                seen[key] = out
            return seen[key]

        array = jax.make_array_from_callback(self._shape, self._reading, part, dtype=target)
        if self._reading == self._sharding:
            return array
        with jax.set_mesh(self._sharding.mesh):
            return jax.jit(lambda x: jax.reshard(x, self._sharding.spec))(array)

    def _shared_out(self) -> Foreign:
        """The sharding to read with: where devices of several processes hold the same, each of them gets a part.

        From storage that all share, a replica would else cost as much as the first copy.
        """
        import jax

        from llama_jax.sharding import axes_of

        readers: dict[tuple, set[int]] = {}
        for device, index in self._sharding.devices_indices_map(self._shape).items():
            readers.setdefault(_key(index), set()).add(device.process_index)
        if all(len(processes) == 1 for processes in readers.values()) or math.prod(self._shape) < SMALL:
            return self._sharding
        mesh, spec = self._sharding.mesh, [axes_of(entry) for entry in self._sharding.spec]
        axes = "L" * self._stacked + self._row.axes
        # Dimensions that are apart in the file come first. Formats that pair a head's numbers do not split it.
        order = ["L", *"".join(self._row.groups(self._checkpoint.format)).replace("H", "")]
        for name in mesh.axis_names:
            if mesh.shape[name] == 1 or any(name in entry for entry in spec):
                continue
            for axis in (axes.index(letter) for letter in order if letter in axes):
                ways = math.prod(mesh.shape[used] for used in spec[axis]) * mesh.shape[name]
                if self._shape[axis] % ways == 0:
                    spec[axis] = (*spec[axis], name)
                    break
        return jax.NamedSharding(mesh, jax.P(*spec))

    def _tensors(self, index: Index) -> list[tuple[Tensor, Index]]:
        """Returns the tensors that hold a part, and which part of each."""
        layers = self._layers[index[0]] if self._stacked else self._layers
        return [(self._checkpoint.tensor(self._row, i), index[1:] if self._stacked else index) for i in layers]

    def _nbytes(self, tensor: Tensor, index: Index) -> int:
        """Bytes of the file that hold a part of a tensor."""
        shape = self._shape[1:] if self._stacked else self._shape
        size = math.prod(len(range(n)[s]) for n, s in zip(shape, index, strict=True))
        return tensor.nbytes * size // math.prod(shape)


def _key(index: Index) -> tuple:
    return tuple((s.start, s.stop) for s in index)
