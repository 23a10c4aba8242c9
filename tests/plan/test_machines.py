"""Names of machines, as Cloud TPU, topologies and people write them; rates of the data sheets."""

from __future__ import annotations

import pytest

from llama_jax.costs import machines
from llama_jax.costs.machines import machine

# Name: chip, topology, slices, JAX devices.
NAMES = {
    "v4-8": ("v4", "2x2x1", 1, 4),
    "v4-16": ("v4", "2x2x2", 1, 8),
    "v5litepod-1": ("v5e", "1x1", 1, 1),
    "v5litepod-16": ("v5e", "4x4", 1, 16),
    "v5litepod-128": ("v5e", "8x16", 1, 128),
    "v5e:4x8": ("v5e", "4x8", 1, 32),
    "v5e": ("v5e", "2x4", 1, 8),
    "v5p-8": ("v5p", "2x2x1", 1, 4),
    "v5p-128": ("v5p", "4x4x4", 1, 64),
    "v5p-256": ("v5p", "4x4x8", 1, 128),
    "v5p-1024": ("v5p", "8x8x8", 1, 512),
    "v6e-256": ("v6e", "16x16", 1, 256),
    "2xv6e-256": ("v6e", "16x16", 2, 512),
    "4xv5p:2x2x2": ("v5p", "2x2x2", 4, 32),
    "tpu7x-128": ("7x", "4x4x4", 1, 128),  # two devices a chip
    "7x": ("7x", "2x2x1", 1, 8),
    "h100": ("h100", "1", 1, 1),
    "8xh100": ("h100", "8", 1, 8),
    "4x8xb200": ("b200", "8", 4, 32),
    "A100": ("a100", "1", 1, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name(name):
    found = machine(name)
    assert (found.chip.name, found.topology, found.slices, found.devices) == NAMES[name]
    again = machine(found.cloud_name)  # as Cloud writes it
    assert (again.chip, again.topology, again.slices) == (found.chip, found.topology, found.slices)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5p-1288", "counts TensorCores.*8, 16, 32"),
        ("v5p-7", "counts TensorCores"),
        ("v5litepod-17", "a v5e slice has 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5e:4x4x4", "a topology of v5e has 2 sides, such as 4x4"),
        ("v7p-128", "nearest names are v5p-128"),
        ("h10", "nearest names are h100"),
        ("", "nearest names"),
        ("0xh100", "0 is no number of machines"),
        ("v5p-99999999999999999999", "counts TensorCores"),
        ("../../etc", "is not known"),
    ],
)
def test_a_name_that_is_none(name, words):
    with pytest.raises(ValueError, match=words):
        machine(name)


def test_where_a_program_runs():
    """`device_kind` as JAX reports it."""
    kinds = {
        ("TPU v5 lite", 16): "v5litepod-16", ("TPU v5", 64): "v5p-128", ("TPU v6 lite", 8): "v6e-8",
        ("TPU v4", 4): "v4-8", ("TPU7x", 8): "tpu7x-8", ("NVIDIA H100 80GB HBM3", 8): "8xh100",
        ("NVIDIA A100-SXM4-80GB", 1): "a100",
    }  # fmt: skip
    for (kind, number), name in kinds.items():
        found = machines.of_devices(kind, number)
        assert found
        assert found.cloud_name == name
    assert machines.of_devices("cpu", 8) is None
    assert machines.of_devices("TPU v5 lite", 3) is None
    two = machines.of_devices("TPU v6 lite", 512, slices=2)
    assert two
    assert two.cloud_name == "2xv6e-256"
