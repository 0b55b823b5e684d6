"""Turns UTF-8 text into a file of tokens in the cache, once, with a limited amount of memory.

The name in the cache is made from the contents of the files and the tokenizer's settings: a changed text has
another name, and the same text gives the same tokens on every host.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from mlx_ring.config.choices import TextData, Tokenizer
from mlx_ring.config.rules import expand_home
from mlx_ring.data.bpe import TRAINING_BYTES, encode_bpe, train_bpe
from mlx_ring.data.documents import BLOCK_BYTES, Document, find_documents, read_text
from mlx_ring.data.tokens import DTYPES, FORMAT_VERSION, SideCar
from mlx_ring.errors import ConfigError, DataError


def prepare_text(config: TextData) -> dict[str, Path]:
    """Returns the token files of the text at `data.path`. Makes them under a lock unless the cache has them.

    Returns: the paths of "tokens", "side_car" and, for bpe, "tokenizer".

    Raises: DataError if there is no text, or a file is not UTF-8 text; ConfigError if the tokenizer's package
    is missing or the cache cannot be written.
    """
    documents = find_documents(config)
    cache = expand_home("data.cache_dir", config.cache_dir)
    path = cache / f"text-{config.tokenizer.name}-{_cache_key(config, documents)}.bin"
    files = {"tokens": path, "side_car": path.with_suffix(".json")}
    if config.tokenizer is Tokenizer["bpe"]:
        files["tokenizer"] = path.with_suffix(".tokenizer.json")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _is_complete(files):
                _prepare(config, documents, files)
    except OSError as error:
        raise ConfigError(
            f"the tokens cannot be kept in {cache}: {error}; set data.cache_dir or MLX_RING_CACHE"
        ) from error
    return files


def _cache_key(config: TextData, documents: list[Document]) -> str:
    """Returns a digest of everything that the tokens depend on."""
    settings = (FORMAT_VERSION, config.tokenizer.name)
    if config.tokenizer is Tokenizer["bpe"]:
        settings += (config.vocabulary_size, BLOCK_BYTES, TRAINING_BYTES)
    key = hashlib.sha256(repr(settings).encode())
    for document in documents:
        key.update(document.sha256.encode())
    return key.hexdigest()[:24]


def _is_complete(files: dict[str, Path]) -> bool:
    """Tells whether the cache has every file. They are moved there one by one, so some may be missing."""
    try:
        side_car = SideCar.read(files["side_car"])
    except DataError:
        return False
    present = all(path.is_file() for path in files.values())
    return present and files["tokens"].stat().st_size == side_car.size_bytes


def _prepare(config: TextData, documents: list[Document], files: dict[str, Path]) -> None:
    """Makes the files in a folder of their own and moves them to their places, the side-car last."""
    folder = files["tokens"].with_suffix(".preparing")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed; we hold the lock
    folder.mkdir()
    try:
        made = {name: folder / path.name for name, path in files.items()}
        _write_tokens(config, documents, made)
        for name in ("tokenizer", "tokens", "side_car"):
            if name in made:
                with made[name].open("rb") as file:
                    os.fsync(file.fileno())
                made[name].replace(files[name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_tokens(config: TextData, documents: list[Document], files: dict[str, Path]) -> None:
    """Encodes the documents and writes the tokens, their side-car and, for bpe, the tokenizer."""
    if config.tokenizer is Tokenizer["bytes"]:
        vocabulary_size = 256
        vocabulary = bytes(range(256))
        blocks = _byte_blocks(documents)
    else:
        tokenizer = train_bpe(documents, config.vocabulary_size)
        vocabulary_size = tokenizer.get_vocab_size()
        vocabulary = tokenizer.to_str(pretty=True).encode()
        files["tokenizer"].write_bytes(vocabulary)
        blocks = encode_bpe(tokenizer, documents)
    dtype = next(name for name, dtype in DTYPES.items() if vocabulary_size <= 1 << (8 * dtype.itemsize))
    sha256 = hashlib.sha256()
    tokens = 0
    with files["tokens"].open("wb") as file:
        for block in blocks:
            data = block.astype(DTYPES[dtype]).tobytes()
            sha256.update(data)
            file.write(data)
            tokens += len(block)
    SideCar(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocabulary_size=vocabulary_size,
        tokens=tokens,
        sha256=sha256.hexdigest(),
        vocabulary_sha256=hashlib.sha256(vocabulary).hexdigest(),
        bytes=sum(document.size_bytes for document in documents) + len(documents) - 1,
        tokenizer=config.tokenizer.name,
        source=f"{len(documents)} files of {Path(config.path).name}",
    ).write(files["side_car"])


def _byte_blocks(documents: list[Document]) -> Iterator[np.ndarray]:
    """Yields the bytes of the text, uint8, with a NUL between documents; no text contains a NUL."""
    for index, document in enumerate(documents):
        if index:
            yield np.zeros(1, np.uint8)
        for text in read_text(document):
            yield np.frombuffer(text.encode(), np.uint8)
