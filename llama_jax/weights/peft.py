"""Adapters as PEFT stores them: a folder with `adapter_config.json` and `adapter_model.safetensors`, both ways.

PEFT loads what it finds and is silent about the rest: a missing factor is another model, and one too many is ignored.
Here every tensor is used and every target found, or an error names them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.config.adapter import CONFIG, WEIGHTS, Adapter, from_peft, to_peft
from llama_jax.config.params import stored_shape
from llama_jax.config.quantization import check_quantize
from llama_jax.text.base import Tokenizer
from llama_jax.text.open import load_tokenizer
from llama_jax.typing import JsonObject
from llama_jax.weights.source import CheckpointError, exists, listing, system_errors

if TYPE_CHECKING:
    from llama_jax.model import Llama
    from llama_jax.model.adapt import Factors

log = logging.getLogger("llama_jax")

PREFIX = "base_model.model."
RECIPE = "recipe.json"  # beside the adapter, in a run's checkpoint


class SavedAdapter:
    """An adapter's folder, opened.

    Attributes:
      path: the folder.
      named: what it is called among several.
      adapter: what it is.
      base: the name of its base, as its configuration has it; may be empty.
      quantize: the form in which its run kept the base, of `config.quantization.Quantize`; None where it did not, or
        where the adapter is not of a run of ours.
    """

    def __init__(self, path: Path):
        """Opens it, and reads no factor.

        Raises:
          CheckpointError: a file is missing or damaged.
          ConfigError: it is of a kind that is not computed.
        """
        from llama_jax.weights.safetensors import read_safetensors

        self.path, self.named = path, path.name
        content = _read_config(path / CONFIG)
        self.adapter = from_peft(content, str(path / CONFIG))
        self.base: str = content.get("base_model_name_or_path") or ""
        self.quantize = _quantize_of_run(path)
        if not exists(path / WEIGHTS):
            old = " (adapter_model.bin is a pickle: load and save it again with PEFT)" * exists(
                path / "adapter_model.bin"
            )
            raise CheckpointError(f"{path}: has no {WEIGHTS}{old}: an adapter has it beside {CONFIG}")
        self._tensors = read_safetensors(path / WEIGHTS)

    def load(self, model: Llama) -> Llama:
        """Returns the model with this adapter; its mesh must be in use.

        Raises:
          CheckpointError: its factors are not those of its configuration, or not of this model's shapes.
          ConfigError: it targets what the model does not have.
        """
        from llama_jax.model.adapt import adapt

        self.check(model.config)
        return adapt(model, self.adapter, lambda one, _: self.read(one))

    def factors(self, model: Llama) -> dict[str, Factors]:
        """Its factors, by the weight's name in the model."""
        from llama_jax.model.adapt import factors

        self.check(model.config)
        return factors(model, self.adapter)

    def check(self, config: ModelConfig) -> None:
        """Raises CheckpointError or ConfigError, as `load`, without reading a factor."""
        adapter = self.adapter
        expected: dict[str, tuple[int, ...]] = {}
        for module, (spec, _) in adapter.modules(config).items():
            (outer, inner), rank = stored_shape(spec, config, "hf"), adapter.rank_of(module)
            expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, inner)
            expected[f"{PREFIX}{module}.lora_B.weight"] = (outer, rank)
        ignored = {name for name in self._tensors if name.endswith(".base_layer.weight")}  # of PEFT's own
        missing, more = expected.keys() - self._tensors.keys(), self._tensors.keys() - expected.keys() - ignored
        if missing or more:
            lacks = f"lacks {_some(missing)}, which its configuration targets" if missing else ""
            has = f"has {_some(more)}, which its configuration does not target" if more else ""
            raise CheckpointError(
                f"{self.path / WEIGHTS}: {' and '.join(filter(None, (lacks, has)))}: it is of another model or damaged"
            )
        for name, shape in expected.items():
            if self._tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.path / WEIGHTS}: {name} has the shape {list(self._tensors[name].shape)}, and on this model"
                    f" it is {list(shape)}: its base is {self.base or 'another model'}"
                )

    def factor(self, module: str, which: str) -> np.ndarray:
        """Returns A, float32 [r, in], or B, float32 [out, r], of a matrix."""
        return self._tensors[f"{PREFIX}{module}.lora_{which}.weight"].read().astype(np.float32)

    def read(self, one: Factors) -> tuple[np.ndarray, np.ndarray]:
        """The factors of one weight, of all its layers; what a layer lacks of the rank is zero."""
        first = one.a_shape[:1] if one.place.stacked else ()
        a, b = np.zeros(one.a_shape, np.float32), np.zeros(one.b_shape, np.float32)
        for i, (module, rank) in enumerate(zip(one.modules, one.ranks, strict=True)):
            if module is None:
                continue
            to_a, to_b = (a[i], b[i]) if first else (a, b)
            to_a[..., :rank] = self.factor(module, "A").T.reshape(*to_a.shape[:-1], rank)
            to_b[:rank] = self.factor(module, "B").T.reshape(rank, *to_b.shape[1:])
        return a, b


def open_several(name: str | Path, folders: Mapping[str, str | Path]) -> list[SavedAdapter]:
    """Returns the adapters of a model, by the order of their names.

    Raises:
      CheckpointError: one is none.
      ValueError: they are not folders by name.
    """
    found = []
    for key, folder in folders.items():
        if not isinstance(key, str) or not key or not isinstance(folder, str | Path):
            raise ValueError(
                f'several adapters are folders by name, {{"orders": "runs/orders"}}, got {key!r}: {folder!r}'
            )
        _, saved = open_adapter(name, folder)
        assert saved is not None
        saved.named = key
        found.append(saved)
    return found


def quantize_of(each: Sequence[SavedAdapter]) -> str | None:
    """Returns the form in which the runs of several adapters kept their base.

    Raises:
      ValueError: they kept it differently.
    """
    forms = {saved.named: saved.quantize for saved in each}
    if len(set(forms.values())) > 1:
        raise ValueError(
            f"the adapters were trained on differently kept weights ({forms}): give quantize, or load those of one kind"
        )
    return next(iter(forms.values()))


def warn_of_tokenizers(each: Sequence[SavedAdapter], tokenizer: Tokenizer | None) -> None:
    """Warns where an adapter of several was trained with another chat template than the model's, which is used."""
    for saved in each:
        files = {name for name in listing(saved.path) if name in ("tokenizer_config.json", "chat_template.jinja")}
        own = load_tokenizer(saved.path) if files else None
        if own and tokenizer and own.chat_template != tokenizer.chat_template:
            log.warning(
                "adapter %s was trained with another chat template than that of the model, which is used: load it alone"
                " to use its own", saved.named,
            )  # fmt: skip


def load_several(model: Llama, each: Sequence[SavedAdapter]) -> Llama:
    """Returns the model with several adapters, of which each row of a batch chooses; its mesh must be in use.

    Raises:
      as `SavedAdapter.load`.
    """
    from llama_jax.model.adapt import side_by_side, with_factors

    factors = [saved.factors(model) for saved in each]

    def make(one: Factors, name: str) -> tuple[np.ndarray, np.ndarray]:
        parts = [saved.read(own[name]) for saved, own in zip(each, factors, strict=True) if name in own]
        return np.concatenate([a for a, _ in parts], axis=-1), np.concatenate([b for _, b in parts], axis=0)

    return with_factors(model, side_by_side(factors), make)


def adapter_folder(name: str | Path) -> Path | None:
    """Returns the folder of an adapter, where a name is one; None where it is a model.

    A training run's folder is that of its newest checkpoint.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        return None
    from llama_jax.weights.formats.hf import has_weights

    with system_errors(path):
        if CONFIG in (present := listing(path)):
            # A whole model with an adapter beside it is a model, as everywhere.
            return None if "config.json" in present and has_weights(present) else path
        for folder in (path / "checkpoints", path):
            steps = [int(step) for step in listing(folder) if step.isdecimal()] if exists(folder) else []
            if saved := [step for step in steps if exists(folder / str(step) / CONFIG)]:
                return folder / str(max(saved))
    return None


def open_adapter(name: str | Path, adapters: str | Path | None) -> tuple[str | Path, SavedAdapter | None]:
    """Returns the name of the model, and its adapter, where it has one.

    Args:
      name: of a model; or of an adapter, whose base is then the model.
      adapters: of an adapter, or None.

    Raises:
      CheckpointError: there is no such adapter, or it does not say what its base is.
    """
    folder = adapter_folder(name)
    if adapters is not None:
        if folder is not None:
            raise CheckpointError(f"{name}: is itself an adapter: give the model that both are for")
        found = adapter_folder(adapters)
        if found is None:
            raise CheckpointError(
                f"{adapters}: is not the folder of an adapter, with {CONFIG} (of a hub id: hf download ID --local-dir"
                " FOLDER)"
            )
        return name, SavedAdapter(found)
    if folder is None:
        return name, None
    saved = SavedAdapter(folder)
    if not saved.base:
        raise CheckpointError(
            f"{folder}: is an adapter that does not say what its base is: give the base's name, and this"
            " as the adapter (adapters=, --adapter)"
        )
    return saved.base, saved


def own_tokenizer(saved: SavedAdapter, config: ModelConfig) -> Tokenizer | None:
    """Returns the tokenizer of an adapter's folder, with the chat template that it was trained with; None without."""
    tokenizer = load_tokenizer(saved.path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        log.warning(
            "%s: its tokenizer has %d tokens, the model only %d: the model's own is used", saved.path,
            tokenizer.vocab_size, config.vocab_size,
        )  # fmt: skip
        return None
    return tokenizer


def _quantize_of_run(path: Path) -> str | None:
    if not exists(path / RECIPE):
        return None
    try:
        found = json.loads((path / RECIPE).read_text(encoding="utf-8")).get("quantize")
        check_quantize(found)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / RECIPE}: cannot be read ({error}): it says how the base was kept") from error
    return found


def _read_config(path: Path) -> JsonObject:
    if not exists(path):
        raise CheckpointError(f"{path.parent}: has no {CONFIG}: give the folder of an adapter, as PEFT saves it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


def peft_files(model: Llama, adapter: Adapter, arrays: Mapping[str, np.ndarray], base: str) -> dict[str, bytes]:
    """Returns the files of an adapter's folder, by name.

    Args:
      model: whose weights have it.
      adapter: what it is.
      arrays: the factors on the host, by name in the model: "blocks.attn.wq.a".
      base: the name of the model without it.
    """
    from safetensors.numpy import save

    from llama_jax.model.adapt import factors, without_adapter

    tensors: dict[str, np.ndarray] = {}
    for name, one in factors(without_adapter(model), adapter).items():
        a, b = (np.asarray(arrays[f"{name}.{part}"]) for part in ("a", "b"))
        for i, (module, rank) in enumerate(zip(one.modules, one.ranks, strict=True)):
            if module is None:
                continue
            of_a, of_b = (a[i], b[i]) if one.place.stacked else (a, b)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = of_a.reshape(-1, of_a.shape[-1])[:, :rank].T
            tensors[f"{PREFIX}{module}.lora_B.weight"] = of_b[:rank].reshape(rank, -1).T
    contiguous = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
    config = json.dumps(to_peft(adapter, base), indent=2, ensure_ascii=False) + "\n"
    return {CONFIG: config.encode(), WEIGHTS: save(contiguous, metadata={"format": "pt"})}


def save_adapter(model: Llama, adapter: Adapter, path: str | Path, *, base: str) -> None:
    """Writes the adapter of a model as PEFT's folder; the model's mesh must be in use.

    Args:
      model: its weights are `ops.adapted.Adapted`.
      adapter: what it is.
      path: a new folder.
      base: the name of the model without it.
    """
    from llama_jax.distributed import is_main
    from llama_jax.files import write_whole

    files = peft_files(model, adapter, host_factors(model), base)
    if is_main():
        folder = Path(os.path.expanduser(path))
        folder.mkdir(parents=True)
        for name, content in files.items():
            write_whole(folder / name, content)


def host_factors(model: Llama) -> dict[str, np.ndarray]:
    """Returns the factors of a model's adapter by name, on every process; all must call it."""
    import jax

    from llama_jax.distributed import fetch
    from llama_jax.model.adapt import is_trained
    from llama_jax.ops.weights import name_of

    trained = is_trained(model)
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    found = {name_of(path): x for path, x in paths if trained(name_of(path))}
    return dict(zip(found, fetch(*found.values()), strict=True))


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
