"""The command `llama-jax bench`, from a clone: see llama_jax/commands/bench.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("bench")
