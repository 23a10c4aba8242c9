"""Trains a SentencePiece vocabulary of LLaMA's kind: BPE, digits apart, bytes for what it has not seen."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence

from llama_jax.data.prepare.documents import Reading, read_piece
from llama_jax.data.prepare.pieces import InputSlice

SAMPLE_BYTES = 1 << 28
SMALLEST = 3 + 256 + 1  # <unk>, <s>, </s>, the bytes and one piece more
SHARES = 64  # at least so many pieces make a sample, where there are as many
THREADS = 16  # stands in the model's file: one number everywhere, so that the file is the same everywhere


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a vocabulary. Decoding what it encodes gives the same text, white space included.

    LLaMA's was trained on lines; this one sees whole documents and may join a line's end to what is before it, which
    makes a seventh fewer tokens of Python code.

    Args:
      texts: to train on; the same texts give the same bytes.
      vocab_size: number of tokens: `<unk>` 0, `<s>` 1, `</s>` 2, the bytes 3 to 258, and what is learned.

    Returns:
      The content of a `tokenizer.model`.

    Raises:
      ValueError: the vocabulary is too small, or too large for the texts.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size < SMALLEST:
        raise ValueError(f"a vocabulary needs at least {SMALLEST} tokens, 256 of them bytes, got {vocab_size}")
    model = io.BytesIO()
    counted = _Counted(texts)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if counted.error is not None:
            raise counted.error from None
        raise ValueError(
            f"no vocabulary of {vocab_size} tokens can be learned from {counted.texts} documents ({counted.characters}"
            f" characters): give more text or a smaller vocabulary ({str(error).strip()})"
        ) from error
    return model.getvalue()


def sample_texts(pieces: Sequence[InputSlice], reading: Reading, nbytes: int = SAMPLE_BYTES) -> Iterator[str]:
    """Reads texts to train a tokenizer on: all of them if there are not more than `nbytes` bytes, else a sample.

    A sample takes the beginnings of pieces, in an order that only the pieces' names decide.

    Args:
      pieces: of `find_pieces`.
      reading: how documents are read.
      nbytes: about how much text to read.
    """
    sizes = [piece.nbytes for piece in pieces]
    share = nbytes
    if sum(sizes) > nbytes or any(piece.kind == "hf" for piece in pieces):
        pieces = sorted(pieces, key=lambda piece: hashlib.sha256(f"{piece.name}@{piece.start}".encode()).digest())
        share = max(1, nbytes // min(SHARES, len(pieces)))
    left = nbytes
    for piece in pieces:
        taken = 0
        for document in read_piece(piece, reading):
            if document.text:
                yield document.text
            taken += len(document.text)
            if taken >= min(share, left):
                break
        left -= taken
        if left <= 0:
            return


@dataclasses.dataclass(frozen=True)
class TrainingWork:
    """Trains a tokenizer on pieces: what a worker process does, as the trainer does not listen to Ctrl-C.

    Attributes:
      vocab_size: as of `train_tokenizer`.
      reading: as of `sample_texts`.
      nbytes: as of `sample_texts`.
    """

    vocab_size: int
    reading: Reading
    nbytes: int

    def __call__(self, task: Sequence[InputSlice], advance: Callable[[int], None]) -> bytes:
        """Returns the content of a `tokenizer.model`; `advance` is called with the bytes of text just read."""

        def texts() -> Iterator[str]:
            for text in sample_texts(task, self.reading, self.nbytes):
                yield text
                advance(len(text))

        return train_tokenizer(texts(), self.vocab_size)


class _Counted:
    """Counts the texts that pass, and keeps the error that ends them: the trainer makes another one of it."""

    def __init__(self, texts: Iterable[str]):
        self.texts = self.characters = 0
        self.error: BaseException | None = None
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                self.texts, self.characters = self.texts + 1, self.characters + len(text)
                yield text
        except BaseException as error:
            self.error = error
            raise
