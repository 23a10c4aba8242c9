"""The command `llama-jax doctor`, from a clone: see llama_jax/commands/doctor.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("doctor")
