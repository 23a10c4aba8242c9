"""Machines and what their data sheets say: from names such as v5p-128 and 8xh100 to chips, topology and rates."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; rates and sizes are of one JAX device, which is a chip but on TPU 7x half of one.

    Attributes:
      name: as in machine names.
      kinds: what `jax.Device.device_kind` begins with.
      flops: dense bfloat16 FLOP/s, from the data sheet.
      bandwidth: of its memory, bytes/s, from the data sheet.
      link: bytes/s that it can receive over all its links at once, from the data sheet.
      memory: bytes on the device.
      available: of these, what a program may use: the limit that the TPU's compiler states when a program is too large
        (libtpu 0.0.42); of a GPU the memory itself, of which XLA takes a fraction.
      host: bytes of the host's memory for each device, of Cloud's usual machine; 0 where it depends on who built it.
      dimensions: of the torus that TPUs are linked in; 0 for GPUs.
      per_chip: JAX devices in a chip.
      counts_cores: whether the number in a Cloud name counts TensorCores, two a chip.
      network: bytes/s for each device between slices or machines; of GPUs the usual 400 Gbit/s each; 0 where it is not
        known.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    bandwidth: float
    link: float
    memory: int
    available: int
    host: int = 0
    dimensions: int = 0
    per_chip: int = 1
    counts_cores: bool = False
    network: float = 0.0

    @property
    def platform(self) -> str:
        """ "tpu" or "cuda", as JAX's compilers are called."""
        return "tpu" if self.dimensions else "cuda"


# The memory of GPUs is what their driver reports, a little less than the name says.
_CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 1228e9, 300e9, 32 * GIB, int(30.75 * GIB), 100 * 10**9, 3, counts_cores=True),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 200e9, 16 * GIB, int(15.75 * GIB), 48 * 10**9, 2),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 2765e9, 600e9, 95 * GIB, int(95.74 * GIB), 112 * 10**9, 3,
         counts_cores=True, network=6.25e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1640e9, 448e9, 32 * GIB, int(31.24 * GIB), 180 * 10**9, 2,
         network=12.5e9),
    Chip("7x", ("TPU7x", "TPU v7x"), 2307e12 / 2, 7370e9 / 2, 300e9, 96 * GIB, int(94.75 * GIB), 120 * 10**9, 3,
         per_chip=2, counts_cores=True, network=6.25e9),
    Chip("a100", ("NVIDIA A100",), 312e12, 2039e9, 300e9, 85_100_068_864, 85_100_068_864, network=50e9),
    Chip("h100", ("NVIDIA H100",), 989e12, 3352e9, 450e9, 84_978_434_048, 84_978_434_048, network=50e9),
    Chip("h100pcie", ("NVIDIA H100 PCIe",), 756e12, 2039e9, 64e9, 84_942_979_072, 84_942_979_072, network=50e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 4800e9, 450e9, 151_397_597_184, 151_397_597_184, network=50e9),
    Chip("b200", ("NVIDIA B200",), 2250e12, 8000e9, 900e9, 191_514_411_008, 191_514_411_008, network=50e9),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in _CHIPS}
_ALIASES = {
    "v5litepod": "v5e",
    "v5": "v5p",
    "v5lite": "v5e",
    "v6": "v6e",
    "v7x": "7x",
    "tpu7x": "7x",
    "v6litepod": "v6e",
}

# Chips of a slice, and the shapes that Cloud offers: two dimensions by table, three by the rule of `_cube`.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a program runs on.

    Attributes:
      name: as it was asked for.
      chip: its kind.
      topology: of a slice of TPUs, in chips, such as "4x4x4"; of GPUs how many there are in one machine.
      slices: of TPUs, linked by the data centre's network; of GPUs, machines.
    """

    name: str
    chip: Chip
    topology: str
    slices: int = 1

    @property
    def devices(self) -> int:
        """JAX devices in all."""
        return self.slices * self.devices_per_slice

    @property
    def devices_per_slice(self) -> int:
        """JAX devices that are linked closely."""
        return math.prod(map(int, self.topology.split("x"))) * self.chip.per_chip

    @property
    def cloud_name(self) -> str:
        """As on Cloud TPU, such as "v5p-128" or "2xv6e-256"; "8xh100" for GPUs."""
        number = self.devices_per_slice // self.chip.per_chip
        if self.chip.platform == "cuda":
            name = self.chip.name if number == 1 else f"{number}x{self.chip.name}"
        else:
            usual = _FLAT.get(number, "") if self.chip.dimensions == 2 else _cube(number)
            number *= 2 if self.chip.counts_cores else 1
            name = f"{_CLOUD.get(self.chip.name, self.chip.name)}-{number}"
            if self.topology != usual:  # which Cloud calls by its topology
                name = f"{self.chip.name}:{self.topology}"
        return name if self.slices == 1 else f"{self.slices}x{name}"


_CLOUD = {"v5e": "v5litepod", "7x": "tpu7x"}


def machine(name: str) -> Machine:
    """The machine of a name: v5p-128, v5litepod-16, v5e:4x4, 2xv6e-256, tpu7x-128, h100, 8xh100, 4x8xh100.

    A kind alone, such as v5e or 7x, is one host of it.
    v4-N, v5p-N and tpu7x-N count TensorCores, two a chip, as Cloud does; v5litepod-N and v6e-N count chips.

    Raises:
      ValueError: there is no such machine; the message has the nearest names.
    """
    text, name = name.strip().lower(), name[:40]
    if len(text) > 40:
        raise _unknown(name)
    if (chip := CHIPS.get(_ALIASES.get(text, text))) and chip.dimensions:  # its usual host
        return Machine(name, chip, "2x4" if chip.dimensions == 2 else "2x2x1")
    if match := re.fullmatch(r"(?:(\d+)x)?(v?[a-z0-9]+)[-:](\d+(?:x\d+)*)", text):
        slices, kind, size = match.groups()
        chip = CHIPS.get(_ALIASES.get(kind, kind))
        if chip and chip.dimensions:
            shape = size if "x" in size else _shape(chip, int(size), name)
            return Machine(name, chip, _checked(chip, shape, name), _count(slices, name))
    elif match := re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([a-z]+\d+[a-z]*)", text):
        machines, number, kind = match.groups()
        if machines and not number:
            machines, number = None, machines
        if (chip := CHIPS.get(kind)) and not chip.dimensions:
            if (gpus := _count(number, name)) > 16:
                raise ValueError(f"machine {name!r}: a machine has up to 16 GPUs; 4x8{kind} is four with 8 each")
            return Machine(name, chip, str(gpus), _count(machines, name))
    raise _unknown(name)


def names() -> list[str]:
    """Some machines of each kind, to choose from."""
    found = []
    for chip in _CHIPS:
        if not chip.dimensions:
            found += [chip.name, f"8x{chip.name}"]
        elif chip.dimensions == 2:
            found += [f"{_CLOUD.get(chip.name, chip.name)}-{n}" for n in _FLAT] + [
                f"{chip.name}:{s}" for s in _FLAT.values()
            ]
        else:
            found += [f"{_CLOUD.get(chip.name, chip.name)}-{8 << i}" for i in range(9)]
    return found


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, by the longest of `kinds` that fits; None for others, such as a CPU."""
    fitting = [(len(kind), chip) for chip in _CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _shape(chip: Chip, number: int, name: str) -> str:
    if chip.dimensions == 2:
        if number not in _FLAT:
            sizes = ", ".join(map(str, _FLAT))
            raise ValueError(f"machine {name!r}: a {chip.name} slice has {sizes} chips")
        return _FLAT[number]
    chips, odd = divmod(number, 2)
    if odd or not 4 <= chips <= 8192 or chips & (chips - 1):
        raise ValueError(
            f"machine {name!r}: the number counts TensorCores, two a chip: 8, 16, 32, ... 16384; other shapes by their"
            f" topology, such as {chip.name}:4x4x8"
        )
    return _cube(chips)


def _cube(chips: int) -> str:
    """The shape nearest to a cube, as 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 ..."""
    if chips == 4:
        return "2x2x1"
    sides, i = [2, 2, 2], 2
    while math.prod(sides) < chips:
        sides[i] *= 2
        i = (i - 1) % 3
    return "x".join(map(str, sides))


def _checked(chip: Chip, shape: str, name: str) -> str:
    sides = shape.split("x")
    if len(sides) != chip.dimensions:
        example = "4x4" if chip.dimensions == 2 else "4x4x4"
        raise ValueError(f"machine {name!r}: a topology of {chip.name} has {chip.dimensions} sides, such as {example}")
    if chip.dimensions == 2 and shape not in _FLAT.values():
        raise ValueError(f"machine {name!r}: the topologies of {chip.name} are {', '.join(_FLAT.values())}")
    if chip.dimensions == 3 and any(len(side) > 2 or (int(side) not in (1, 2) and int(side) % 4) for side in sides):
        raise ValueError(
            f"machine {name!r}: the sides of a topology of {chip.name} are 1, 2, or 4, 8, 12, ... up to 96"
        )
    return shape


def _count(text: str | None, name: str) -> int:
    if text is None:
        return 1
    if not 1 <= len(text) <= 3 or int(text) < 1:
        raise ValueError(f"machine {name!r}: {text[:9]} is no number of machines or GPUs, from 1 to 999")
    return int(text)


def _unknown(name: str) -> ValueError:
    near = difflib.get_close_matches(name.lower(), names(), n=4, cutoff=0.5) or ["v5litepod-16", "v5p-128", "8xh100"]
    return ValueError(
        f"machine {name!r} is not known; the nearest names are {', '.join(near)}. Names: v4-N, v5litepod-N, v5p-N,"
        " v6e-N, tpu7x-N as on Cloud TPU, v5e:4x4 by topology, 2xv6e-256 for two slices, and a100, h100, h200, b200 or"
        " 8xh100"
    )


def of_devices(kind: str, devices: int, slices: int = 1) -> Machine | None:
    """The machine of so many JAX devices of a `device_kind`; None where there is no such one (a CPU, odd numbers)."""
    chip = chip_of(kind)
    if re.search(r" MIG |-40GB| NVL", kind):  # memory of another size
        return None
    if chip is None or devices % (slices * chip.per_chip):
        return None
    number = devices // slices // chip.per_chip
    if not chip.dimensions:
        return Machine(f"{number}x{chip.name}", chip, str(number), slices)
    known = number in _FLAT if chip.dimensions == 2 else number >= 4 and not number & (number - 1)
    if not known:
        return None
    found = Machine("", chip, _FLAT[number] if chip.dimensions == 2 else _cube(number), slices)
    return dataclasses.replace(found, name=found.cloud_name)


def sizes_of(chip: Chip) -> list[Machine]:
    """Machines of one kind, the smallest first."""
    if not chip.dimensions:
        return [machine(f"{n}x{chip.name}") for n in (1, 2, 4, 8, "2x8", "4x8", "8x8", "16x8")]
    shapes = list(_FLAT.values()) if chip.dimensions == 2 else [_cube(4 << i) for i in range(11)]
    return [Machine(f"{chip.name}:{shape}", chip, shape) for shape in shapes]


def available_bytes(machine: Machine) -> int:
    """What a program may use of a device: of a GPU the share that XLA takes.

    Raises:
      ValueError: XLA_PYTHON_CLIENT_MEM_FRACTION is no such share.
    """
    if machine.chip.platform == "tpu":
        return machine.chip.available
    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0
    if not 0 < fraction <= 1:
        raise ValueError(f"XLA_PYTHON_CLIENT_MEM_FRACTION must be above 0 and at most 1, got {text!r}")
    return int(machine.chip.available * fraction)
