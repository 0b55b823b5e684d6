"""Opens the data of every `data=` choice, in two steps: find or make the files, then open them.

The steps are separate because the files may come from another host: rank 0 prepares them, and other hosts
may receive them.
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
from mlx_ring.config.rules import expand_home
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
    """Finds the files that hold the data on this host. Text is turned into tokens first.

    Args:
        config: the data group of the configuration.

    Returns: the files by what they hold, such as "tokens" and "side_car"; empty for data that needs none.

    Raises:
        DataError: the data is missing or damaged.
        ConfigError: tokens cannot be made, or the cache cannot be written.
    """
    match config:
        case TextData():
            return prepare_text(config)
        case TokensData():
            return find_tokens(expand_home("data.path", config.path))
        case FashionMNISTData():
            return find_fashion_mnist(config.path)
        case _:
            return {}


def open_dataset(
    config: BundledData, *, kind: str, seed: int, sequence_length: int | None, files: dict[str, Path]
) -> Dataset:
    """Opens the data for a model.

    Args:
        config: the data group of the configuration.
        kind: what the model reads: "classifier" or "language".
        seed: the run's seed; synthetic samples are computed from it.
        sequence_length: tokens in a sample, for a language model.
        files: what `prepare` returned on this host, or the same files received from another one.

    Raises:
        ConfigError: the data does not fit the model, or the user's own function cannot be called.
        DataError: a file is damaged (the message names it), or a sample of the user's own data does not have
            the shape and dtype that its `DataSpec` promises.
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
    """Returns the message for data of one kind and a model of another."""
    return f"{data} is of kind {gives}, but the model is of kind {kind}; {REMEDIES[gives]}"


def _open_custom(config: CustomData, kind: str) -> Dataset:
    """Calls the user's own function and checks what it returns."""
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
    """Raises: DataError unless a sample of each split has the shapes and dtypes that its spec promises."""
    language = dataset.spec.kind == "language"
    input_shape = (1, *dataset.spec.input_shape)
    target_shape = input_shape if language else (1,)
    input_dtypes = ("int32",) if language else ("float32",)
    target_dtypes = ("int32",) if language else ("int32", "float32")
    for split in (dataset.train, dataset.held_out):
        if not len(split):
            raise DataError(f"{key} gave a split without samples; training and evaluation need one at least")
        inputs, targets = split.batch(np.arange(1))
        for what, array, shape, allowed in (
            ("inputs", inputs, input_shape, input_dtypes),
            ("targets", targets, target_shape, target_dtypes),
        ):
            if array.shape != shape or array.dtype not in allowed:
                raise DataError(
                    f"{key} gave {what} of shape {array.shape} and type {array.dtype} for one sample; its "
                    f"specification asks for {shape} and {' or '.join(allowed)}"
                )
