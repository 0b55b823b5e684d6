"""Drives one run: restores it; then records each step of the trainer and does what is due after it."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mlx_ring import __version__
from mlx_ring.checkpoint.copies import Copies
from mlx_ring.checkpoint.restore import Found, find, replaces_record
from mlx_ring.cluster.limits import DIRECTORY_LOCK_SECONDS
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.progress import working
from mlx_ring.cluster.rank.protocol import Phase, Vitals
from mlx_ring.cluster.rank.stop_signal import StopSignal
from mlx_ring.communication.agreement import agree
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import MLX_VERSION, device
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import EXIT_COMPLETED, EXIT_STOPPED, Interrupted, MlxRingError, unwritable_record
from mlx_ring.run.builder import Run, build
from mlx_ring.run.narrator import Narrator
from mlx_ring.run.owed import Owed
from mlx_ring.run.recorder import RunRecorder
from mlx_ring.run.storage import RunStorage
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.training.parameter_authority import Plan
from mlx_ring.training.trainer import StepResult
from mlx_ring.training.work_split import check_world_size

log = logging.getLogger(__name__)


class Coordinator:
    """One run on one rank. Rank 0 writes the record: status, metrics, checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        communicator: Communicator,
        run_directory: Path,
        hydra_files: dict[str, str] | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Set up one run; `run` or `prepare` starts it.

        Args:
            run_directory: the run's; it is made if it is missing.
            hydra_files: what Hydra would have written to .hydra, by name; it is kept beside config.yaml.
            heartbeat: tells of the supervisor's events, if there is a supervisor.
        """
        self._heartbeat = heartbeat
        self.phase = Phase.JOINING
        self._hydra_files = hydra_files or {}
        self._config = config
        self._communicator = communicator
        self.directory = RunDirectory(
            run_directory, lock_seconds=DIRECTORY_LOCK_SECONDS if heartbeat else 0.0
        )
        self._leads = communicator.rank == 0
        self.job = os.urandom(8).hex()  # rank 0's, once the ranks agree
        self._run: Run | None = None
        self._found: Found | None = None
        self._status: RunStatus | None = None
        self._recorder: RunRecorder | None = None
        self._storage: RunStorage | None = None  # of a run that trains
        self._saved_step: int | None = None
        self._owed = Owed()
        self._stopped = False  # whether a rank was asked to stop before the run's end
        self._told = False  # whether status.json says what is prepared
        self._begun = False  # whether status.json speaks of this run

    def run(self) -> int:
        """Train, or evaluate, to the end. Collective: every rank must call.

        Returns: the exit status.
        Raises: MlxRingError for everything foreseen that ends a run early.
        """
        signals = StopSignal(self._stop, lambda: self._leave_at_once("interrupted by a second signal"))
        try:
            run = self.prepare()
            if run is None:
                return EXIT_COMPLETED
            if self._config.evaluation.only:
                return self._evaluate_only(run)
            self._run = run
            self.phase = Phase.FIRST_STEP
            if self._pay(run):
                for result in run.trainer.steps():
                    if self.follow(run, result).stop:
                        break
            return self._finish(run)
        finally:
            signals.close()

    def prepare(self) -> Run | None:
        """Open the directory, build the parts, agree on them, restore. Collective: every rank must call.

        Returns: the run, ready for its next step; None if it has completed already.
        Raises: MlxRingError, the same on every rank.
        """
        if not self._leads:
            return self._prepare()
        with Narrator(self._tell, lambda: self._communicator.call):
            run = self._prepare()
        if self._told and self._status is not None:
            with contextlib.suppress(OSError):
                self._status.update(message="")
        return run

    def _tell(self, line: str) -> None:
        """Print what is prepared, also into status.json. Called from the narrator's thread."""
        with contextlib.suppress(OSError, ValueError):  # the console may have gone
            print(line, flush=True)
        if self._status is not None:
            self._told = True
            with contextlib.suppress(OSError):
                self._status.update(message=line)

    def _prepare(self) -> Run | None:
        self.phase = Phase.PREPARING
        host = self._communicator.hosts[self._communicator.rank]
        agree(self._communicator, {"host": host, "config": self._config.flat()})
        self.job = self._communicator.broadcast_object(self.job)
        check_world_size(self._config, self._communicator.world_size)
        copies: Copies | None = None
        if not self._config.evaluation.only:  # an evaluation may look at the checkpoints of a live run
            copies = Copies.open(self._config, self._communicator, self.directory, self.job)
        self._on_rank_0(self._find)
        if copies is not None:
            self._keep_log(copies)
        if self._already_completed():
            return None
        self._on_rank_0(self._start_status)
        self._begun = True
        run = build(self._config, self._communicator, self._found)
        if copies is not None:
            self._begin(run, copies)
        return run

    def follow(self, run: Run, result: StepResult) -> Plan:
        """Record a step and do what is due after it: the plan. Collective: every rank must call."""
        if self._recorder is not None:
            self._recorder.step(result)
        plan = run.authority.decide(result.step, result.flags)
        self._stopped = plan.stop and result.step < self._config.trainer.steps
        if not result.skipped or plan.stop:
            if plan.verify:
                digest = run.verify_replicas()
                if self._recorder is not None and digest is not None:
                    self._recorder.verified(result.step, digest)
            if plan.save:
                self._save(run)
            # After the save: it may be long. If the run is to stop, the next start does it.
            if plan.evaluate and not result.skipped and not self._stopped:
                self.phase = Phase.EVALUATING
                plan = plan if self._evaluate(run) else replace(plan, stop=True)
        self.phase = Phase.TRAINING
        return plan

    def vitals(self) -> Vitals:
        """Returns: where this run is, without the communicator's part. May be called from any thread."""
        saved_step = (self._recorder.kept_step or 0) if self._recorder is not None else 0
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
        """Let rank 0 alone do something that may fail. Collective: every rank must call.

        Raises: what `act` raised on rank 0, on every rank.
        """
        self._on_every_rank(act if self._leads else lambda: None)

    def _on_every_rank(self, act: Callable[[], object]) -> None:
        """Let every rank do something that may fail on some. Collective: every rank must call.

        Raises: what `act` raised on any rank, on every rank.
        """
        error: MlxRingError | None = None
        try:
            act()
        except MlxRingError as caught:
            error = caught
        except OSError as caught:
            error = unwritable_record(caught)
        self._communicator.agree_on_error(error)

    def _find(self) -> None:
        """Find the checkpoint to continue from, and what was left undone there."""
        with working("verifying checkpoints"):
            self._found = found = find(self._config, self.directory)
        if found is not None and found.own and not self._config.evaluation.only:
            self._owed = Owed.at(found.manifest, self.directory.path / "metrics.jsonl")

    def _keep_log(self, copies: Copies) -> None:
        """Send each rank's log to a file, if its disk can be written. Collective: every rank must call."""
        self._on_every_rank(lambda: copies.usable and self.directory.log_to_file(self._communicator.rank))
        log.info(
            "mlx_ring %s, mlx %s, rank %d of %d (%s), process %d, hosts %s", __version__, MLX_VERSION,
            self._communicator.rank, self._communicator.world_size, self._communicator.backend, os.getpid(),
            ", ".join(self._communicator.hosts),
        )  # fmt: skip

    def _already_completed(self) -> bool:
        """Whether the run has reached its last step and stays as it is. Collective: every rank must call."""
        config, found = self._config, self._found
        done = found is not None and found.manifest["step"] >= config.trainer.steps
        done = done and config.checkpoint.resume == "auto" and not config.evaluation.only
        done = done and not self._owed.evaluation
        done = self._communicator.broadcast_object(done)
        if done and self._leads and found is not None:
            written = RunStatus.read(self.directory.path) or {}
            if written.get("state") != "completed":  # it died between its last checkpoint and its end
                self._start_status()
                assert self._status is not None
                self._status.update("completed")
            print(f"{self.directory.path} has completed its {found.manifest['step']} steps already")
        return done

    def _start_status(self) -> None:
        """Let status.json speak of this process group from now on, unless it only evaluates."""
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

    def _begin(self, run: Run, copies: Copies) -> None:
        """Open the record of a run that trains, and prepare its copies. Collective: every rank must call."""
        self._on_rank_0(lambda: self._open_record(run, copies))
        self._storage = RunStorage(copies, self._recorder)
        copies.begin(run.trainer.progress.step, replaces=replaces_record(self._config, self._found))
        told = [self._saved_step, self._owed.evaluation, self._owed.figures]
        self._saved_step, *owed = self._communicator.broadcast_object(told)
        self._owed = Owed(*owed)

    def _open_record(self, run: Run, copies: Copies) -> None:
        assert self._status is not None
        found = self._found
        if found is not None and found.own:
            self._saved_step = run.trainer.progress.step
        if replaces_record(self._config, found):  # from here on nothing can be refused
            self._status.forget()
            self.directory.set_record_aside(self._status.before)
        self._recorder = RunRecorder.open(
            self.directory,
            self._status,
            self._config,
            world_size=self._communicator.world_size,
            run=run,
            found=found,
            copies=copies,
            hydra_files=self._hydra_files,
            supervisor_events=self._heartbeat.notes if self._heartbeat else list,
        )

    # What is due

    def _pay(self, run: Run) -> bool:
        """Do what the run owes to the checkpoint that it continues. Collective: every rank must call.

        Returns: False if a rank was asked to stop meanwhile.
        """
        if self._owed.figures:
            assert self._storage is not None
            self._storage.add_evaluation(run.trainer.progress.step, self._owed.figures)
        return not self._owed.evaluation or self._evaluate(run)

    def _evaluate(self, run: Run) -> bool:
        """Evaluate the weights, and add that to their checkpoint if they are saved.

        Collective: every rank must call. Returns: False if a rank was asked to stop; then they are saved.
        """
        step, storage = run.trainer.progress.step, self._storage
        assert storage is not None
        evaluation = run.evaluator.evaluate(lambda: run.authority.stop_requested)
        if evaluation is None:
            self._stopped = True
            self._save(run)
            return False
        if self._recorder is not None:
            self._recorder.evaluation(step, evaluation)
        if self._saved_step == step:
            storage.add_evaluation(step, evaluation.row())
        return True

    def _save(self, run: Run) -> None:
        """Save the weights, unless they are saved. Collective: every rank must call."""
        if self._saved_step == run.trainer.progress.step:
            return
        self.phase = Phase.SAVING
        self._saved_step = run.trainer.progress.step
        run.authority.saved()
        assert self._storage is not None
        self._storage.save(run)

    # The end

    def _finish(self, run: Run) -> int:
        """End a run well: its last checkpoint is on the disk, and every rank knows whether rank 0 succeeded,
        before any rank leaves. Collective: every rank must call."""
        self.phase = Phase.FINISHING
        run.trainer.close()
        if self._saved_step is None:
            # Restored at its last step from another directory: it still needs an evaluation and a checkpoint.
            self._save(run)
            self._evaluate(run)
            self.phase = Phase.FINISHING
        storage = self._storage
        assert storage is not None
        storage.wait()
        self._on_rank_0(lambda: storage.close(step=run.trainer.progress.step, stopped=self._stopped))
        storage.end()
        return EXIT_STOPPED if self._stopped else EXIT_COMPLETED

    def _evaluate_only(self, run: Run) -> int:
        """Evaluate the weights that were found, and print the figures; a record that is there stays as it is.

        Collective: every rank must call.
        """
        evaluation = run.evaluator.evaluate()
        assert evaluation is not None
        if self._leads:
            source = self._found.path if self._found else self._config.checkpoint.initialize_from
            for problem in self._found.problems if self._found else []:
                print(f"passed over a damaged checkpoint: {problem}", file=sys.stderr)
            figures = "  ".join(f"{name} {value:.6g}" for name, value in evaluation.row().items())
            if not evaluation.counted:
                figures = "no value, because all held-out targets are -1"
            print(f"evaluation of {source}: {figures}")
        return EXIT_COMPLETED

    def fail(self, message: str, event: str | None = None) -> bool:
        """Finish what is being written, and let the status say why the run fails. No collective.

        Never raises: what cannot be written now must not hide the error that led here.

        Args:
            message: why it fails, on one line.
            event: the kind of row that tells of it, if one does.

        Returns: whether the run had begun, so that status.json speaks of it.
        """
        if self._storage is not None:
            self._storage.fail(message, event)
        elif self._recorder is not None:
            self._recorder.fail(message, event)
        RunStatus.mark_failed(self.directory.path, job=self.job, message=message)
        return self._begun

    def _stop(self) -> None:
        """On the first signal, in its thread: finish the step and save, or leave if nothing was trained."""
        if self._run is None:
            self._leave_at_once("interrupted before the first step")
        log.info("asked to stop")
        self._run.authority.stop_requested = True

    def _leave_at_once(self, message: str) -> NoReturn:
        RunStatus.mark_failed(self.directory.path, job=self.job, message=message)
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_status)
