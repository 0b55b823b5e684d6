"""A byte-level BPE tokenizer, trained on the text that it will encode."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_ring.cluster.rank.progress import working
from mlx_ring.data.documents import Document, joined, read_lines
from mlx_ring.errors import ConfigError

TRAINING_BYTES = 1 << 28  # most text that a tokenizer is trained on; it limits memory and time
# The longest token. The trainer cuts longer words into pieces of this size: each merge goes through all of a
# word, so one word of many kilobytes (DNA, base64) would take a minute a megabyte.
LONGEST_TOKEN_BYTES = 128
# Long words are hardly ever equal, and each takes a hundred times its size in the trainer's memory. It sees
# this much of them (1.6 GB), which is enough to learn from.
LONG_WORD = re.compile(r"\w{65,}")
LONG_WORD_CHARACTERS = 1 << 24
BLOCKS_TOGETHER = 64  # blocks of text that the encoder spreads over its threads
END_OF_TEXT = "<|end_of_text|>"


def train_bpe(documents: list[Document], vocabulary_size: int) -> Any:
    """Trains a `tokenizers.Tokenizer` with at most `vocabulary_size` tokens, one of which ends a text.

    Raises: ConfigError if the package tokenizers is missing; DataError as `read_text` does.
    """
    try:
        from tokenizers import Tokenizer as BPETokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer=bpe needs the package tokenizers; pip install 'mlx-ring[text]', or set "
            "data.tokenizer=bytes"
        ) from error
    tokenizer: Any = BPETokenizer(models.BPE())
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(length=LONGEST_TOKEN_BYTES)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN_BYTES,
        show_progress=False,
    )
    size_bytes = sum(document.size_bytes for document in documents)
    every = 1 + size_bytes // TRAINING_BYTES
    pieces = (text for document in documents for text in read_lines(document))
    sample = (text for index, text in enumerate(pieces) if index % every == 0)
    with working("training the tokenizer: text read", total=size_bytes):
        tokenizer.train_from_iterator(_without_most_long_words(sample), trainer)
    tokenizer.pre_tokenizer = words  # the encoder is fast with long words
    return _as_used(tokenizer)


def _without_most_long_words(texts: Iterator[str]) -> Iterator[str]:
    left = LONG_WORD_CHARACTERS
    for text in texts:
        if left <= 0:
            yield LONG_WORD.sub("", text)
        else:
            left -= sum(match.end() - match.start() for match in LONG_WORD.finditer(text))
            yield text


def load_bpe(content: bytes) -> Any:
    """Returns the tokenizer whose file has this content, as `train_bpe` gave it."""
    from tokenizers import Tokenizer as BPETokenizer

    return _as_used(BPETokenizer.from_str(content.decode()))


def _as_used(tokenizer: Any) -> Any:
    # If a text contains the words <|end_of_text|>, they are encoded like any other text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_bpe(tokenizer: Any, documents: list[Document], skip: int = 0) -> Iterator[np.ndarray]:
    """Yields the tokens of the documents, uint32, in blocks, with the end-of-text token between documents.

    Leaves out the first `skip` blocks. Raises: DataError as `read_text` does.
    """
    separator = np.array([tokenizer.token_to_id(END_OF_TEXT)], np.uint32)
    pending: list[str] = []

    def encoded() -> Iterator[np.ndarray]:
        for encoding in tokenizer.encode_batch_fast(pending, add_special_tokens=False):
            yield np.array(encoding.ids, np.uint32)
        pending.clear()

    for text in itertools.islice(joined(documents, read_lines), skip, None):
        if text is None:
            yield from encoded()
            yield separator
        else:
            pending.append(text)
            if len(pending) == BLOCKS_TOGETHER:
                yield from encoded()
    yield from encoded()
