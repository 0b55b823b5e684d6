"""Files of tokens: raw little-endian integers (.bin), with a JSON side-car that describes them."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ring.data.dataset import Dataset, DataSpec
from mlx_ring.errors import DataError

FORMAT_VERSION = 1
PIECES = 64  # parts of a large token file that are read at every start
PIECE_BYTES = 2**16
WHOLE_BYTES = 64 * 2**20  # files up to this size are read whole instead
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BLOCK_TOKENS = 1 << 20  # tokens that are read at once to measure their length


@dataclass(frozen=True, kw_only=True)
class SideCar:
    """Describes a token file. A side-car must have the fields that have no default here."""

    format_version: int
    dtype: str  # uint8, uint16 or uint32
    vocabulary_size: int
    tokens: int
    sha256: str  # (hex) of the .bin file
    vocabulary_sha256: str | None = None  # (hex) of the tokenizer's file
    bytes: int | None = None  # size of the text; a separator between documents counts as one
    tokenizer: str | None = None
    source: str | None = None  # a description for people

    @property
    def size_bytes(self) -> int:
        """The size that the .bin file must have."""
        return self.tokens * DTYPES[self.dtype].itemsize

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "SideCar":
        """Reads and checks a side-car. Raises: DataError, with the file and what is wrong with it."""
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
    """Cuts tokens into windows that do not overlap. The targets of a window are its tokens moved by one.

    Gives whole windows only or, if `partial`, also a last shorter one, whose missing targets are −1.
    """

    tokens: np.ndarray  # (N,), memory-mapped: a batch reads its own windows and no more
    sequence_length: int
    vocabulary_size: int
    path: Path
    partial: bool

    def __len__(self) -> int:
        targets = len(self.tokens) - 1
        return -(-targets // self.sequence_length) if self.partial else targets // self.sequence_length

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and the tokens after them, both int32 (B, sequence_length).

        Raises: DataError, with the file, for a token outside the vocabulary.
        """
        last = len(self.tokens) - 1
        positions = indices[:, np.newaxis] * self.sequence_length + np.arange(self.sequence_length + 1)
        windows = self.tokens[np.minimum(positions, last)]
        _refuse_unknown_tokens(windows, self.vocabulary_size, self.path)
        windows = windows.astype(np.int32)
        targets = windows[:, 1:]
        if self.partial:
            targets = np.where(positions[:, 1:] <= last, targets, np.int32(-1))
        return windows[:, :-1], targets


def find_tokens(path: Path) -> dict[str, Path]:
    """Returns the .bin file ("tokens"), its side-car ("side_car") and its "tokenizer", if it has one.

    Raises: DataError, with the file's name, if one is missing or the side-car is damaged.
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
    """Opens a token file as windows, with the last part held out. Maps the file instead of reading it.

    Args:
        files: what `find_tokens` or `prepare_text` returned.
        sequence_length: tokens in a window.
        held_out_fraction: the part of the tokens to hold out, between 0 and 1.

    Raises: DataError if the file does not fit its side-car, or is too short for a window.
    """
    path = files["tokens"]
    side_car = SideCar.read(files["side_car"])
    size_bytes = path.stat().st_size
    _check_size(files, size_bytes, side_car)
    _check_small_file(path, side_car)
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
        _pieces_sha256(path, size_bytes),
    )
    return Dataset(
        spec=DataSpec(kind="language", input_shape=(sequence_length,), num_classes=side_car.vocabulary_size),
        digest=hashlib.sha256(repr((content, cut)).encode()).hexdigest(),
        train=train,
        held_out=evaluation,
        bytes_per_target=_bytes_per_target(files, side_car, first_held_out + 1),
    )


def _check_size(files: dict[str, Path], size_bytes: int, side_car: SideCar) -> None:
    """Raises: DataError unless the file is as large as its side-car says."""
    if size_bytes != side_car.size_bytes:
        raise DataError(
            f"{files['tokens']} holds {size_bytes} bytes, but {files['side_car']} describes "
            f"{side_car.tokens} tokens of {side_car.dtype} ({side_car.size_bytes} bytes); make the pair again"
        )


def _check_small_file(path: Path, side_car: SideCar) -> None:
    """Compares a file of up to WHOLE_BYTES with the hash in its side-car; a larger one would take too long.

    Raises: DataError if they differ.
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


def _pieces_sha256(path: Path, size_bytes: int) -> str:
    """Returns the SHA-256 (hex) of pieces all over the file: its side-car may belong to another file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size_bytes - PIECE_BYTES), num=PIECES, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _refuse_unknown_tokens(tokens: np.ndarray, vocabulary_size: int, path: Path) -> None:
    """Raises: DataError for a token outside the vocabulary."""
    if (largest := int(tokens.max())) >= vocabulary_size:
        raise DataError(
            f"{path} holds the token {largest}, but its vocabulary has {vocabulary_size}; make the file again"
        )


def _bytes_per_target(files: dict[str, Path], side_car: SideCar, first_target: int) -> float | None:
    """Returns the mean length in bytes of the tokens from `first_target` on; None without their tokenizer."""
    if side_car.tokenizer == "bytes":
        return 1.0
    if side_car.tokenizer != "bpe" or "tokenizer" not in files:
        return None
    try:
        tokenizer: Any = json.loads(files["tokenizer"].read_text(encoding="utf-8"))
        # A byte-level token is spelled with one character a byte; a special token counts as one byte.
        lengths = np.ones(side_car.vocabulary_size, np.int64)
        for token, index in tokenizer["model"]["vocab"].items():
            lengths[index] = len(token)
        lengths[[token["id"] for token in tokenizer["added_tokens"]]] = 1
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{files['tokenizer']} does not fit {files['side_car']}: {error}") from error
    dtype = DTYPES[side_car.dtype]
    total = 0
    # Read, not mapped: the pages of a mapping would stay in this process's memory.
    with files["tokens"].open("rb") as file:
        file.seek(first_target * dtype.itemsize)
        while (block := np.fromfile(file, dtype, BLOCK_TOKENS)).size:
            _refuse_unknown_tokens(block, side_car.vocabulary_size, files["tokens"])
            total += int(lengths[block].sum())
    return total / (side_car.tokens - first_target)
