"""Makes digits.safetensors, byte for byte, from scikit-learn's copy of the UCI optical digits.

Run by hand: `pip install scikit-learn`, then `python mlx_ring/data/assets/make_digits.py`. The package itself
needs only the file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

ASSETS = Path(__file__).parent


def main() -> None:
    """Writes the images (uint8, 0 to 16), their labels, and which are held out: every fifth of each class."""
    source: Any = load_digits()
    labels = source.target.astype(np.uint8)
    held_out = np.zeros(len(labels), np.bool_)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[4::5]] = True
    arrays = {"images": source.images.astype(np.uint8), "labels": labels, "held_out": held_out}
    (ASSETS / "digits.safetensors").write_bytes(save(arrays))


if __name__ == "__main__":
    main()
