"""LoRA adapters: what one is, and its spelling in PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.config.model import ConfigError, ModelConfig
from llama_jax.config.params import ParamSpec, specs_of
from llama_jax.typing import Fields, JsonObject

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Keys of PEFT's configuration that change the mathematics, and the values with which they change nothing.
_NEUTRAL: Mapping[str, tuple] = {
    "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None), "fan_in_fan_out": (False, None),
    "layer_replication": (None, []), "target_parameters": (None, []), "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}), "exclude_modules": (None, []), "megatron_config": (None,),
    "alora_invocation_tokens": (None, []), "use_qalora": (False, None), "use_bdlora": (False, None, {}),
    "eva_config": (None,), "corda_config": (None,), "loftq_config": (None, {}), "arrow_config": (None,),
}  # fmt: skip
# Ways to begin that also change the base: such an adapter is right on the changed base only.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: to each matrix W that it targets, s B A is added, of rank r.

    Attributes:
      rank: of the two factors; 0 is no adapter, as a recipe without one shows it.
      alpha: s is alpha / rank, or alpha / sqrt(rank) with `rslora`.
      targets: names of matrices as Hugging Face has them, such as "q_proj"; ("all-linear",) is all of a layer.
      rslora: whether s does not fall with the rank's square root.
      dropout: of what goes into A, in training.
      rank_pattern: another rank for the matrices that a name or expression matches, the first that does.
      alpha_pattern: likewise another alpha.
      layers: numbers of the layers that have it; empty is all.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ranks = (self.rank, *self.rank_pattern.values())
        if any(not isinstance(rank, int) or rank < 0 for rank in ranks) or 0 in self.rank_pattern.values():
            raise ConfigError(f"the rank of an adapter must be 1 or more, got {', '.join(map(str, ranks))}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the dropout of an adapter must be from 0 to below 1, got {self.dropout}")
        if len(self.targets) > 1 and not all(re.fullmatch(r"[\w.]+", target) for target in self.targets):
            raise ConfigError("an adapter's targets are names, or one expression alone")
        if len(self.targets) > 1 and "all-linear" in self.targets:
            raise ConfigError("an adapter's target all-linear stands alone: it has all matrices of the layers")
        for expression in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"{expression!r} is not a name, nor an expression ({error})") from None
        if not self.targets:
            raise ConfigError("an adapter needs targets: all-linear, or names such as q_proj and v_proj")

    def rank_of(self, module: str) -> int:
        """The rank at a matrix, by its name "model.layers.0.self_attn.q_proj"."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the two factors is multiplied by there."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def has(self, module: str, layer: int) -> bool:
        """Whether it targets a matrix of a layer."""
        if self.layers and layer not in self.layers:
            return False
        if self.targets == ("all-linear",):
            return True
        if len(self.targets) == 1 and not re.fullmatch(r"[\w.]+", self.targets[0]):
            return re.fullmatch(self.targets[0], module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)

    def modules(self, config: ModelConfig) -> dict[str, tuple[ParamSpec, int]]:
        """The matrices that it targets, by name: spec and layer.

        Raises:
          ConfigError: there is none, or a target names none.
        """
        found = {name: place for name, place in matrices(config) if self.has(name, place[1])}
        unknown = [
            target for target in self.targets
            if re.fullmatch(r"[\w.]+", target) and target != "all-linear"
            and not any(name == target or name.endswith(f".{target}") for name in found)
        ]  # fmt: skip
        if unknown or not found:
            heads = {"lm_head", "embed_tokens"} & set(unknown)
            why = (
                f"{' and '.join(sorted(heads))} cannot be adapted: leave it out, or train the whole model" if heads
                else f"the adapter's targets {', '.join(unknown or self.targets)} are no matrices of this model: take"
                f" all-linear, or of {', '.join(ALL_LINEAR)}"
            )  # fmt: skip
            raise ConfigError(why)
        if self.layers and (outside := [i for i in self.layers if not 0 <= i < config.num_layers]):
            raise ConfigError(f"the adapter is for layers {outside}, and the model has {config.num_layers}")
        return found


def matrices(config: ModelConfig) -> Iterable[tuple[str, tuple[ParamSpec, int]]]:
    """Every matrix of the layers: its name in Hugging Face's files, without ".weight", and its spec and layer."""
    for layer, kind in enumerate(config.layers):
        for spec in specs_of(kind).values():
            if spec.kind == "matrix" and spec.source("hf") is not None:
                yield spec.name("hf", layer).removesuffix(".weight"), (spec, layer)


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def from_peft(content: Fields, where: str) -> Adapter:
    """Returns the adapter of PEFT's configuration.

    Raises:
      ConfigError: it is of another kind, or has a key that changes the mathematics and is not computed here.
    """
    _check_peft(content, where)
    targets, layers = content.get("target_modules"), content.get("layers_to_transform")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ["all-linear"]
    if targets is None:
        targets = ["q_proj", "v_proj"]  # PEFT's own for Llama
    try:
        return Adapter(
            rank=content.get("r", 8),
            alpha=content.get("lora_alpha", 8),
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
            rslora=bool(content.get("use_rslora")),
            dropout=content.get("lora_dropout") or 0.0,
            rank_pattern=content.get("rank_pattern") or {},
            alpha_pattern=content.get("alpha_pattern") or {},
            layers=() if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
        )
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_peft(content: Fields, where: str) -> None:
    """Refuses, by its name, what is not computed here."""
    if content.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type is {content.get('peft_type')!r}, and LORA is what is computed here")
    for key, neutral in _NEUTRAL.items():
        if key in content and content[key] not in neutral:
            raise ConfigError(f"{where}: {key} = {content[key]!r:.80} is not computed: an adapter without it is needed")
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OTHER_BASE):
        raise ConfigError(
            f"{where}: it was made with init_lora_weights={init!r}, which also changes the base: convert it with PEFT"
            " (path_initial_model_for_weight_conversion) to a plain adapter"
        )
    for name in ("r", "lora_alpha"):
        value = content.get(name, 8)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {name} is {value!r}, not a number")
    if content.get("r", 8) == 0:
        raise ConfigError(f"{where}: r is 0: an adapter has a rank of 1 or more")


def to_peft(adapter: Adapter, base: str) -> JsonObject:
    """Returns what PEFT's configuration has of an adapter on a base of that name."""
    targets: str | Sequence[str] = list(ALL_LINEAR) if adapter.targets == ("all-linear",) else list(adapter.targets)
    if len(adapter.targets) == 1 and not re.fullmatch(r"[\w.-]+", adapter.targets[0]):
        targets = adapter.targets[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        "use_rslora": adapter.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "modules_to_save": None,
        "layers_to_transform": list(adapter.layers) or None,
    }
