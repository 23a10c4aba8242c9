"""The command `llama-jax verify`, from a clone: see llama_jax/commands/verify.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("verify")
