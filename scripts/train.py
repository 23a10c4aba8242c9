"""The command `llama-jax train`, from a clone: see llama_jax/commands/train.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("train")
