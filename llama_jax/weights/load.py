"""`load`: from a name, a folder or a file to a model on the devices.

JAX is imported inside the functions, so that `llama_jax.load` costs nothing until it is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.config import ModelConfig

if TYPE_CHECKING:
    import jax

    from llama_jax.model import Llama
    from llama_jax.text.chat import ChatFormat
    from llama_jax.text.tokenizer import Tokenizer
    from llama_jax.weights.open import Checkpoint

log = logging.getLogger("llama_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedLlama:
    """A model ready to run; what `load` returns and every function of the package takes.

    Attributes:
      config: the architecture.
      model: the Flax module, its parameters on the devices.
      tokenizer: None where the checkpoint has none.
      mesh: the devices; every function enters it.
      max_seq_len: the largest cache of a call, in tokens; None is up to the configuration's.
      chat_name: the chat format that was asked for; None is the checkpoint's own.
      checkpoint: where it came from; None for a model that was made otherwise.
    """

    config: ModelConfig
    model: Llama
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh
    max_seq_len: int | None = None
    chat_name: str | None = None
    checkpoint: Checkpoint | None = None

    @property
    def chat_format(self) -> ChatFormat:
        """How messages become a prompt.

        Raises:
          ValueError: there is no tokenizer, or no chat format is known for it.
        """
        from llama_jax.text.chat import chat_format

        return chat_format(self.require_tokenizer(), self.chat_name)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          ValueError: the checkpoint has none.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer: put tokenizer.json or tokenizer.model beside its weights"
            )
        return self.tokenizer


def load(
    name: str | Path,
    *,
    mesh: str | jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    chat_format: str | None = None,
    attention: str | None = None,
) -> LoadedLlama:
    """Loads a Llama, tensor by tensor, each device's part straight to the device.

    Args:
      name: "smollm2-135m-instruct" (fetched once, 98 MB), a Hugging Face folder, a `.gguf` file, or a Hugging Face hub
        id such as "meta-llama/Llama-3.2-1B-Instruct".
      mesh: "fsdp=2,tensor=4", or a mesh of `sharding.make_mesh`; None puts all devices on `tensor`.
      dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is float32 on CPU (which runs
        bfloat16 ten times slower) and bfloat16 on TPU and GPU.
      max_seq_len: size of every cache, in tokens; None fits it to each call.
      chat_format: "llama2", "llama3", "codellama70b" or "template"; None is the checkpoint's own.
      attention: "reference", "xla" or "cpu"; None chooses by platform.

    Raises:
      CheckpointError: the checkpoint cannot be fetched or read; says which file and what to do.
      ConfigError: it is a model that this library cannot compute exactly.
      ValueError: an argument is wrong.
    """
    import jax

    from llama_jax import sharding
    from llama_jax.text.chat import format_named
    from llama_jax.weights.open import DTYPES, open_checkpoint

    if chat_format is not None:
        format_named(chat_format)
    checkpoint = open_checkpoint(name)
    config = checkpoint.config
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise ValueError(f"max_seq_len must be from 1 to the model's {config.max_seq_len}, got {max_seq_len}")
    use_compilation_cache()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if mesh is None or isinstance(mesh, str):
        mesh = sharding.mesh_of(config, mesh)
    model = read_model(checkpoint, mesh, dtype=dtype, attention=attention)
    return LoadedLlama(config, model, checkpoint.tokenizer, mesh, max_seq_len, chat_format, checkpoint)


def read_model(
    checkpoint: Checkpoint,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str | None,
    stacked: bool = False,
    attention: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Llama:
    """Reads the weights, one tensor at a time, into a model on `mesh`.

    Each process reads only the byte ranges that its devices hold. Host memory beyond the model's own: about two of the
    largest tensors.

    Args:
      checkpoint: what to read.
      mesh: where to.
      dtype: of parameters and computation; None keeps each parameter as it is stored.
      stacked: the layout of blocks, see `model.Llama`.
      attention: name of the attention implementation.
      advance: called with the number of bytes just read; None shows progress on a terminal.
    """
    import jax

    from llama_jax.model import Llama
    from llama_jax.sharding import ShardingRules
    from llama_jax.weights.progress import progress

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
        whole = rules.undivided(checkpoint.config)
    if whole:
        log.warning("not split over the mesh, because %s", "; ".join(whole))
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    arrays = []
    with contextlib.nullcontext(advance) if advance else progress("Loading", total) as done:
        for path, leaf in paths:
            sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
            arrays.append(_read_parameter(checkpoint, parameter_name(path), leaf.shape, sharding, dtype, done))
    return jax.tree_util.tree_unflatten(treedef, arrays)


def parameter_name(path: Any) -> str:
    """The name of a leaf of `Llama` in `names.TABLE`'s spelling: "blocks.3.attn.wq", "blocks.attn.wq" if stacked."""
    import jax

    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _read_parameter(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], sharding: Any, dtype: str | None, advance: Any
) -> jax.Array:
    import jax
    import numpy as np

    from llama_jax.weights import names
    from llama_jax.weights.open import DTYPES
    from llama_jax.weights.source import cast, common_dtype

    row, layer = names.row_of(name)
    config = checkpoint.config
    stacked = "{}" in row.ours and layer is None
    layers = range(config.num_layers) if stacked else [layer]
    target = DTYPES[dtype] if dtype else common_dtype(checkpoint.dtype_of(row, i) for i in layers)

    def one(layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        tensor = checkpoint.tensor(row, layer)
        advance(tensor.nbytes if not seen else 0)
        return cast(names.read(tensor, row, config, checkpoint.format, index), target, tensor.name)

    seen: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one read

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in seen:
            if stacked:
                chosen = layers[index[0]]
                size = [len(range(n)[s]) for n, s in zip(shape, index, strict=True)]
                out = np.empty(size, target)
                for to, i in zip(out, chosen, strict=True):
                    to[...] = one(i, index[1:])
            else:
                out = np.ascontiguousarray(one(layer, index))
            seen[key] = out
        return seen[key]

    return jax.make_array_from_callback(shape, sharding, part)


def use_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR or the program already chose.

    `$LLAMA_JAX_CACHE/xla` by default; a folder or `gs://...` in JAX_COMPILATION_CACHE_DIR works too, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    import jax

    from llama_jax.weights.hub import cache_folder

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("no compilation cache: %s cannot be written (%s)", folder, error.strerror)
            return
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
