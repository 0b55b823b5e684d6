"""Rank 0's record of a run while it trains: metrics, checkpoints, and what status.json says of them."""

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mlx_ring import __version__
from mlx_ring.checkpoint.copies import Copies, CopyFailure
from mlx_ring.checkpoint.manager import CheckpointManager, Saved
from mlx_ring.checkpoint.restore import Found
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.machine import MLX_VERSION
from mlx_ring.config.redaction import flatten, to_yaml
from mlx_ring.config.resume_rules import look_ups_sha256
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import CheckpointError
from mlx_ring.run.builder import Run
from mlx_ring.run.interval import Interval
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.metrics_tracker import MetricsTracker
from mlx_ring.run_directory.sinks.jsonl import JSONLSink
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.training.evaluator import Evaluation
from mlx_ring.training.exact import start_check as exactness
from mlx_ring.training.trainer import Progress, StepResult

log = logging.getLogger(__name__)
MANY_MICRO_BATCHES = 256  # in exact mode: half a percent of a small language model's sums were off by 1 %
STATUS_SECONDS = 1.0  # status.json is renewed at most this often while training


class RunRecord:
    """The record of one run. Other ranks have none."""

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        config: RunConfig,
        *,
        world_size: int,
        progress: Progress,
        found: Found | None,
        first_gradient: str | None,
        hydra_files: dict[str, str],
        notes: Callable[[], list[dict[str, Any]]],
        copies: Copies,
    ) -> None:
        """Open it for a run that trains on from `progress`; `hydra_files`, by name, go beside config.yaml;
        `notes` gives the supervisor's events since it was last asked."""
        self._notes = notes
        self._directory, self._status, self._config, self._world_size = directory, status, config, world_size
        self._checkpoints = CheckpointManager(
            directory.path, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
        )
        own = {**config.redacted, "run": {"dir": str(directory.path)}}
        directory.write({"config.yaml": to_yaml(own), **hydra_files})
        self._checkpoints.set_aside(progress.step)
        self._metrics = MetricsTracker(
            directory.path,
            total_steps=config.trainer.steps,
            restored_step=progress.step,
            console=config.metrics.console,
            tensorboard=config.metrics.tensorboard,
            hyperparameters=_hyperparameters(config),
            title=f"{config.model.name} on {config.data.name}, {world_size} rank(s)",
        )
        self._digests = JSONLSink(directory.path / "digests.jsonl", progress.step)
        self.kept_step = progress.step if found is not None and found.own else None  # newest on the disk
        self._interval = Interval(tokens_before=progress.tokens)
        self._step, self._failures, self._status_time = progress.step, 0, 0.0
        goes_on = found is not None and found.own and config.checkpoint.resume == "auto"
        new = {"generation": copies.generation, "line": secrets.token_hex(8)}
        self._line: dict[str, Any] = found.manifest["line"] if goes_on and found else new
        self._metrics.message(f"run directory {directory.path}")
        if copies.brought is not None:
            self._event("copies_brought", progress.step, copies.brought)
        if found is not None:
            self._resumed(found, progress.step, first_gradient)
        self._warn_of_few_bits()
        self._status.update("running", step=progress.step)

    def _warn_of_few_bits(self) -> None:
        micro_batches = self._config.trainer.num_micro_batches
        if self._config.communicator.name == "exact" and micro_batches > MANY_MICRO_BATCHES:
            bits = 31 - micro_batches.bit_length()
            message = f"warning: {micro_batches} micro-batches leave a gradient's code {bits} bits"
            self._event("low_precision", self._step, f"{message}; raise trainer.micro_batch_size")

    def _resumed(self, found: Found, step: int, first_gradient: str | None) -> None:
        for problem in found.problems:
            self._event("checkpoint_damaged", step, f"fell back to {found.path.name}: {problem}")
        self._event("resumed", step, f"from {found.path} ({found.manifest.get('world_size')} ranks then)")
        before = found.manifest.get("first_gradient")
        if before and first_gradient and before["sha256"] != first_gradient:
            message = (
                f"warning: {exactness.machine()} computes other bits than {before['machine']} did before"
            )
            self._event(
                "other_machine", step, f"{message}: this is no longer the run that it would have been"
            )

    # While it trains

    def step(self, result: StepResult) -> None:
        """Note a step: a row once an interval is full, an event for a batch without an update.

        Raises: CheckpointError after too many failed saves; OSError where the record cannot be written.
        """
        self._step = result.step
        for note in self._notes():
            self._event(note.pop("event"), result.step, note.pop("message"), **note)
        for saved in self._checkpoints.poll():
            self._saved(saved)
        if result.new_split is not None:
            dealt = asdict(result.new_split)
            message = f"micro-batches of each rank from now on: {dealt['micro_batches']}, by measured speed"
            self._event("split_changed", result.step, message, **dealt)
        if result.skipped:
            self._event("nonfinite_skipped", result.step, f"{result.why_skipped}: no update")
            return
        self._interval.results.append(result)
        every, last = self._config.metrics.log_every_steps, self._config.trainer.steps
        if result.step == 1 or result.step % every == 0 or result.step == last:
            row = self._interval.row(self._config.trainer.global_batch_size, self._world_size)
            self._metrics.record("train", row)
            if time.monotonic() - self._status_time >= STATUS_SECONDS:
                self._status_time = time.monotonic()
                self._status.update(step=result.step)

    def verified(self, step: int, digest: str) -> None:
        """Note that all ranks hold the same weights, and a digest of these, which a replay can be held
        against."""
        self._digests.write("digest", {"step": step, "weights": digest})

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Note an evaluation."""
        self._metrics.record("evaluation", {"step": step, **evaluation.row()})

    def copies_failed(self, failures: list[CopyFailure]) -> None:
        """Note what other disks could not keep: this one has it, and the run goes on."""
        for each in failures:
            message = f"rank {each.rank} on {each.host} has no copy of it: {each.reason}"
            self._event("copy_failed", each.step, message, rank=each.rank, host=each.host)

    def facts(self, run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
        """What the manifest of a checkpoint of the run as it is says, for `save`; `evaluation` is that of
        these weights, where there is one. The save before has ended then, and the rows are on the disk.

        Raises: CheckpointError after too many failed saves; then no further one is to be begun.
        """
        for saved in self._checkpoints.wait():
            self._saved(saved)
        self._digests.sync()
        self._metrics.flush()  # a checkpoint never outlives the rows before it
        progress = run.trainer.progress
        finite = evaluation is not None and math.isfinite(evaluation.loss)
        return {
            "progress": asdict(progress),
            "line": self._line,
            "world_size": self._world_size,
            "first_gradient": run.first_gradient
            and {"sha256": run.first_gradient, "machine": exactness.machine()},
            "random": {"seed": self._config.seed, "keyed_by": "seed, batch, micro-batch"},
            "data_sha256": run.data.dataset.digest,
            "evaluation": evaluation.row() if evaluation is not None and finite else None,
            "versions": {"mlx_ring": __version__, "mlx": MLX_VERSION},
            "config": self._config.redacted,
            "look_ups_sha256": look_ups_sha256(self._config.redacted, self._config.flat()),
        }

    def save(self, files: dict[str, Arrays], facts: dict[str, Any], *, since: float) -> None:
        """Start a checkpoint; training stands still `since` then, on the clock of time.perf_counter."""
        self._checkpoints.save(facts["progress"]["step"], files, facts, since=since)

    def _saved(self, saved: Saved) -> None:
        """Record a save that ended; give up after too many failed ones."""
        if saved.error is None:
            self._failures, self.kept_step = 0, saved.step
            path = saved.path.relative_to(self._directory.path)
            row = {"step": saved.step, "path": str(path), "bytes": saved.bytes}
            times = {"stall_seconds": saved.stall_seconds, "write_seconds": saved.write_seconds}
            self._metrics.record("checkpoint", {**row, **times})
            self._status.update(step=saved.step, parameters_sha256=saved.parameters_sha256)
            return
        self._failures += 1
        limit = self._config.checkpoint.max_failures
        self._event("checkpoint_failed", saved.step, f"{saved.error} ({self._failures} of {limit} in a row)")
        if self._failures >= limit:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be written: {saved.error}"
            )

    def _event(self, event: str, step: int, message: str, **more: Any) -> None:
        self._metrics.record("event", {"event": event, "step": step, "message": message, **more})
        log.info("%s at step %d: %s", event, step, message)

    # The end

    def close(self, *, step: int, stopped: bool) -> None:
        """The last word of a run that ended well, completed or stopped, once its last checkpoint is on disk.

        Raises: CheckpointError where that could not be written; OSError where the rest cannot.
        """
        for saved in self._checkpoints.wait():
            if saved.error is not None:
                raise CheckpointError(f"the last checkpoint could not be written: {saved.error}")
            self._saved(saved)
        self._checkpoints.close()
        again = "the same command continues"
        if self._config.checkpoint.resume != "auto":
            again = "the same command with checkpoint.resume=auto continues"
        message = f"stopped on request; {again}" if stopped else None
        self._digests.close()
        self._metrics.close(succeeded=not stopped)
        self._status.update("stopped" if stopped else "completed", step=step, message=message)

    def fail(self, message: str, event: str | None) -> None:
        """Finish what is being written and note the last step, as far as that is still possible; `event` is
        the kind of row that tells of the failure, if one does."""
        with contextlib.suppress(Exception):  # whatever it is, it must not hide why the run fails
            for saved in self._checkpoints.wait():
                self._saved(saved)
        with contextlib.suppress(OSError):
            if event is not None:
                self._event(event, self._step, message)
        with contextlib.suppress(OSError):
            self._status.update(step=max(self._step, self._status.step))
        self._digests.close()
        with contextlib.suppress(OSError):
            self._metrics.close(succeeded=False)


def _hyperparameters(config: RunConfig) -> dict[str, float | int | str | bool]:
    """The scalar values of the configuration that describe the experiment."""
    groups = ("model", "data", "optimizer", "schedule", "trainer", "seed", "strategy", "communicator")
    return {
        key: value
        for key, value in flatten(config.redacted).items()
        if key.split(".")[0] in groups and isinstance(value, bool | int | float | str)
    }
