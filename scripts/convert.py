"""The command `llama-jax convert`, from a clone: see llama_jax/commands/convert.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("convert")
