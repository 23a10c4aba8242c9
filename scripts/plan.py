"""The command `llama-jax plan`, from a clone: see llama_jax/commands/plan.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("plan")
