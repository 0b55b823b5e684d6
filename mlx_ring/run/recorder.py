"""Writes the record of a run while it trains: metrics, checkpoints, and what status.json says of them."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Self

from mlx_ring import __version__
from mlx_ring.checkpoint.copies import Copies, CopyFailure
from mlx_ring.checkpoint.manager import CheckpointManager, Saved
from mlx_ring.checkpoint.restore import Found
from mlx_ring.checkpoint.saved_state import SavedArrays
from mlx_ring.communication.machine import MLX_VERSION
from mlx_ring.config.redaction import flatten, to_yaml
from mlx_ring.config.resume_rules import look_ups_sha256
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import CheckpointError
from mlx_ring.run.builder import Run
from mlx_ring.run.interval import Interval
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.manifest import Lineage
from mlx_ring.run_directory.metrics_tracker import MetricsTracker
from mlx_ring.run_directory.sinks.jsonl import JSONLSink
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.training.evaluator import Evaluation
from mlx_ring.training.exact import start_check
from mlx_ring.training.trainer import Progress, StepResult

log = logging.getLogger(__name__)
# In exact mode: with this many, half a percent of a small language model's sums were off by 1 %.
MANY_MICRO_BATCHES = 256
STATUS_SECONDS = 1.0  # between two updates of status.json by steps, at least


class RunRecorder:
    """Writes the record of one run: metrics, digests, checkpoints, status.json. Only rank 0 has one."""

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        config: RunConfig,
        checkpoints: CheckpointManager,
        metrics: MetricsTracker,
        digests: JSONLSink,
        *,
        world_size: int,
        progress: Progress,
        lineage: Lineage,
        supervisor_events: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """Take what `open` has opened."""
        self._directory = directory
        self._status = status
        self._config = config
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._digests = digests
        self._world_size = world_size
        self._lineage = lineage
        self._supervisor_events = supervisor_events
        self._interval = Interval(tokens_before=progress.tokens)
        self._step = progress.step
        self._failed_saves = 0  # in a row
        self._status_time = 0.0  # of the last update, on the clock of time.monotonic
        self.kept_step: int | None = None  # of the newest checkpoint in this directory

    @classmethod
    def open(
        cls,
        directory: RunDirectory,
        status: RunStatus,
        config: RunConfig,
        *,
        world_size: int,
        run: Run,
        found: Found | None,
        copies: Copies,
        hydra_files: dict[str, str],
        supervisor_events: Callable[[], list[dict[str, Any]]],
    ) -> Self:
        """Open the record of a run that trains on from its progress, and tell there how it begins.

        Args:
            found: the checkpoint that it continues, if it does.
            hydra_files: what goes beside config.yaml, by name.
            supervisor_events: gives the supervisor's events since it was last called.

        Raises: OSError if the directory cannot be written.
        """
        progress = run.trainer.progress
        keep = config.checkpoint
        checkpoints = CheckpointManager(directory.path, keep_last=keep.keep_last, keep_best=keep.keep_best)
        redacted = {**config.redacted, "run": {"dir": str(directory.path)}}
        directory.write({"config.yaml": to_yaml(redacted), **hydra_files})
        checkpoints.set_aside(progress.step)
        recorder = cls(
            directory,
            status,
            config,
            checkpoints,
            _open_metrics(directory, config, progress, world_size),
            JSONLSink(directory.path / "digests.jsonl", progress.step),
            world_size=world_size,
            progress=progress,
            lineage=_lineage(config, found, copies),
            supervisor_events=supervisor_events,
        )
        recorder._record_start(found, copies.brought, run.first_gradient)
        return recorder

    def _record_start(self, found: Found | None, brought: str | None, first_gradient: str | None) -> None:
        self._metrics.message(f"run directory {self._directory.path}")
        if brought is not None:
            self._event("copies_brought", self._step, brought)
        if found is not None:
            self._record_resume(found, first_gradient)
        self._warn_of_few_bits()
        self._status.update("running", step=self._step)

    def _warn_of_few_bits(self) -> None:
        micro_batches = self._config.trainer.num_micro_batches
        if self._config.communicator.name == "exact" and micro_batches > MANY_MICRO_BATCHES:
            bits = 31 - micro_batches.bit_length()
            message = f"warning: {micro_batches} micro-batches leave a gradient's code {bits} bits"
            self._event("low_precision", self._step, f"{message}; raise trainer.micro_batch_size")

    def _record_resume(self, found: Found, first_gradient: str | None) -> None:
        if found.own:
            self.kept_step = self._step
        for problem in found.problems:
            self._event("checkpoint_damaged", self._step, f"fell back to {found.path.name}: {problem}")
        then = f"{found.manifest.get('world_size')} ranks then"
        self._event("resumed", self._step, f"from {found.path} ({then})")
        before = found.manifest.get("first_gradient")
        if before and first_gradient and before["sha256"] != first_gradient:
            message = (
                f"warning: {start_check.describe_machine()} computes other bits than {before['machine']} "
                "did before: this is no longer the run that it would have been"
            )
            self._event("other_machine", self._step, message)

    # While it trains

    def step(self, result: StepResult) -> None:
        """Record a step: a row if an interval is full, an event for a batch without an update.

        Raises: CheckpointError after too many failed saves; OSError if the record cannot be written.
        """
        self._step = result.step
        for event in self._supervisor_events():
            self._event(event.pop("event"), result.step, event.pop("message"), **event)
        for saved in self._checkpoints.poll():
            self._record_save(saved)
        if result.new_split is not None:
            split = asdict(result.new_split)
            message = f"micro-batches of each rank from now on: {split['micro_batches']}, by measured speed"
            self._event("split_changed", result.step, message, **split)
        if result.skipped:
            self._event("nonfinite_skipped", result.step, f"{result.why_skipped}: no update")
        else:
            self._record_row(result)

    def _record_row(self, result: StepResult) -> None:
        """Add a step to the interval; write its row, and the step into status.json, if it is full."""
        self._interval.results.append(result)
        every, last = self._config.metrics.log_every_steps, self._config.trainer.steps
        if result.step == 1 or result.step % every == 0 or result.step == last:
            row = self._interval.row(self._config.trainer.global_batch_size, self._world_size)
            self._metrics.record("train", row)
            if time.monotonic() - self._status_time >= STATUS_SECONDS:
                self._status_time = time.monotonic()
                self._status.update(step=result.step)

    def verified(self, step: int, digest: str) -> None:
        """Record the digest of the weights that all ranks hold; a replay compares its own with it."""
        self._digests.write("digest", {"step": step, "weights": digest})

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation of the weights after `step`."""
        self._metrics.record("evaluation", {"step": step, **evaluation.row()})
        if not evaluation.counted:
            message = "warning: all held-out targets are -1, so none counts and the evaluation has no value"
            self._event("nothing_evaluated", step, message)

    def copies_failed(self, failures: list[CopyFailure]) -> None:
        """Record what other disks could not keep. Rank 0's disk has it, and the run goes on."""
        for failure in failures:
            message = f"rank {failure.rank} on {failure.host} has no copy of it: {failure.reason}"
            self._event("copy_failed", failure.step, message, rank=failure.rank, host=failure.host)

    def finish_save(self) -> None:
        """Wait for the save before, and put the rows on the disk: no checkpoint may be there without them.

        Raises: CheckpointError after too many failed saves; OSError if the record cannot be written.
        """
        for saved in self._checkpoints.wait():
            self._record_save(saved)
        self._digests.sync()
        self._metrics.flush()

    def manifest_fields(self, run: Run) -> dict[str, Any]:
        """What the manifest of a checkpoint says of the run as it is now. Its evaluation comes later."""
        progress = run.trainer.progress
        return {
            "progress": asdict(progress),
            "line": self._lineage.as_json(),
            "world_size": self._world_size,
            "first_gradient": run.first_gradient
            and {"sha256": run.first_gradient, "machine": start_check.describe_machine()},
            "random": {"seed": self._config.seed, "keyed_by": "seed, batch, micro-batch"},
            "data_sha256": run.data.dataset.digest,
            "evaluation": None,
            "evaluation_due": run.authority.evaluation_is_due(progress.step),
            "versions": {"mlx_ring": __version__, "mlx": MLX_VERSION},
            "config": self._config.redacted,
            "look_ups_sha256": look_ups_sha256(self._config.redacted, self._config.flat()),
        }

    def save(self, state: SavedArrays, fields: dict[str, Any], *, since: float) -> None:
        """Start a checkpoint, after `finish_save`.

        Args:
            state: what to save.
            fields: those of `manifest_fields`.
            since: when training began to stand still, on the clock of time.perf_counter, in seconds.
        """
        self._checkpoints.save(fields["progress"]["step"], state, fields, since=since)

    def amend(self, step: int, fields: dict[str, Any]) -> None:
        """Put the rows on the disk, then change fields of a checkpoint's manifest. Raises: OSError."""
        self._metrics.flush()
        self._checkpoints.amend(step, fields)

    def _record_save(self, saved: Saved) -> None:
        """Record a save that ended. Raises: CheckpointError if too many have failed in a row."""
        if saved.error is None:
            self._failed_saves = 0
            self.kept_step = saved.step
            path = saved.path.relative_to(self._directory.path)
            row = {"step": saved.step, "path": str(path), "bytes": saved.bytes}
            times = {"stall_seconds": saved.stall_seconds, "write_seconds": saved.write_seconds}
            self._metrics.record("checkpoint", {**row, **times})
            self._status.update(step=saved.step, parameters_sha256=saved.parameters_sha256)
            return
        self._failed_saves += 1
        failed = self._failed_saves
        limit = self._config.checkpoint.max_failures
        self._event("checkpoint_failed", saved.step, f"{saved.error} ({failed} of {limit} in a row)")
        if failed >= limit:
            raise CheckpointError(f"{failed} checkpoints in a row could not be written: {saved.error}")

    def _event(self, event: str, step: int, message: str, **more: Any) -> None:
        self._metrics.record("event", {"event": event, "step": step, "message": message, **more})
        log.info("%s at step %d: %s", event, step, message)

    # The end

    def close(self, *, step: int, stopped: bool) -> None:
        """End the record of a run that completed or was stopped, after its last checkpoint is on the disk.

        Raises: CheckpointError if that could not be written; OSError if the rest cannot.
        """
        for saved in self._checkpoints.wait():
            if saved.error is not None:
                raise CheckpointError(f"the last checkpoint could not be written: {saved.error}")
            self._record_save(saved)
        self._checkpoints.close()
        again = "the same command continues"
        if self._config.checkpoint.resume != "auto":
            again = "the same command with checkpoint.resume=auto continues"
        message = f"stopped on request; {again}" if stopped else None
        self._digests.close()
        self._metrics.close(succeeded=not stopped)
        self._status.update("stopped" if stopped else "completed", step=step, message=message)

    def fail(self, message: str, event: str | None) -> None:
        """Finish what is being written and record the last step, as far as that is possible. Never raises.

        `event` is the kind of row that tells of the failure, if one does.
        """
        with contextlib.suppress(Exception):  # no other error may hide why the run fails
            for saved in self._checkpoints.wait():
                self._record_save(saved)
        with contextlib.suppress(OSError):
            if event is not None:
                self._event(event, self._step, message)
        with contextlib.suppress(OSError):
            self._status.update(step=max(self._step, self._status.step))
        self._digests.close()
        with contextlib.suppress(OSError):
            self._metrics.close(succeeded=False)


def _open_metrics(
    directory: RunDirectory, config: RunConfig, progress: Progress, world_size: int
) -> MetricsTracker:
    return MetricsTracker(
        directory.path,
        total_steps=config.trainer.steps,
        restored_step=progress.step,
        console=config.metrics.console,
        tensorboard=config.metrics.tensorboard,
        hyperparameters=_hyperparameters(config),
        title=f"{config.model.name} on {config.data.name}, {world_size} rank(s)",
    )


def _lineage(config: RunConfig, found: Found | None, copies: Copies) -> Lineage:
    """That of the checkpoint in this directory which the run continues, else a new one."""
    if found is not None and found.own and config.checkpoint.resume == "auto":
        return Lineage.of(found.manifest)
    return Lineage.new(copies.generation)


def _hyperparameters(config: RunConfig) -> dict[str, float | int | str | bool]:
    """The scalar values of the configuration that describe the experiment, by dotted key."""
    groups = ("model", "data", "optimizer", "schedule", "trainer", "seed", "strategy", "communicator")
    return {
        key: value
        for key, value in flatten(config.redacted).items()
        if key.split(".")[0] in groups and isinstance(value, bool | int | float | str)
    }
