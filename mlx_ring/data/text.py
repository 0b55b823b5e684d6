"""Turns UTF-8 text into a file of tokens in the cache, once, with a limited amount of memory.

The name in the cache is made from the contents of the files and the tokenizer's settings: a changed text has
another name, and the same text gives the same tokens on every host. A preparation that is killed leaves what
it has finished, with a journal of it, and the next one goes on from there.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from mlx_ring.cluster.rank.effort import OwnSigns
from mlx_ring.cluster.rank.progress import working
from mlx_ring.config.choices import TextData, Tokenizer
from mlx_ring.config.rules import expand_home
from mlx_ring.data.bpe import (
    LONG_WORD_CHARACTERS,
    LONGEST_TOKEN_BYTES,
    TRAINING_BYTES,
    encode_bpe,
    load_bpe,
    train_bpe,
)
from mlx_ring.data.documents import BLOCK_BYTES, HASHED_BYTES, Document, find_documents, joined, read_text
from mlx_ring.data.tokens import DTYPES, FORMAT_VERSION, SideCar
from mlx_ring.errors import ConfigError, DataError
from mlx_ring.run_directory.whole_file import whole_file

JOURNAL = "journal.json"
JOURNAL_SECONDS = 5.0  # of encoding that a killed preparation loses at most
SIGNS = "signs.json"
LOOK_SECONDS = 1.0  # between two looks at how far a preparation is


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What is finished in the folder of a preparation. It is written after the files that it speaks of."""

    vocabulary_sha256: str  # (hex) of the tokenizer's file
    blocks: int = 0  # of the text, encoded
    tokens: int = 0
    sha256: str = ""  # (hex) of these tokens, at the start of the file of tokens

    def write(self, folder: Path) -> None:
        with whole_file(folder / JOURNAL) as new:
            new.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> "Journal | None":
        """Returns: None if there is none, or it cannot be read."""
        try:
            return Journal(**json.loads((folder / JOURNAL).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


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
        with _locked(path):
            if not _is_complete(files):
                _prepare(config, documents, files)
    except OSError as error:
        raise ConfigError(
            f"the tokens cannot be kept in {cache}: {error}; set data.cache_dir or MLX_RING_CACHE"
        ) from error
    return files


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Lets one process at a time prepare these tokens. Those that wait tell how far that process is."""
    lock = FileLock(path.with_suffix(".lock"))
    with working("waiting for another process that prepares this text", computes=False) as waiting:
        while not lock.is_locked:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=LOOK_SECONDS)
                break
            with contextlib.suppress(OSError, ValueError):
                waiting.signs, words = json.loads((path.with_suffix(".preparing") / SIGNS).read_bytes())
                if words:
                    waiting.name = f"another process prepares this text: {words}"
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _shown(folder: Path) -> Generator[None]:
    """Shows in a file how far this process is, and that it is at work, to those that wait for it."""
    over = threading.Event()

    def show() -> None:
        signs = OwnSigns()
        while not over.wait(LOOK_SECONDS):
            before = signs.count
            signs.look()
            if signs.count != before:
                with contextlib.suppress(OSError), whole_file(folder / SIGNS) as new:
                    new.write_text(json.dumps([signs.count, signs.words]))

    thread = threading.Thread(target=show, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _cache_key(config: TextData, documents: list[Document]) -> str:
    """Returns a digest of everything that the tokens depend on."""
    settings = (FORMAT_VERSION, config.tokenizer.name)
    if config.tokenizer is Tokenizer["bpe"]:
        settings += (
            config.vocabulary_size,
            BLOCK_BYTES,
            TRAINING_BYTES,
            LONGEST_TOKEN_BYTES,
            LONG_WORD_CHARACTERS,
        )
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
    """Makes the files in a folder of their own and moves them to their places, the side-car last.

    The folder may hold what a killed process has finished; we hold the lock. After an error nothing is kept.
    """
    folder = files["tokens"].with_suffix(".preparing")
    folder.mkdir(exist_ok=True)
    try:
        made = {name: folder / path.name for name, path in files.items()}
        with _shown(folder):
            _write_tokens(config, documents, made)
        for name in ("tokenizer", "tokens", "side_car"):
            if name in made:
                with made[name].open("rb") as file:
                    os.fsync(file.fileno())
                made[name].replace(files[name])
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _write_tokens(config: TextData, documents: list[Document], files: dict[str, Path]) -> None:
    """Encodes the documents and writes the tokens, their side-car and, for bpe, the tokenizer."""
    journal = Journal.read(files["tokens"].parent)
    tokenizer = None
    vocabulary = bytes(range(256))
    vocabulary_size = 256
    if config.tokenizer is Tokenizer["bpe"]:
        tokenizer, vocabulary = _tokenizer(config, documents, files["tokenizer"], journal)
        vocabulary_size = tokenizer.get_vocab_size()
    dtype = next(name for name, dtype in DTYPES.items() if vocabulary_size <= 1 << (8 * dtype.itemsize))
    vocabulary_sha256 = hashlib.sha256(vocabulary).hexdigest()
    if journal is None or journal.vocabulary_sha256 != vocabulary_sha256:
        journal = Journal(vocabulary_sha256=vocabulary_sha256)
        journal.write(files["tokens"].parent)
    size_bytes = sum(document.size_bytes for document in documents)
    with (
        working("encoding text", total=size_bytes),
        _Encoded(files["tokens"], DTYPES[dtype], journal) as encoded,
    ):
        skip = encoded.journal.blocks
        blocks = (
            _byte_blocks(documents, skip) if tokenizer is None else encode_bpe(tokenizer, documents, skip)
        )
        for block in blocks:
            encoded.append(block)
        journal = encoded.now()
    SideCar(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocabulary_size=vocabulary_size,
        tokens=journal.tokens,
        sha256=journal.sha256,
        vocabulary_sha256=vocabulary_sha256,
        bytes=size_bytes + len(documents) - 1,
        tokenizer=config.tokenizer.name,
        source=f"{len(documents)} files of {Path(config.path).name}",
    ).write(files["side_car"])


def _tokenizer(
    config: TextData, documents: list[Document], path: Path, journal: Journal | None
) -> tuple[Any, bytes]:
    """Returns the tokenizer and its file's content. Trains it unless a killed process has finished that."""
    if journal is not None and path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == journal.vocabulary_sha256:
            return load_bpe(content), content
    tokenizer = train_bpe(documents, config.vocabulary_size)
    content = tokenizer.to_str(pretty=True).encode()
    path.write_bytes(content)
    return tokenizer, content


class _Encoded:
    """A file of tokens that grows, and its journal. Goes on after the tokens that the journal speaks of."""

    def __init__(self, path: Path, dtype: np.dtype, journal: Journal) -> None:
        self._dtype = dtype
        self._folder = path.parent
        path.touch()
        self._file = path.open("r+b")
        self._sha256 = hashlib.sha256()
        kept = journal.tokens * dtype.itemsize
        while rest := kept - self._file.tell():
            if not (block := self._file.read(min(rest, HASHED_BYTES))):
                break
            self._sha256.update(block)
        if journal.blocks and self._sha256.hexdigest() != journal.sha256:
            self._sha256 = hashlib.sha256()
            journal = Journal(vocabulary_sha256=journal.vocabulary_sha256)
        self._file.truncate(self._file.seek(journal.tokens * dtype.itemsize))
        self.journal = journal
        self._blocks = journal.blocks
        self._tokens = journal.tokens
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, block: np.ndarray) -> None:
        """Writes a block's tokens, and the journal from time to time."""
        data = block.astype(self._dtype).tobytes()
        self._sha256.update(data)
        self._file.write(data)
        self._blocks += 1
        self._tokens += len(block)
        if time.monotonic() - self._written > JOURNAL_SECONDS:
            self._file.flush()
            self.now().write(self._folder)
            self._written = time.monotonic()

    def now(self) -> Journal:
        """Returns what is finished."""
        return replace(
            self.journal, blocks=self._blocks, tokens=self._tokens, sha256=self._sha256.hexdigest()
        )


def _byte_blocks(documents: list[Document], skip: int) -> Iterator[np.ndarray]:
    """Yields the bytes of the text, uint8, with a NUL between documents; no text contains a NUL.

    Leaves out the first `skip` blocks.
    """
    for text in itertools.islice(joined(documents, read_text), skip, None):
        yield np.frombuffer(b"\0" if text is None else text.encode(), np.uint8)
