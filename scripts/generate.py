"""The command `llama-jax generate`, from a clone: see llama_jax/commands/generate.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("generate")
