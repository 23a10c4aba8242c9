"""JAX's compilation cache: programs compiled once are found at the next start."""

from __future__ import annotations

import logging
import os

import jax

from llama_jax.files import cache_folder

log = logging.getLogger("llama_jax")


def use_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR or the program already chose.

    `$LLAMA_JAX_CACHE/xla` by default; a folder or `gs://...` in JAX_COMPILATION_CACHE_DIR works too, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("no compilation cache: %s cannot be written (%s)", folder, error.strerror)
            return
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
