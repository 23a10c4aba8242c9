"""A model ready to run: configuration, weights on the devices, tokenizer. Imports nothing before it is used."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from llama_jax.config import ModelConfig
    from llama_jax.model import Llama
    from llama_jax.text.base import Tokenizer
    from llama_jax.text.chat import ChatFormat
    from llama_jax.weights.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedLlama:
    """A model ready to run; what `load` returns and every function of the package takes.

    Attributes:
      config: the architecture.
      model: the Flax module, its parameters on the devices.
      tokenizer: None where the checkpoint has none.
      mesh: the devices; every function enters it.
      max_seq_len: the largest cache of a call, in tokens; None is up to the configuration's.
      chat_name: the chat format that was asked for; None is the checkpoint's own.
      checkpoint: where it came from; None for a model that was made otherwise.
      adapters: names of the several adapters that a row of a batch can have.
    """

    config: ModelConfig
    model: Llama = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = dataclasses.field(repr=False)
    mesh: jax.sharding.Mesh
    max_seq_len: int | None = None
    chat_name: str | None = None
    checkpoint: Checkpoint | None = dataclasses.field(default=None, repr=False)
    adapters: tuple[str, ...] = ()

    def adapter_number(self, name: str | None) -> int:
        """Returns the number by which the engine knows an adapter; 0 is none.

        Raises:
          ValueError: there is no adapter of that name.
        """
        if name is None:
            return 0
        if name not in self.adapters:
            there = f"there are {', '.join(self.adapters)}" if self.adapters else "load the model with adapters={...}"
            raise ValueError(f"adapter {name!r} is not known: {there}")
        return 1 + self.adapters.index(name)

    @property
    def chat_format(self) -> ChatFormat:
        """How messages become a prompt.

        Raises:
          ValueError: there is no tokenizer, or no chat format is known for it.
        """
        from llama_jax.text.chat import chat_format

        return chat_format(self.require_tokenizer(), self.chat_name)

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
          ValueError: the checkpoint has none.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer: put tokenizer.json or tokenizer.model beside its weights"
            )
        return self.tokenizer
