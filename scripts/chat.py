"""The command `llama-jax chat`, from a clone: see llama_jax/commands/chat.py."""

from llama_jax.commands import run_script

if __name__ == "__main__":
    run_script("chat")
