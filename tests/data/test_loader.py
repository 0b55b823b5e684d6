"""Global batches are equal for every world size and prefetch, can be resumed, and skip no error."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import DataError
from mlx_ring.training.work_split import WorkSplit

MICRO_BATCH_SIZE = 3
NUM_MICRO_BATCHES = 7
GLOBAL_BATCH_SIZE = MICRO_BATCH_SIZE * NUM_MICRO_BATCHES
SAMPLES = 50


@dataclass
class Squares:
    """Sample i is (i, i²). Batches drawn after `fails_after` raise."""

    samples: int = SAMPLES
    fails_after: int | None = None
    drawn: int = 0

    def __len__(self) -> int:
        return self.samples

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.drawn += 1
        if self.fails_after is not None and self.drawn > self.fails_after:
            raise DataError(f"{Path('tokens.bin')} holds the token 300")
        assert threading.current_thread() is not threading.main_thread()
        return indices.astype(np.float32), (indices**2).astype(np.int32)


def make_loader(
    split: Squares | None = None,
    *,
    micro_batches: range | None = None,
    next_sample: int = 0,
    prefetch: int = 2,
) -> Loader:
    return Loader(
        split or Squares(),
        seed=5,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        micro_batches=range(NUM_MICRO_BATCHES) if micro_batches is None else micro_batches,
        next_sample=next_sample,
        prefetch=prefetch,
    )


def batches(loader: Loader, count: int) -> list[GlobalBatch]:
    with loader:
        return list(islice(loader, count))


def plain(batch: GlobalBatch) -> list[tuple[int, list[float], list[int]]]:
    return [(index, inputs.tolist(), targets.tolist()) for index, inputs, targets in batch.micro_batches]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_a_global_batch_does_not_depend_on_the_world_size(world_size: int) -> None:
    split = WorkSplit(NUM_MICRO_BATCHES, world_size, measured=False)
    shares = [
        batches(make_loader(micro_batches=split.micro_batches_of(rank)), 6) for rank in range(world_size)
    ]
    for step, ranks in enumerate(zip(*shares, strict=True)):
        whole = [micro_batch for rank in ranks for micro_batch in plain(rank)]
        order = sample_order(5, step * GLOBAL_BATCH_SIZE + np.arange(GLOBAL_BATCH_SIZE), SAMPLES)
        assert [index for index, _, _ in whole] == list(range(NUM_MICRO_BATCHES))
        assert [sample for _, inputs, _ in whole for sample in inputs] == order.tolist()
        assert [target for _, _, targets in whole for target in targets] == (order**2).tolist()
        assert {rank.first_sample for rank in ranks} == {step * GLOBAL_BATCH_SIZE}


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_a_loader_resumes_at_next_sample(prefetch: int) -> None:
    expected = [plain(batch) for batch in batches(make_loader(), 8)]
    with make_loader(prefetch=prefetch) as loader:
        taken = [plain(next(loader)) for _ in range(3)]
        assert loader.next_sample == 3 * GLOBAL_BATCH_SIZE
        position = loader.next_sample
    taken += [plain(batch) for batch in batches(make_loader(next_sample=position, prefetch=prefetch), 5)]
    assert taken == expected


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_another_share_begins_with_the_next_batch(prefetch: int) -> None:
    """What was prepared for the old share is dropped; no batch is skipped or given twice."""
    whole = [plain(batch) for batch in batches(make_loader(), 6)]
    with make_loader(micro_batches=range(3), prefetch=prefetch) as loader:
        taken = [plain(next(loader)) for _ in range(2)]
        loader.deal(range(2, 7))
        taken += [plain(next(loader)) for _ in range(3)]
        loader.deal(range(6, 7))
        taken.append(plain(next(loader)))
        assert loader.next_sample == 6 * GLOBAL_BATCH_SIZE
    shares = [range(3)] * 2 + [range(2, 7)] * 3 + [range(6, 7)]
    assert taken == [[batch[index] for index in share] for batch, share in zip(whole, shares, strict=True)]


def test_a_resume_may_change_the_batch_size() -> None:
    """The position counts samples, so it means the same for a batch of another size."""
    [batch] = batches(make_loader(next_sample=10), 1)
    drawn = [sample for _, inputs, _ in plain(batch) for sample in inputs]
    assert drawn == sample_order(5, 10 + np.arange(GLOBAL_BATCH_SIZE), SAMPLES).tolist()


def test_no_more_than_prefetch_batches_are_ahead() -> None:
    split = Squares()
    with make_loader(split, prefetch=3) as loader:
        next(loader)
        next(loader)
        loader._ahead[-1].result()  # pyright: ignore[reportPrivateUsage]
        assert split.drawn == (2 + 3) * NUM_MICRO_BATCHES


def test_an_error_of_the_thread_reaches_the_consumer_and_stays() -> None:
    with make_loader(Squares(fails_after=2 * NUM_MICRO_BATCHES)) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with pytest.raises(DataError, match=r"^tokens\.bin holds the token 300$"):
                next(loader)
        assert loader.next_sample == 2 * GLOBAL_BATCH_SIZE


def loader_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name.startswith("data-loader"))


def test_close_joins_the_thread_and_ends_the_iteration() -> None:
    loader = make_loader()
    next(loader)
    assert list(loader_threads())
    loader.close()
    loader.close()
    assert not list(loader_threads())
    with pytest.raises(StopIteration):
        next(loader)


def test_a_data_set_smaller_than_a_global_batch_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"20 training samples.*global batch of 21;.*trainer\.global_batch_size"
    ):
        make_loader(Squares(samples=GLOBAL_BATCH_SIZE - 1))
    assert not list(loader_threads())
    assert len(batches(make_loader(Squares(samples=GLOBAL_BATCH_SIZE)), 2)) == 2
