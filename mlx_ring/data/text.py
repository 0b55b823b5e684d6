"""Text to tokens, once: UTF-8 files become a token file in the cache, in bounded memory.

The name in the cache comes from the contents of the files and the tokenizer's settings: a changed text has
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
from mlx_ring.data.bpe import TRAINING_BYTES, encode_bpe, train_bpe
from mlx_ring.data.documents import BLOCK_BYTES, Document, find_documents, read_text
from mlx_ring.data.tokens import DTYPES, FORMAT_VERSION, SideCar
from mlx_ring.errors import ConfigError, DataError


def prepare_text(config: TextData) -> dict[str, Path]:
    """The token files of the text at `data.path`, made under a lock unless the cache has them.

    Raises: DataError when there is no text, or a file is not UTF-8 text; ConfigError when the tokenizer's
    package is missing or the cache cannot be written.
    """
    documents = find_documents(config)
    cache = Path(config.cache_dir).expanduser()
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
    settings = (FORMAT_VERSION, config.tokenizer.name)
    if config.tokenizer is Tokenizer["bpe"]:
        settings += (config.vocabulary_size, BLOCK_BYTES, TRAINING_BYTES)
    key = hashlib.sha256(repr(settings).encode())
    for document in documents:
        key.update(document.sha256.encode())
    return key.hexdigest()[:24]


def _is_complete(files: dict[str, Path]) -> bool:
    """Whether the cache has the files, whole. They are put there one by one, so each is looked for."""
    try:
        side_car = SideCar.read(files["side_car"])
    except DataError:
        return False
    present = all(path.is_file() for path in files.values())
    return present and files["tokens"].stat().st_size == side_car.size_bytes


def _prepare(config: TextData, documents: list[Document], files: dict[str, Path]) -> None:
    """Make the files in a folder of their own and move them into place, the side-car last."""
    folder = files["tokens"].with_suffix(".preparing")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left; the lock is ours
    folder.mkdir()
    try:
        made = {name: folder / path.name for name, path in files.items()}
        _make(config, documents, made)
        for name in ("tokenizer", "tokens", "side_car"):
            if name in made:
                with made[name].open("rb") as file:
                    os.fsync(file.fileno())
                made[name].replace(files[name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(config: TextData, documents: list[Document], files: dict[str, Path]) -> None:
    if config.tokenizer is Tokenizer["bytes"]:
        vocabulary_size, vocabulary = 256, bytes(range(256))
        blocks = _byte_blocks(documents)
    else:
        tokenizer = train_bpe(documents, config.vocabulary_size)
        vocabulary_size, vocabulary = tokenizer.get_vocab_size(), tokenizer.to_str(pretty=True).encode()
        files["tokenizer"].write_bytes(vocabulary)
        blocks = encode_bpe(tokenizer, documents)
    dtype = next(name for name, dtype in DTYPES.items() if vocabulary_size <= 1 << (8 * dtype.itemsize))
    sha256, tokens = hashlib.sha256(), 0
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
    """The text's own bytes, with a NUL, which no text holds, between documents."""
    for index, document in enumerate(documents):
        if index:
            yield np.zeros(1, np.uint8)
        for text in read_text(document):
            yield np.frombuffer(text.encode(), np.uint8)
