"""`load`: from a name, a folder or a file to a model on the devices.

JAX is imported inside the functions, so that `llama_jax.load` costs nothing until it is called.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    import jax

    from llama_jax.model import Llama
    from llama_jax.text.chat import ChatFormat
    from llama_jax.text.tokenizer import Tokenizer
    from llama_jax.weights.names import Format
    from llama_jax.weights.source import Tensor

log = logging.getLogger("llama_jax")

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it says, before any weight is read.

    Attributes:
      path: the folder or file.
      format: whose names and layout its tensors have.
      config: the architecture.
      tensors: stored name -> tensor.
      tokenizer: None where the checkpoint has none.
    """

    path: Path
    format: Format
    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None


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
    """

    config: ModelConfig
    model: Llama
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh
    max_seq_len: int | None = None
    chat_name: str | None = None

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

    checkpoint = open_checkpoint(name)
    config = checkpoint.config
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise ValueError(f"max_seq_len must be from 1 to the model's {config.max_seq_len}, got {max_seq_len}")
    use_compilation_cache()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if mesh is None:
        mesh = sharding.default_mesh(config)
    elif isinstance(mesh, str):
        sizes = sharding.parse_mesh(mesh)
        mesh = sharding.make_mesh(
            config, data=sizes.get("data", 1), fsdp=sizes.get("fsdp", 1), tensor=sizes.get("tensor", 1)
        )
    model = read_model(checkpoint, mesh, dtype=dtype, attention=attention)
    return LoadedLlama(config, model, checkpoint.tokenizer, mesh, max_seq_len, chat_format)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format that is read, fetching it if need be; reads no weights.

    Raises:
      CheckpointError: no such checkpoint, or not one that can be read.
      ConfigError: its configuration is not supported.
    """
    from llama_jax import presets
    from llama_jax.text.tokenizer import load_tokenizer, tokenizer_from_gguf
    from llama_jax.weights import hub, names
    from llama_jax.weights.gguf import read_gguf
    from llama_jax.weights.hf import read_hf
    from llama_jax.weights.source import DOWNLOAD_AGAIN, CheckpointError

    path = hub.resolve(str(name))
    try:
        if path.is_file():
            file = read_gguf(path)
            divisors = file.tensors.get("rope_freqs.weight")
            config = presets.from_gguf_metadata(
                file.metadata,
                tie_embeddings="output.weight" not in file.tensors,
                rope_divisors=None if divisors is None else divisors.read().tolist(),
            )
            checkpoint = Checkpoint(path, "gguf", config, file.tensors, tokenizer_from_gguf(file.metadata))
        elif (path / "params.json").exists() and not (path / "config.json").exists():
            raise CheckpointError(f"{path}: Meta's folders (params.json) are not read yet; use the Hugging Face folder")
        else:
            folder = read_hf(path)
            config = presets.from_hf_config(folder.config)
            checkpoint = Checkpoint(path, "hf", config, folder.tensors, load_tokenizer(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a value in its configuration or tokenizer files has the wrong type"
            f" ({type(error).__name__}: {error}); {DOWNLOAD_AGAIN}"
        ) from error
    except ValueError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    names.check(checkpoint.tensors, config, checkpoint.format, path)
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, the model only %d: texts with the last ones will be refused",
            path, tokenizer.vocab_size, config.vocab_size,
        )  # fmt: skip
    return checkpoint


def read_model(
    checkpoint: Checkpoint,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str,
    stacked: bool = False,
    attention: str | None = None,
) -> Llama:
    """Reads the weights, one tensor at a time, into a model on `mesh`.

    Each process reads only the byte ranges that its devices hold. Host memory beyond the model's own: about two of the
    largest tensors.

    Args:
      checkpoint: what to read.
      mesh: where to.
      dtype: of parameters and computation.
      stacked: the layout of blocks, see `model.Llama`.
      attention: name of the attention implementation.
    """
    import jax

    from llama_jax.model import Llama
    from llama_jax.sharding import ShardingRules
    from llama_jax.weights.progress import progress

    rules = ShardingRules()
    with jax.set_mesh(mesh):
        abstract = Llama(
            checkpoint.config,
            rules=rules,
            dtype=dtype,
            param_dtype=dtype,
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
    with progress("Loading", total) as advance:
        for path, leaf in paths:
            sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            arrays.append(_read_parameter(checkpoint, name, leaf, sharding, advance))
    return jax.tree_util.tree_unflatten(treedef, arrays)


def _read_parameter(checkpoint: Checkpoint, name: str, leaf: Any, sharding: Any, advance: Any) -> jax.Array:
    import jax
    import numpy as np

    from llama_jax.weights import names

    row, layer = names.row_of(name)
    stacked = "{}" in row.ours and layer is None
    config = checkpoint.config

    def one(layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        tensor = checkpoint.tensors[row.name(checkpoint.format, layer)]
        advance(tensor.nbytes if not seen else 0)
        return names.read(tensor, row, config, checkpoint.format, index)

    seen: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one read

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in seen:
            if stacked:
                layers = range(config.num_layers)[index[0]]
                out = np.stack([one(i, index[1:]).astype(leaf.dtype) for i in layers])
            else:
                out = np.ascontiguousarray(one(layer, index), leaf.dtype)
            seen[key] = out
        return seen[key]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


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
