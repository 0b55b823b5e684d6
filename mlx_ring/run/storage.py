"""Keeps a run on every disk while it trains: rank 0's recorder, and the copies on other disks.

The one place that knows both, and the order in which they act: what failed on other disks goes into the
record, the record goes to every disk, and then all disks save the same checkpoint.
"""

import math
import time
from typing import Any

from mlx_ring.checkpoint.copies import Copies, CopyFailure
from mlx_ring.run.builder import Run
from mlx_ring.run.recorder import RunRecorder


class RunStorage:
    """What one rank keeps of a run that trains."""

    def __init__(self, copies: Copies, recorder: RunRecorder | None) -> None:
        """`recorder`: on rank 0; None elsewhere."""
        self._copies = copies
        self._recorder = recorder
        self._failures: list[CopyFailure] = []  # not recorded yet

    def save(self, run: Run) -> None:
        """Save a checkpoint on every disk, in the background. Collective: every rank must call.

        Raises: on rank 0, CheckpointError if too many saves failed; OSError if the record cannot be written.
        """
        since = time.perf_counter()  # training stands still from here on
        self.wait()
        fields: dict[str, Any] = {}
        if self._recorder is not None:
            self._record_failures(self._recorder)
            self._recorder.finish_save()
            fields = self._recorder.manifest_fields(run)
        state = run.state.arrays()
        fields = self._copies.save(state, fields, since=since)
        if self._recorder is not None:
            self._recorder.save(state, fields, since=since)

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Add the evaluation of its weights to the checkpoint of a step, which was saved before.

        Collective: every rank must call, with the same figures by name; if the loss is not finite, none are
        added. Raises: on rank 0, OSError if the record cannot be written.
        """
        if not math.isfinite(figures["loss"]):
            return
        fields = {"evaluation": figures}
        self._failures += self._copies.take_failures(wait=False)
        if self._recorder is not None:
            self._recorder.amend(step, fields)
        self._copies.amend(step, fields)

    def wait(self) -> None:
        """Wait until every copy's last save has ended. Collective: every rank must call."""
        self._failures += self._copies.take_failures()

    def close(self, *, step: int, stopped: bool) -> None:
        """End the record of a run that ended well, after `wait`. For rank 0.

        Raises: CheckpointError if the last checkpoint could not be written; OSError if the rest cannot.
        """
        assert self._recorder is not None
        self._record_failures(self._recorder)
        self._recorder.close(step=step, stopped=stopped)

    def end(self) -> None:
        """Bring the last rows to every disk, after `close`. Collective: every rank must call."""
        self._copies.end()

    def fail(self, message: str, event: str | None) -> None:
        """Finish what is being written, and record why the run fails. No collective. Never raises."""
        if self._recorder is not None:
            self._recorder.fail(message, event)
        self._copies.close()

    def _record_failures(self, recorder: RunRecorder) -> None:
        failures, self._failures = self._failures, []
        recorder.copies_failed(failures)
