"""Drives one run: restore; for each step of the trainer record it and do what the authority says is due."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mlx_ring import __version__
from mlx_ring.checkpoint.copies import Copies
from mlx_ring.checkpoint.restore import Found, find, replaces_record
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.protocol import Phase, Vitals
from mlx_ring.cluster.rank.stop_signal import StopSignal
from mlx_ring.communication.agreement import agree
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import MLX_VERSION, device
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import EXIT_COMPLETED, EXIT_STOPPED, Interrupted, MlxRingError, record_error
from mlx_ring.run.builder import Run, build
from mlx_ring.run.recorder import RunRecord
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.training.evaluator import Evaluation
from mlx_ring.training.parameter_authority import Plan
from mlx_ring.training.trainer import StepResult
from mlx_ring.training.work_split import check_world_size

log = logging.getLogger(__name__)
LOCK_SECONDS = 20.0  # a rank that its supervisor has lost may hold the directory until its lease ends


class Coordinator:
    """One run on one rank. Rank 0 keeps the record: status, metrics, checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        communicator: Communicator,
        run_directory: Path,
        hydra_files: dict[str, str] | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """`hydra_files`: what Hydra would have written to .hydra, by name; kept beside config.yaml."""
        self._heartbeat, self.phase = heartbeat, Phase.JOINING
        self._hydra_files = hydra_files or {}
        self._config, self._communicator = config, communicator
        self.directory = RunDirectory(run_directory, lock_seconds=LOCK_SECONDS if heartbeat else 0.0)
        self._leads = communicator.rank == 0
        self.job = os.urandom(8).hex()  # rank 0's, once the ranks agree
        self._run: Run | None = None
        self._found: Found | None = None
        self._status: RunStatus | None = None
        self._record: RunRecord | None = None
        self._copies: Copies | None = None  # where it trains
        self._saved_step: int | None = None
        self._begun = False  # from here on status.json speaks of this run

    def run(self) -> int:
        """Train, or evaluate, to the end. Collective: every rank must call. Returns the exit status.

        Raises: MlxRingError for everything that ends a run early.
        """
        signals = StopSignal(self._stop, lambda: self._leave_at_once("interrupted by a second signal"))
        try:
            run = self.prepare()
            if run is None:
                return EXIT_COMPLETED
            if self._config.evaluation.only:
                return self._evaluate_only(run)
            stopped = False
            self._run, self.phase = run, Phase.FIRST_STEP
            for result in run.trainer.steps():
                plan = self.follow(run, result)
                stopped = plan.stop and result.step < self._config.trainer.steps
                if plan.stop:
                    break
            return self._finish(run, stopped)
        finally:
            signals.close()

    def prepare(self) -> Run | None:
        """Open the directory, build, agree, restore; None where the run has completed already.

        Collective: every rank must call.
        """
        self.phase = Phase.PREPARING
        host = self._communicator.hosts[self._communicator.rank]
        agree(self._communicator, {"host": host, "config": self._config.flat()})
        self.job = self._communicator.broadcast_object(self.job)
        check_world_size(self._config, self._communicator.world_size)
        if not self._config.evaluation.only:  # which may look at the checkpoints of a live run
            self._copies = Copies(self._config, self._communicator, self.directory, self.job)
        self._on_rank_0(self._find)
        if self._copies is not None:
            self._keep_log(self._copies)
        if self._already_completed():
            return None
        self._on_rank_0(self._start_status)
        self._begun = True
        run = build(self._config, self._communicator, self._found)
        self._on_rank_0(lambda: self._begin(run))
        if self._copies is not None:
            self._copies.begin(run.trainer.progress.step, replaces=replaces_record(self._config, self._found))
            self._saved_step = self._communicator.broadcast_object(self._saved_step)
        return run

    def follow(self, run: Run, result: StepResult) -> Plan:
        """Record a step and do what is due after it. Collective: every rank must call."""
        if self._record is not None:
            self._record.step(result)
        plan = run.authority.decide(result.step, result.flags)
        if not result.skipped or plan.stop:
            if plan.verify:
                digest = run.verify_replicas()
                if self._record is not None and digest is not None:
                    self._record.verified(result.step, digest)
            evaluation = self._evaluate(run) if plan.evaluate and not result.skipped else None
            if plan.save and result.step != self._saved_step:
                self._save(run, evaluation)
        self.phase = Phase.TRAINING
        return plan

    def vitals(self) -> Vitals:
        """Returns: where this run is, without the communicator's part. May be called from any thread."""
        saved_step = (self._record.kept_step or 0) if self._record is not None else 0
        run = self._run
        if run is None:
            return Vitals(phase=self.phase, saved_step=saved_step)
        return Vitals(
            phase=self.phase,
            step=run.trainer.progress.step,
            work=run.evaluator.micro_batches,
            saved_step=saved_step,
            busy_seconds=run.trainer.busy_seconds,
        )

    # Opening

    def _on_rank_0(self, act: Callable[[], None]) -> None:
        """Something that rank 0 alone does, and may fail at alone. Collective: every rank must call.

        Raises: what rank 0 raised, on every rank.
        """
        self._together(act if self._leads else lambda: None)

    def _together(self, act: Callable[[], object]) -> None:
        """Collective: every rank must call. Raises: what `act` raised on any rank, on every rank."""
        error: MlxRingError | None = None
        try:
            act()
        except MlxRingError as caught:
            error = caught
        except OSError as caught:
            error = record_error(caught)
        self._communicator.agree_on_error(error)

    def _find(self) -> None:
        """The checkpoint to continue from."""
        self._found = find(self._config, self.directory)

    def _keep_log(self, copies: Copies) -> None:
        """Every rank's own log, where it can write. Collective: every rank must call."""
        self._together(lambda: copies.usable and self.directory.log_to_file(self._communicator.rank))
        log.info(
            "mlx_ring %s, mlx %s, rank %d of %d (%s), process %d, hosts %s", __version__, MLX_VERSION,
            self._communicator.rank, self._communicator.world_size, self._communicator.backend, os.getpid(),
            ", ".join(self._communicator.hosts),
        )  # fmt: skip

    def _already_completed(self) -> bool:
        """A run that has reached its last step is left as it is."""
        config, found = self._config, self._found
        done = found is not None and found.manifest["step"] >= config.trainer.steps
        done = done and config.checkpoint.resume == "auto" and not config.evaluation.only
        done = self._communicator.broadcast_object(done)
        if done and self._leads and found is not None:
            written = RunStatus.read(self.directory.path) or {}
            if written.get("state") != "completed":  # it died between its last checkpoint and its last word
                self._start_status()
                assert self._status is not None
                self._status.update("completed")
            print(f"{self.directory.path} has completed its {found.manifest['step']} steps already")
        return done

    def _start_status(self) -> None:
        """From here on status.json speaks of this process group."""
        if self._config.evaluation.only:
            return
        found = self._found
        reached = found.manifest if found is not None and found.own else {}
        self._status = RunStatus(
            self.directory.path,
            job=self.job,
            world_size=self._communicator.world_size,
            backend=self._communicator.backend,
            device=device(),
            hosts=self._communicator.hosts,
            reached=None if replaces_record(self._config, found) else reached,
        )

    def _begin(self, run: Run) -> None:
        """Open the record of a run that will train."""
        if self._status is None or self._copies is None:
            return
        progress, found = run.trainer.progress, self._found
        if found is not None and found.own:
            self._saved_step = progress.step
        if replaces_record(self._config, found):  # now that nothing can be refused any more
            self._status.forget()
            self.directory.set_record_aside(self._status.before)
        self._record = RunRecord(
            self.directory,
            self._status,
            self._config,
            world_size=self._communicator.world_size,
            progress=progress,
            found=found,
            first_gradient=run.first_gradient,
            hydra_files=self._hydra_files,
            notes=self._heartbeat.notes if self._heartbeat else list,
            copies=self._copies,
        )

    # What is due

    def _evaluate(self, run: Run) -> Evaluation:
        self.phase = Phase.EVALUATING
        evaluation = run.evaluator.evaluate()
        if self._record is not None:
            self._record.evaluation(run.trainer.progress.step, evaluation)
        return evaluation

    def _save(self, run: Run, evaluation: Evaluation | None) -> None:
        since = time.perf_counter()
        self.phase = Phase.SAVING
        self._saved_step = run.trainer.progress.step
        run.authority.saved()
        assert self._copies is not None
        failures, facts = self._copies.failures(), {}
        if self._record is not None:
            self._record.copies_failed(failures)
            facts = self._record.facts(run, evaluation)
        files = run.files()
        facts = self._copies.save(files, facts, since=since)
        if self._record is not None:
            self._record.save(files, facts, since=since)

    # The end

    def _finish(self, run: Run, stopped: bool) -> int:
        """The last checkpoint is on disk, and rank 0's verdict known everywhere, before any rank leaves."""
        self.phase = Phase.FINISHING
        run.trainer.close()
        if self._saved_step is None:
            # Restored at its end into another directory: that, too, ends with an evaluation and a checkpoint.
            self._save(run, self._evaluate(run))
        assert self._copies is not None
        failures = self._copies.failures()

        def close() -> None:
            assert self._record is not None
            self._record.copies_failed(failures)
            self._record.close(step=run.trainer.progress.step, stopped=stopped)

        self._on_rank_0(close)
        self._copies.end()
        return EXIT_STOPPED if stopped else EXIT_COMPLETED

    def _evaluate_only(self, run: Run) -> int:
        """Evaluate the weights found; the record of a run that is there stays as it is."""
        evaluation = run.evaluator.evaluate()
        if self._leads:
            source = self._found.path if self._found else self._config.checkpoint.initialize_from
            for problem in self._found.problems if self._found else []:
                print(f"passed over a damaged checkpoint: {problem}", file=sys.stderr)
            figures = "  ".join(f"{name} {value:.6g}" for name, value in evaluation.row().items())
            print(f"evaluation of {source}: {figures}")
        return EXIT_COMPLETED

    def fail(self, message: str, event: str | None = None) -> bool:
        """Leave a true record, with no collective: what is being written is finished, the status says why.

        Best effort: what cannot be written now must not hide the error that led here.
        Returns: whether the run had begun, so that its status speaks of it.
        """
        if self._record is not None:
            self._record.fail(message, event)
        if self._copies is not None:
            self._copies.close()
        RunStatus.mark_failed(self.directory.path, job=self.job, message=message)
        return self._begun

    def _stop(self) -> None:
        """The first signal: finish the step and save, or leave where nothing was trained. In its thread."""
        if self._run is None:
            self._leave_at_once("interrupted before the first step")
        log.info("asked to stop")
        self._run.authority.stop_requested = True

    def _leave_at_once(self, message: str) -> NoReturn:
        RunStatus.mark_failed(self.directory.path, job=self.job, message=message)
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_status)
