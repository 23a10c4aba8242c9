"""The tuned table: for a machine and a model the mesh, remat policy, microbatch, kernels and compiler options.

Rows are in `tuned.json`, each with the figures that `scripts/plan.py` printed for it and the versions it used;
`python scripts/plan.py --update-table` measures them again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.config.presets import PRESETS
from llama_jax.costs.estimate import Mode, Workload
from llama_jax.costs.machines import Machine, machine, of_devices
from llama_jax.typing import Fields, JsonObject

FILE = Path(__file__).with_suffix(".json")
# Of an architecture: what a step's size and time depend on.
_SHAPE = ("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "tie_embeddings")


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """One line of the table.

    Attributes:
      machine: its name.
      model: a preset; rows count for every model of its shape.
      mode: of `estimate.Job`, as the following ones.
      batch: sequences in a step.
      seq_len: tokens of a sequence, or slots of the cache.
      mesh: sizes of the mesh axes.
      remat: policy.
      microbatches: parts of the batch.
      attention: implementation and block, such as "splash:1024".
      compiler_options: beyond the defaults.
      figures: what plan.py printed, under the names of its JSON, by the versions in `compiler`.
    """

    machine: str
    model: str
    mode: Mode
    batch: int
    seq_len: int
    mesh: Mapping[str, int]
    remat: str = "full"
    microbatches: int = 1
    attention: str = "auto"
    compiler_options: Fields = dataclasses.field(default_factory=dict)
    figures: Fields = dataclasses.field(default_factory=dict)

    @property
    def job(self) -> Workload:
        """What the row is about."""
        return Workload(
            PRESETS[self.model], machine(self.machine), self.mode, self.batch, self.seq_len, self.mesh, self.remat,
            self.microbatches, self.attention, self.compiler_options,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Sequences of a microbatch on each device that has its own."""
        return self.batch // (self.microbatches * self.mesh.get("data", 1) * self.mesh.get("fsdp", 1))


@functools.cache
def table() -> tuple[TunedEntry, ...]:
    """All rows.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        rows = tuple(TunedEntry(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))
        for row in rows:
            assert row.job.machine.devices == math.prod(row.mesh.values()), row
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{FILE} is damaged ({error!r:.100}): install llama_jax again, or git checkout it") from None
    return rows


def find(config: ModelConfig, on: Machine, mode: Mode, seq_len: int | None) -> TunedEntry | None:
    """The row for a model of this shape on such a machine, made for sequences as long or up to twice as long.

    Args:
      config: the model.
      on: the machine.
      mode: of the step.
      seq_len: of its sequences; None takes the row with the shortest.
    """
    fitting = [
        row
        for row in table()
        if row.mode == mode and _same(PRESETS[row.model], config) and machine(row.machine).cloud_name == on.cloud_name
        and (seq_len is None or row.seq_len / 2 < seq_len <= row.seq_len)
    ]  # fmt: skip
    return min(fitting, key=lambda row: row.seq_len, default=None)


def options(config: ModelConfig, devices: Sequence[Any]) -> JsonObject:
    """Compiler options of decoding on these devices; none for a libtpu that they were not tried with."""
    number, kind = len(devices), devices[0].device_kind
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    here = of_devices(kind, number, slices)
    row = find(config, here, "decode", None) if here else None
    return dict(row.compiler_options) if row and _tried() else {}


def _tried() -> bool:
    """Whether the compiler knows the table's options: libtpu 0.0.42 and 0.0.52 do."""
    try:
        version = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (0, 0, 42) <= version <= (0, 0, 52)


def rows_of(config: ModelConfig, mode: Mode) -> list[TunedEntry]:
    """All rows for models of this shape."""
    return [row for row in table() if row.mode == mode and _same(PRESETS[row.model], config)]


def _same(a: ModelConfig, b: ModelConfig) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in _SHAPE)
