"""Every source of data by its configuration, in two steps: find or make its files, then open them.

The steps are apart because the files may come from another host: rank 0 prepares, others may receive.
"""

from pathlib import Path

import numpy as np

from mlx_ring.config import import_path
from mlx_ring.config.choices import (
    BundledData,
    CustomData,
    FashionMNISTData,
    SyntheticData,
    TextData,
    TokensData,
)
from mlx_ring.data.dataset import Dataset, DataSpec, Split
from mlx_ring.data.images import find_fashion_mnist, open_digits, open_fashion_mnist
from mlx_ring.data.synthetic import open_synthetic
from mlx_ring.data.text import prepare_text
from mlx_ring.data.tokens import find_tokens, open_tokens
from mlx_ring.errors import ConfigError, DataError

__all__ = ["DataSpec", "Dataset", "Split", "open_dataset", "prepare"]

KINDS = {"digits": "classifier", "fashion_mnist": "classifier", "text": "language", "tokens": "language"}
REMEDIES = {
    "classifier": "choose model=mlp or model=cnn, or another data set such as data=text",
    "language": "choose model=transformer, or another data set such as data=digits",
}


def prepare(config: BundledData) -> dict[str, Path]:
    """The local files that hold the data, by name; text is turned into tokens first. {} where there are none.

    Raises: DataError when the data is absent or damaged; ConfigError when it cannot be prepared.
    """
    match config:
        case TextData():
            return prepare_text(config)
        case TokensData():
            return find_tokens(Path(config.path).expanduser())
        case FashionMNISTData():
            return find_fashion_mnist(config.path)
        case _:
            return {}


def open_dataset(
    config: BundledData, *, kind: str, seed: int, sequence_length: int | None, files: dict[str, Path]
) -> Dataset:
    """Open the data for a model of this `kind` ("classifier" or "language").

    `files` is what `prepare` returned, here or on another host. `sequence_length` is in tokens.

    Raises: ConfigError when data and model do not fit; DataError naming the file when it is damaged.
    """
    if (gives := KINDS.get(config.name, kind)) != kind:
        raise ConfigError(_misfit(f"data={config.name}", gives, kind))
    if isinstance(config, CustomData):
        return _open_custom(config, kind)
    if kind == "language" and sequence_length is None:
        raise ConfigError(
            "data.sequence_length is null and the model has no maximum; set data.sequence_length"
        )
    match config:
        case TokensData():
            assert sequence_length is not None
            fraction = config.held_out_fraction
            return open_tokens(files, sequence_length=sequence_length, held_out_fraction=fraction)
        case FashionMNISTData():
            return open_fashion_mnist(files)
        case SyntheticData():
            length = sequence_length if kind == "language" else None
            return open_synthetic(config, seed=seed, sequence_length=length)
        case _:
            return open_digits()


def _misfit(data: str, gives: str, kind: str) -> str:
    return f"{data} is of kind {gives}, but the model is of kind {kind}; {REMEDIES[gives]}"


def _open_custom(config: CustomData, kind: str) -> Dataset:
    key = f"data.import_path={config.import_path}"
    dataset = import_path.call("data", config.import_path, config.arguments or {})
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"{key} returned a {type(dataset).__name__}; it must return a mlx_ring.data.sources.Dataset"
        )
    if dataset.spec.kind != kind:
        raise ConfigError(_misfit(key, dataset.spec.kind, kind))
    _check_sample(key, dataset)
    return dataset


def _check_sample(key: str, dataset: Dataset) -> None:
    """One sample of each split must have the shapes and types that the specification promises."""
    language = dataset.spec.kind == "language"
    shapes = ((1, *dataset.spec.input_shape), (1, *dataset.spec.input_shape) if language else (1,))
    dtypes = (("int32",) if language else ("float32",), ("int32",) if language else ("int32", "float32"))
    for split in (dataset.train, dataset.held_out):
        if not len(split):
            raise DataError(f"{key} gave a split without samples; training and evaluation need one at least")
        for what, array, shape, allowed in zip(
            ("inputs", "targets"), split.batch(np.arange(1)), shapes, dtypes, strict=True
        ):
            if array.shape != shape or array.dtype not in allowed:
                raise DataError(
                    f"{key} gave {what} of shape {array.shape} and type {array.dtype} for one sample; its "
                    f"specification asks for {shape} and {' or '.join(allowed)}"
                )
