"""What a checkpoint holds: all of a run's state, or, where a kind of run saves less, what it chose."""

import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from mlx_ring.checkpoint.manager import CheckpointManager, parameters_sha256
from mlx_ring.checkpoint.restore import Found, fill
from mlx_ring.checkpoint.saved_state import SavedState
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.errors import CheckpointError
from mlx_ring.run_directory import checkpoint_files
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.strategies import build_strategy

CONFIG = compose_run("run.dir=run", "communicator=native")
COMMUNICATOR = Communicator.alone()
AUTHORITY = ParameterAuthority(
    COMMUNICATOR, total_steps=1, verify_every_steps=None, evaluate_every_steps=None, save_every_steps=None,
    save_every_seconds=None,
)  # fmt: skip


class TrainedAlone(SavedState):
    """Of a run that saves no more than what it trains."""

    def saved_parameters(self) -> Arrays:
        return dict(tree_flatten(self._model.trainable_parameters()))


def built(kind: type[SavedState], *, seed: int, frozen: float = 1.0) -> SavedState:
    """A model of two layers, the first frozen with all its weights at one value."""
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.layers[0].weight = mx.full((4, 3), frozen)
    model.layers[0].bias = mx.full((4,), frozen)
    model.layers[0].freeze()
    optimizer = AdamW(0.1)
    optimizer.init(model.trainable_parameters())
    strategy = build_strategy(
        "all_reduce", communicator=COMMUNICATOR, codec="native", num_micro_batches=1,
        parameters=dict(tree_flatten(model.trainable_parameters())),
        clip_gradient_norm=None, compile=False,
    )  # fmt: skip
    return kind(model, optimizer, strategy)


def saved(folder: Path, state: SavedState) -> Found:
    manager = CheckpointManager(folder, keep_last=1, keep_best=0)
    fields = {"progress": {"step": 3, "next_sample": 6}, "data_sha256": "d"}
    manager.save(3, state.arrays(), fields, since=time.perf_counter())
    (ended,) = manager.wait()
    manager.close()
    assert ended.error is None, ended.error
    return Found(path=ended.path, manifest=checkpoint_files.verify(ended.path), problems=[], own=True)


@pytest.mark.parametrize(("kind", "held"), [(SavedState, 4), (TrainedAlone, 2)])
def test_a_model_with_frozen_parameters_comes_back(tmp_path: Path, kind: type[SavedState], held: int) -> None:
    before = built(kind, seed=1)
    digest = parameters_sha256(before.parameters())
    found = saved(tmp_path, before)
    assert found.manifest["parameters_sha256"] == digest, "it is of all parameters, saved or not"
    assert len(load_file(found.path / "model.safetensors")) == held
    after = built(kind, seed=2)
    assert parameters_sha256(after.parameters()) != digest
    progress = fill(CONFIG, COMMUNICATOR, AUTHORITY, found, "d", after)
    assert (progress.step, progress.next_sample) == (3, 6)
    assert parameters_sha256(after.parameters()) == digest


def test_parameters_that_were_not_saved_must_be_the_same(tmp_path: Path) -> None:
    found = saved(tmp_path, built(TrainedAlone, seed=1))
    other = built(TrainedAlone, seed=2, frozen=0.5)
    with pytest.raises(CheckpointError, match=r"without 2 of the model's parameters \(layers\.0\.bias, …\)"):
        fill(CONFIG, COMMUNICATOR, AUTHORITY, found, "d", other)
    # What holds more than that is of a model that saves more.
    with pytest.raises(CheckpointError, match=r"model\.safetensors lacks layers\.0"):
        fill(CONFIG, COMMUNICATOR, AUTHORITY, found, "d", built(SavedState, seed=2))
