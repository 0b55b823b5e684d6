"""Two data sets of labelled images: the digits in the package, and Fashion-MNIST from its IDX files."""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mlx_ring.config.rules import expand_home
from mlx_ring.data.dataset import Dataset, DataSpec
from mlx_ring.errors import DataError

DIGITS = Path(__file__).parent / "assets" / "digits.safetensors"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "held_out_images": "t10k-images-idx3-ubyte",
    "held_out_labels": "t10k-labels-idx1-ubyte",
}
NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images with their labels. A batch holds (pixel − mean) / deviation."""

    images: np.ndarray  # uint8 (N, height, width)
    labels: np.ndarray  # uint8 (N,)
    mean: float  # of the pixels
    deviation: float  # of the pixels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images, float32 (B, height, width, 1), and labels, int32 (B,)."""
        pixels = self.images[indices][..., np.newaxis].astype(np.float32)
        scaled = (pixels - np.float32(self.mean)) / np.float32(self.deviation)
        return scaled, self.labels[indices].astype(np.int32)


def open_digits() -> Dataset:
    """Opens the 1,797 optical digits of 8 × 8 pixels; a fifth of each class is held out."""
    arrays = load_file(DIGITS)
    images = arrays["images"]
    labels = arrays["labels"]
    held_out = arrays["held_out"]
    return _dataset(
        LabelledImages(images=images[~held_out], labels=labels[~held_out], mean=8, deviation=8),
        LabelledImages(images=images[held_out], labels=labels[held_out], mean=8, deviation=8),
    )


def find_fashion_mnist(path: str | None) -> dict[str, Path]:
    """Finds the four IDX files (plain or .gz) in the folder `path`, or in that of the Debian package.

    Raises: DataError, with the folder and the remedies, if one is missing.
    """
    folder = expand_home("data.path", path) if path else DEBIAN_FOLDER
    found: dict[str, Path] = {}
    for key, name in IDX_FILES.items():
        candidates = [folder / name, folder / f"{name}.gz"]
        existing = [candidate for candidate in candidates if candidate.is_file()]
        if not existing:
            raise DataError(
                f"Fashion-MNIST is not in {folder}: no {name} or {name}.gz; install the Debian package "
                "dataset-fashion-mnist, or give the folder of the four IDX files as data.path=FOLDER"
            )
        found[key] = existing[0]
    return found


def open_fashion_mnist(files: dict[str, Path]) -> Dataset:
    """Opens Fashion-MNIST, or any set of images in ten classes that is stored in the same files.

    Raises: DataError, with the file's name, if one is damaged.
    """
    arrays = {key: _read_idx(files[key], 3 if key.endswith("images") else 1) for key in IDX_FILES}
    splits: list[LabelledImages] = []
    for split in ("train", "held_out"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        path = files[f"{split}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise DataError(f"{path} holds labels of shape {labels.shape} for images of shape {images.shape}")
        if labels.max() >= NUM_CLASSES:
            raise DataError(f"{path} holds the label {labels.max()}; the classes are 0 to {NUM_CLASSES - 1}")
        # Fashion-MNIST's training pixels have the mean 0.2860 and the deviation 0.3530, in parts of 255.
        splits.append(LabelledImages(images=images, labels=labels, mean=72.94, deviation=90.02))
    train, held_out = splits
    if train.images.shape[1:] != held_out.images.shape[1:]:
        shapes = f"{train.images.shape[1:]} to train on and {held_out.images.shape[1:]} held out"
        raise DataError(f"{files['held_out_images']} holds images of another size: {shapes}")
    return _dataset(train, held_out)


def _dataset(train: LabelledImages, held_out: LabelledImages) -> Dataset:
    """Puts two splits together and computes their digest."""
    digest = hashlib.sha256()
    for array in (train.images, train.labels, held_out.images, held_out.labels):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    height, width = train.images.shape[1:]
    spec = DataSpec(kind="classifier", input_shape=(height, width, 1), num_classes=NUM_CLASSES)
    return Dataset(spec=spec, digest=digest.hexdigest(), train=train, held_out=held_out)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file: 00 00, 08 for uint8, the number of dimensions, each as a big-endian int32, the data.

    Returns: uint8, with this many dimensions. Raises: DataError if the file is damaged.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get the file again") from error
    magic = content[:4].hex()
    expected = f"000008{dimensions:02x}"
    if magic != expected:
        raise DataError(
            f"{path} starts with {magic or 'nothing'}, but must start with {expected}; get the file again"
        )
    header_bytes = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header_bytes, 4))
    expected_bytes = header_bytes + int(np.prod(shape, dtype=object))
    if len(content) != expected_bytes:
        raise DataError(
            f"{path} holds {len(content)} bytes, but its header of shape {shape} needs {expected_bytes}; "
            "get the file again"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)
