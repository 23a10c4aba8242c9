"""Eight simulated CPU devices for every test; `make_mesh(config)` without sizes takes one of them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where an accelerator, or only its compiler, is installed

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device
