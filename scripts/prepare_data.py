"""The command `llama-jax prepare-data`, from a clone: see llama_jax/commands/prepare_data.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("prepare-data")
