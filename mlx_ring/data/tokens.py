"""Files of tokens: raw little-endian integers (.bin), and a JSON side-car beside that says what they are."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ring.data.dataset import Dataset, DataSpec
from mlx_ring.errors import DataError

FORMAT_VERSION = 1
SAMPLES, SAMPLE_BYTES = 64, 2**16  # of a token file, read at every start
WHOLE_BYTES = 64 * 2**20  # files up to this size are read whole instead
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SideCar:
    """What a token file holds; the fields without a default are those that every side-car must have."""

    format_version: int
    dtype: str  # uint8, uint16 or uint32
    vocabulary_size: int
    tokens: int
    sha256: str  # of the .bin file, hex
    vocabulary_sha256: str | None = None  # of the tokenizer's file
    bytes: int | None = None  # of the text, a separator of documents counted as one
    tokenizer: str | None = None
    source: str | None = None  # a description for people

    @property
    def size_bytes(self) -> int:
        """What the .bin file's size must be."""
        return self.tokens * DTYPES[self.dtype].itemsize

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "SideCar":
        """Raises: DataError naming the file and what is wrong with it."""
        required = {field.name: field.type for field in fields(SideCar) if field.default is MISSING}
        if not path.is_file():
            raise DataError(f"{path} is missing; it must be a JSON object that holds {', '.join(required)}")
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON: {error}") from error
        for name, kind in required.items():
            value: Any = values.get(name) if isinstance(values, dict) else None
            if type(value) is not kind or not value or (kind is int and value < 0):
                what = "a whole number above 0" if kind is int else "a text"
                raise DataError(f"{path}: {name} must be {what}; got {value!r}")
        if values["format_version"] > FORMAT_VERSION:
            version = values["format_version"]
            raise DataError(
                f"{path} has format_version {version}, newer than {FORMAT_VERSION}; update mlx_ring"
            )
        if values["dtype"] not in DTYPES:
            raise DataError(f"{path}: dtype must be one of {', '.join(DTYPES)}; got {values['dtype']!r}")
        known = {field.name for field in fields(SideCar)}
        return SideCar(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Non-overlapping windows of a run of tokens, each with its targets one token further.

    Only whole windows are given, or, with `partial`, also a last one whose missing targets are −1.
    """

    tokens: np.ndarray  # memory-mapped: a batch reads its own windows and no more
    sequence_length: int
    vocabulary_size: int
    path: Path
    partial: bool

    def __len__(self) -> int:
        targets = len(self.tokens) - 1
        return -(-targets // self.sequence_length) if self.partial else targets // self.sequence_length

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their successors, both int32 (B, sequence_length).

        Raises: DataError naming a token outside the vocabulary, and the file.
        """
        last = len(self.tokens) - 1
        positions = indices[:, np.newaxis] * self.sequence_length + np.arange(self.sequence_length + 1)
        windows = self.tokens[np.minimum(positions, last)]
        _check(windows, self.vocabulary_size, self.path)
        windows = windows.astype(np.int32)
        targets = windows[:, 1:]
        if self.partial:
            targets = np.where(positions[:, 1:] <= last, targets, np.int32(-1))
        return windows[:, :-1], targets


def find_tokens(path: Path) -> dict[str, Path]:
    """The .bin file, its side-car, and its tokenizer where there is one.

    Raises: DataError naming the file that is missing.
    """
    if not path.is_file():
        raise DataError(
            f"data.path={path} is not a file; give a .bin file of tokens with its .json beside it"
        )
    files = {"tokens": path, "side_car": path.with_suffix(".json")}
    SideCar.read(files["side_car"])
    tokenizer = path.with_suffix(".tokenizer.json")
    return files | ({"tokenizer": tokenizer} if tokenizer.is_file() else {})


def open_tokens(files: dict[str, Path], *, sequence_length: int, held_out_fraction: float) -> Dataset:
    """Windows of a token file, whose last part is held out. The file is mapped, not read.

    Raises: DataError when the file does not fit its side-car or is shorter than a window.
    """
    path, side_car = files["tokens"], SideCar.read(files["side_car"])
    size_bytes = path.stat().st_size
    if size_bytes != side_car.size_bytes:
        raise DataError(
            f"{path} holds {size_bytes} bytes, but {files['side_car']} tells of {side_car.tokens} tokens of "
            f"{side_car.dtype} ({side_car.size_bytes} bytes); make the pair again"
        )
    _check_whole(path, side_car)
    held_out = round(side_car.tokens * held_out_fraction)
    first_held_out = side_car.tokens - held_out
    if first_held_out <= sequence_length or held_out < 2:
        raise DataError(
            f"{path} holds {first_held_out} tokens to train on (a window takes {sequence_length + 1}) and "
            f"{held_out} held out (2 at least); give more text, or set data.sequence_length or "
            "data.held_out_fraction"
        )
    tokens = np.asarray(np.memmap(path, DTYPES[side_car.dtype], "r"))
    train, evaluation = (
        TokenWindows(
            tokens=part,
            sequence_length=sequence_length,
            vocabulary_size=side_car.vocabulary_size,
            path=path,
            partial=partial,
        )
        for part, partial in ((tokens[:first_held_out], False), (tokens[first_held_out:], True))
    )
    cut = (sequence_length, first_held_out, side_car.vocabulary_size)
    content = (
        side_car.sha256,
        size_bytes,
        side_car.dtype,
        side_car.vocabulary_sha256,
        _sampled(path, size_bytes),
    )
    return Dataset(
        spec=DataSpec(kind="language", input_shape=(sequence_length,), num_classes=side_car.vocabulary_size),
        digest=hashlib.sha256(repr((content, cut)).encode()).hexdigest(),
        train=train,
        held_out=evaluation,
        bytes_per_target=_bytes_per_target(files, side_car, first_held_out + 1),
    )


def _check_whole(path: Path, side_car: SideCar) -> None:
    """Compare a small file with its side-car: it takes a moment. Of a large one only samples are read.

    Raises: DataError where they differ.
    """
    if side_car.size_bytes > WHOLE_BYTES:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != side_car.sha256:
        raise DataError(
            f"{path} has SHA-256 {digest[:12]}…, its side-car says {side_car.sha256[:12]}…; delete both and "
            "make them again"
        )


def _sampled(path: Path, size_bytes: int) -> str:
    """SHA-256 of pieces all over the file: the side-car's own may be of another one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size_bytes - SAMPLE_BYTES), num=SAMPLES, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _check(tokens: np.ndarray, vocabulary_size: int, path: Path) -> None:
    if (largest := int(tokens.max())) >= vocabulary_size:
        raise DataError(
            f"{path} holds the token {largest}, but its vocabulary has {vocabulary_size}; make the file again"
        )


def _bytes_per_target(files: dict[str, Path], side_car: SideCar, first_target: int) -> float | None:
    """The mean length of the tokens from `first_target` on; None where their tokenizer is not at hand."""
    if side_car.tokenizer == "bytes":
        return 1.0
    if side_car.tokenizer != "bpe" or "tokenizer" not in files:
        return None
    try:
        tokenizer: Any = json.loads(files["tokenizer"].read_text(encoding="utf-8"))
        # A byte-level token is written with one character a byte; a special one counts as one byte.
        lengths = np.ones(side_car.vocabulary_size, np.int64)
        for token, index in tokenizer["model"]["vocab"].items():
            lengths[index] = len(token)
        lengths[[token["id"] for token in tokenizer["added_tokens"]]] = 1
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{files['tokenizer']} does not fit {files['side_car']}: {error}") from error
    dtype, total = DTYPES[side_car.dtype], 0
    # Read, not mapped: pages of a mapping would stay in the process's resident memory.
    with files["tokens"].open("rb") as file:
        file.seek(first_target * dtype.itemsize)
        while (block := np.fromfile(file, dtype, BLOCK_TOKENS)).size:
            _check(block, side_car.vocabulary_size, files["tokens"])
            total += int(lengths[block].sum())
    return total / (side_car.tokens - first_target)
