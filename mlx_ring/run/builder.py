"""Builds the parts of a run in the same way on every rank, then gives every rank rank 0's weights."""

import socket
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from mlx_ring.checkpoint.restore import Found, fill
from mlx_ring.checkpoint.saved_state import SavedState
from mlx_ring.cluster.rank.progress import working
from mlx_ring.communication.agreement import agree, parameter_shapes, sha256_of
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.run_config import RunConfig
from mlx_ring.data.dataset import DataSpec
from mlx_ring.data.loader import Loader
from mlx_ring.data.manager import DataManager
from mlx_ring.errors import ConfigError, MlxRingError
from mlx_ring.models import build_model
from mlx_ring.models.losses import build_loss
from mlx_ring.models.precision import build_forward
from mlx_ring.models.requirements import check_outputs, check_parameters
from mlx_ring.training import memory_manager
from mlx_ring.training.evaluator import Evaluator
from mlx_ring.training.exact import start_check
from mlx_ring.training.exact.reproducible import make_reproducible
from mlx_ring.training.gradient import MicroBatchGradient
from mlx_ring.training.optimizers import build_optimizer, is_hidden_matrix
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.schedules import build_schedule
from mlx_ring.training.state import TrainingState
from mlx_ring.training.strategies import Strategy, build_strategy
from mlx_ring.training.trainer import LoopSettings, Progress, Trainer, Work
from mlx_ring.training.work_split import WorkSplit


@dataclass
class Run:
    """The parts of one run on one rank."""

    model: nn.Module
    optimizer: Optimizer
    strategy: Strategy
    authority: ParameterAuthority
    data: DataManager
    evaluator: Evaluator
    trained: Trainer | None  # None if the run only evaluates
    first_gradient: str | None  # in exact mode: a digest of the first micro-batch's gradient here

    @property
    def trainer(self) -> Trainer:
        """The trainer. Only a run that trains has one."""
        assert self.trained is not None
        return self.trained

    def verify_replicas(self) -> str | None:
        """Checks that all ranks hold equal weights. Collective: every rank must call.

        Returns: a digest of the weights; None if the strategy lets ranks differ.
        Raises: TrainingError if ranks that should hold equal weights do not.
        """
        if not self.strategy.replicas_agree:
            return None
        return self.authority.verify(self.state.parameters(), self.trainer.progress.step)

    @property
    def state(self) -> SavedState:
        """The parts of the run that a checkpoint saves."""
        return SavedState(self.model, self.optimizer, self.strategy)


def build(config: RunConfig, communicator: Communicator, found: Found | None) -> Run:
    """Builds the parts, checks that the ranks agree, and restores `found`. Collective: every rank must call.

    Args:
        config: the same on every rank.
        communicator: joins the ranks.
        found: on rank 0, the checkpoint to continue from; None on other ranks, and for a new run.

    Raises:
        ConfigError, DataError: a part cannot be built; every rank raises the same error.
        ClusterError: the ranks differ in data, in parameter shapes or, in exact mode, in a gradient's bits.
        CheckpointError: the checkpoint does not fit this run.
    """
    data, model, optimizer = _build_parts(config, communicator)
    authority = _authority(config, communicator)
    agree(communicator, _own_identity(data, model))
    strategy = _strategy(config, communicator, model)
    forward = build_forward(model, getattr(mx, config.trainer.compute_dtype.name))
    loss = build_loss(config.trainer.loss)
    compiled = config.trainer.compile
    gradient = MicroBatchGradient(model, forward=forward, loss=loss, seed=config.seed, compile=compiled)
    first = _first_gradient(config, communicator, data, gradient)
    state = SavedState(model, optimizer, strategy)
    progress = fill(config, communicator, authority, found, data.dataset.digest, state)
    strategy.setup(model, optimizer)
    evaluator = Evaluator(
        model,
        data.dataset,
        communicator,
        forward=forward,
        loss=loss,
        micro_batch_size=config.evaluation.micro_batch_size or config.trainer.micro_batch_size,
        compile=compiled,
    )
    trainer = None
    if not config.evaluation.only:
        split = _work_split(config, communicator)
        loader = _loader(config, data, split.micro_batches_of(communicator.rank), progress)
        with working("reading the first batch"):
            loader.wait_for_first()
        trainer = Trainer(
            TrainingState(model, optimizer, strategy),
            Work(gradient=gradient, loader=loader, split=split),
            communicator,
            authority,
            _loop_settings(config),
            progress,
        )
    return Run(model, optimizer, strategy, authority, data, evaluator, trainer, first)


def _first_gradient(
    config: RunConfig, communicator: Communicator, data: DataManager, gradient: MicroBatchGradient
) -> str | None:
    """Returns a digest of one micro-batch's gradient at the freshly drawn weights; None outside exact mode.

    In one run it depends only on the kind of machine: machines of the same kind have equal digests.
    Collective: every rank must call.
    """
    if config.communicator.name != "exact" or config.evaluation.only:
        return None
    digest, repeats = "", True
    error: MlxRingError | None = None
    try:
        with working("computing the first gradient"):
            digest, repeats = start_check.first_gradient(
                gradient,
                data.dataset.train,
                seed=config.seed,
                micro_batch_size=config.trainer.micro_batch_size,
            )
    except MlxRingError as caught:  # a sample that is damaged on one host
        error = caught
    communicator.agree_on_error(error)
    start_check.compare(communicator, digest, repeats)
    return digest


def _optimizer(config: RunConfig, model: nn.Module) -> Optimizer:
    weights = dict(tree_flatten(model.trainable_parameters()))
    if config.optimizer.name == "muon" and not any(is_hidden_matrix(*item) for item in weights.items()):
        raise ConfigError(
            "optimizer=muon updates the matrices in the model's list `layers`, and there are none; give the "
            "list of the model's blocks this name, or choose optimizer=adamw"
        )
    schedule = build_schedule(
        config.schedule, peak=config.optimizer.learning_rate, total_steps=config.trainer.steps
    )
    optimizer = build_optimizer(
        config.optimizer, schedule=schedule, global_batch_size=config.trainer.global_batch_size
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


def _authority(config: RunConfig, communicator: Communicator) -> ParameterAuthority:
    return ParameterAuthority(
        communicator,
        total_steps=config.trainer.steps,
        verify_every_steps=config.communicator.verify_every_steps,
        evaluate_every_steps=config.evaluation.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        save_every_seconds=config.checkpoint.every_seconds,
    )


def _strategy(config: RunConfig, communicator: Communicator, model: nn.Module) -> Strategy:
    return build_strategy(
        config.strategy.name,
        communicator=communicator,
        codec=config.communicator.name,
        parameters=dict(tree_flatten(model.trainable_parameters())),
        num_micro_batches=config.trainer.num_micro_batches,
        clip_gradient_norm=config.trainer.clip_gradient_norm,
        compile=config.trainer.compile,
    )


def _work_split(config: RunConfig, communicator: Communicator) -> WorkSplit:
    return WorkSplit(
        config.trainer.num_micro_batches,
        communicator.world_size,
        measured=config.trainer.split.name == "measured",
    )


def _loader(config: RunConfig, data: DataManager, micro_batches: range, progress: Progress) -> Loader:
    return data.loader(
        global_batch_size=config.trainer.global_batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        micro_batches=micro_batches,
        next_sample=progress.next_sample,
    )


def _loop_settings(config: RunConfig) -> LoopSettings:
    return LoopSettings(
        total_steps=config.trainer.steps,
        global_batch_size=config.trainer.global_batch_size,
        max_skipped_batches=config.trainer.max_skipped_batches,
        issue_ahead=config.memory.issue_ahead,
        counts_tokens=config.kind.name == "language",
    )


def open_data(config: RunConfig, communicator: Communicator) -> DataManager:
    """Opens a run's data on this rank. Collective: every rank must call.

    Raises:
        ConfigError, DataError: as `DataManager.open`.
    """
    return DataManager.open(
        config.data,
        communicator,
        kind=config.kind.name,
        seed=config.seed,
        model_maximum=getattr(config.model, "max_sequence_length", None),
        targets_are_classes=_classifies(config),
    )


def _build_parts(config: RunConfig, communicator: Communicator) -> tuple[DataManager, nn.Module, Optimizer]:
    """Builds data, model and optimizer. If any rank fails, all raise the same error. Collective."""
    data = open_data(config, communicator)
    spec = data.dataset.spec
    parts: tuple[nn.Module, Optimizer] | None = None
    error: MlxRingError | None = None
    try:
        with working("building the model"):
            model = _model(config, spec)
            parts = model, _optimizer(config, model)
    except MlxRingError as caught:
        error = caught
    communicator.agree_on_error(error)
    assert parts is not None
    return data, *parts


def _model(config: RunConfig, spec: DataSpec) -> nn.Module:
    """Builds the model and checks it. Raises: MlxRingError if it cannot be used."""
    memory_manager.apply_limits(config.memory)
    mx.random.seed(config.seed)  # a data set may have drawn; the first weights depend on the seed alone
    model = build_model(config.model, input_shape=spec.input_shape, num_classes=spec.num_classes)
    if config.communicator.name == "exact" and mx.default_device() == mx.gpu:
        make_reproducible(model)
    if config.memory.activation_checkpointing:
        memory_manager.checkpoint_activations(model)
    check_parameters(model)
    build_loss(config.trainer.loss)
    _check_outputs(config, spec, model)
    return model


def _classifies(config: RunConfig) -> bool:
    """Tells whether targets are classes and outputs logits. With a user's own loss, they may be anything."""
    return config.trainer.loss == "cross_entropy"


def _check_outputs(config: RunConfig, spec: DataSpec, model: nn.Module) -> None:
    """Sends one sample through the model. Raises: ConfigError if that fails or its outputs do not fit."""
    language = spec.kind == "language"
    inputs = mx.zeros((1, *spec.input_shape), mx.int32 if language else mx.float32)
    num_classes = spec.num_classes if _classifies(config) else None
    check_outputs(model, config.model.name, inputs, each_position=language, num_classes=num_classes)


def _own_identity(data: DataManager, model: nn.Module) -> dict[str, Any]:
    """Returns what, besides program and configuration, must be equal on all ranks before the first update."""
    shapes = parameter_shapes(dict(tree_flatten(model.parameters())))
    return {"host": socket.gethostname(), "data": data.dataset.digest, "parameters": sha256_of(shapes)}
