"""A run's own files: an error of the system names the file and what to do."""

from __future__ import annotations

import resource

import pytest

from llama_jax.train.report import Reporter


def test_a_limit_on_the_size_of_files(tmp_path):
    values = {"step": 1, "loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0}
    reporter = Reporter(tmp_path, main=True, total_steps=9, step=0, tensorboard=False, wandb="", recipe={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl: is larger than a file may be here \(`ulimit -f`\): raise"):
            reporter.step(values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reporter.close()
