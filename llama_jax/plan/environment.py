"""What the compilers of machines that are not there read from the environment; needs no JAX."""

from __future__ import annotations

import os


def prepare() -> None:
    """Sets what the compilers read from the environment; call it before JAX is imported.

    Nothing runs here but on the CPU, and libtpu would ask Google's metadata server where it is, and complain.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_WORKER_ID", "0"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
