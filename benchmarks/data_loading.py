"""Measures how fast a loader reads tokens from a file, and how soon a resumed run has its first batch.

A global batch holds 64 sequences in micro-batches of 8. One rank loads all of them and does nothing else.
"""

import hashlib
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from harness import parse, run

from mlx_ring.config.choices import TokensData
from mlx_ring.data.dataset import Dataset
from mlx_ring.data.loader import Loader
from mlx_ring.data.sources import open_dataset, prepare
from mlx_ring.data.tokens import FORMAT_VERSION, SideCar

SEQUENCE_LENGTHS = (128, 512, 1024)
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 64, 8
VOCABULARY_SIZE = 50_257
GOALS = {"tokens_per_second": (">=", 5_000_000), "cold_start_seconds": ("<=", 0.020)}


def write_tokens(path: Path, tokens: int) -> None:
    """Writes a file of random tokens, and its side-car."""
    array = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, tokens, np.uint16)
    array.tofile(path)
    side_car = SideCar(
        format_version=FORMAT_VERSION,
        dtype="uint16",
        vocabulary_size=VOCABULARY_SIZE,
        tokens=tokens,
        sha256=hashlib.sha256(array.tobytes()).hexdigest(),
    )
    side_car.write(path.with_suffix(".json"))


def open_tokens(path: Path, sequence_length: int) -> Dataset:
    """Opens the file as a data set."""
    config = TokensData(
        name="tokens",
        prefetch=4,
        path=str(path),
        sequence_length=sequence_length,
        held_out_fraction=0.05,
        distribute=False,
        cache_dir=str(path.parent),
    )
    return open_dataset(
        config, kind="language", seed=0, sequence_length=sequence_length, files=prepare(config)
    )


def make_loader(dataset: Dataset, next_sample: int) -> Loader:
    """Returns a loader of all micro-batches of every global batch, as one rank has it."""
    return Loader(
        dataset.checked().train,  # a run reads it with these checks
        seed=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        micro_batches=range(GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE),
        next_sample=next_sample,
        prefetch=4,
    )


def tokens_per_second(dataset: Dataset, seconds: float) -> float:
    """Returns the median rate of five measurements of about `seconds` each."""
    tokens_per_batch = GLOBAL_BATCH_SIZE * dataset.spec.input_shape[0]
    rates: list[float] = []
    with make_loader(dataset, 0) as loader:
        for _ in islice(loader, 10):
            pass
        for _ in range(5):
            start = time.perf_counter()
            batches = 0
            while time.perf_counter() - start < seconds:
                next(loader)
                batches += 1
            rates.append(batches * tokens_per_batch / (time.perf_counter() - start))
    return median(rates)


def cold_start_seconds(dataset: Dataset, repeats: int) -> float:
    """Returns the median seconds from opening a loader to its first batch, at random positions of epoch 3."""
    times: list[float] = []
    for position in np.random.default_rng(1).integers(0, len(dataset.train), repeats):
        start = time.perf_counter()
        with make_loader(dataset, 3 * len(dataset.train) + int(position)) as loader:
            next(loader)
            times.append(time.perf_counter() - start)
    return median(times)


def measure(quick: bool) -> dict[str, float]:
    """Measures each sequence length. The goals are for the slowest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        write_tokens(path, 20_000_000 if quick else 500_000_000)
        datasets = {length: open_tokens(path, length) for length in SEQUENCE_LENGTHS}
        rates = {
            f"tokens_per_second_{length}": tokens_per_second(dataset, 0.3 if quick else 2)
            for length, dataset in datasets.items()
        }
        starts = [cold_start_seconds(dataset, 21 if quick else 101) for dataset in datasets.values()]
        return rates | {"tokens_per_second": min(rates.values()), "cold_start_seconds": max(starts)}


if __name__ == "__main__":
    run(parse("data_loading"), measure, GOALS)
