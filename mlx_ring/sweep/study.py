"""The Optuna study of a sweep: chooses the values of each job and ends jobs that are hopeless.

A trial has the number of its job. The study is kept in the sweep's directory, so that the same command goes
on where it stopped.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from mlx_ring.errors import ConfigError, Interrupted, JobFailed
from mlx_ring.sweep.table import Row, failure, failures, show

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection
    from optuna.trial import Trial, TrialState
except ImportError as error:
    raise ConfigError("hydra/sweeper=optuna needs Optuna; pip install 'mlx-ring[sweep]'") from error

# What a key may be: one of these texts; or a number between low and high, with tags (int, log).
Values = list[str] | tuple[float, float, set[str]]
SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
KNOWN = {  # the values that a setting may have
    "metric": ("loss", "accuracy", "perplexity", "bits_per_byte"),
    "direction": ("minimize", "maximize"),
    "sampler": tuple(SAMPLERS),
}
RESULT = "study.json"


class Launcher(Protocol):
    """What a study uses of the plugin that runs jobs."""

    parallel: int
    is_hopeless: Any
    shows_table: bool

    def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> Any: ...


class Study:
    """The trials of one sweep."""

    def __init__(
        self,
        directory: Path,
        fixed: list[str],
        space: dict[str, Values],
        *,
        n_trials: int,
        n_jobs: int | None,
        metric: str,
        direction: str,
        sampler: str,
        seed: int | None,
        prune: bool,
        prune_after_trials: int,
        study_name: str,
        storage: str | None,
    ) -> None:
        """Opens the study, or makes one; conf/hydra/sweeper/optuna.yaml explains its settings.

        `fixed` are overrides that every job has, `space` holds the keys that vary, each with what it may be.

        Raises: ConfigError if a setting is wrong or nothing varies.
        """
        _refuse_settings(metric, direction, sampler, n_trials, 1 if n_jobs is None else n_jobs)
        if not space:
            raise ConfigError(
                "nothing varies; give for example optimizer.learning_rate='interval(1e-4,1e-2)'"
            )
        self._directory = directory
        self._fixed = fixed
        self._metric = metric
        self._n_trials = n_trials
        self._n_jobs = n_jobs
        self._space = {key: _distribution(key, values) for key, values in space.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = JournalFileBackend(str(directory / "study.journal"))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=prune_after_trials)
        self._study = optuna.create_study(
            storage=storage or optuna.storages.JournalStorage(journal),
            pruner=pruner if prune else optuna.pruners.NopPruner(),
            study_name=study_name,
            direction=StudyDirection[direction.upper()],
            load_if_exists=True,
        )
        known = len(self._study.get_trials(deepcopy=False))
        # Another seed at each start, so that it does not choose the values of the first start again.
        start_seed = None if seed is None else seed + known
        self._study.sampler = SAMPLERS[sampler](seed=start_seed)
        self._prunes = prune
        self._trials: dict[int, Trial] = {}

    def run(self, launcher: Launcher) -> None:
        """Runs trials until there are `n_trials`, then prints the best one and writes it to study.json.

        Raises: JobFailed for a job that was asked to stop, at once; for the first job that failed, in this
        start or an earlier one, when all have ended. ConfigError if no job has the metric.
        """
        launcher.parallel = self._n_jobs or launcher.parallel
        launcher.is_hopeless = self._is_hopeless if self._prunes else None
        launcher.shows_table = False
        failed: list[JobFailed] = []
        try:
            while batch := self._next_trials(launcher.parallel):
                failed += self._run_trials(launcher, batch)
        finally:
            show(self._directory)
        self._conclude(failures(self._directory) or failed)

    def _run_trials(self, launcher: Launcher, batch: list[Trial]) -> list[JobFailed]:
        """Runs some trials. Returns: the failures. Raises: JobFailed if the sweep was asked to stop."""
        self._trials = {trial.number: trial for trial in batch}
        ended_badly: list[JobFailed] = []
        for result in launcher.launch([self._overrides(trial) for trial in batch], batch[0].number):
            row: Row = result.row
            if (failed := failure(row, self._directory)) is not None:
                if row.state in ("pending", "stopped") or row.exit_status == Interrupted.exit_status:
                    raise failed
                ended_badly.append(failed)
            self._tell_optuna(row)
        return ended_badly

    def _next_trials(self, parallel: int) -> list[Trial]:
        """Returns trials with consecutive numbers: first those that an earlier start left, then new ones."""
        known = self._study.get_trials(deepcopy=False)
        unfinished = [trial for trial in known if trial.state == TrialState.RUNNING]
        if unfinished:
            first = unfinished[0].number
            consecutive = [each for place, each in enumerate(unfinished) if each.number == first + place]
            return [Trial(self._study, each._trial_id) for each in consecutive[:parallel]]  # pyright: ignore[reportPrivateUsage]
        return [self._study.ask(self._space) for _ in range(min(parallel, self._n_trials - len(known)))]

    def _overrides(self, trial: Trial) -> list[str]:
        return [*self._fixed, *(f"{key}={value}" for key, value in trial.params.items())]

    def _is_hopeless(self, number: int, evaluation: dict[str, float]) -> bool:
        """Reports an evaluation of a job to Optuna and returns whether to end the job."""
        trial = self._trials[number]
        if self._metric not in evaluation:
            return False
        trial.report(evaluation[self._metric], int(evaluation["step"]))
        return trial.should_prune()

    def _tell_optuna(self, row: Row) -> None:
        """Gives the result of a job to the study."""
        value = row.evaluation.get(self._metric)
        if row.state == "pruned":
            self._study.tell(row.number, state=TrialState.PRUNED)
        elif row.state == "completed" and value is not None:
            self._study.tell(row.number, value)
        else:
            self._study.tell(row.number, state=TrialState.FAIL)

    def _conclude(self, failed: list[JobFailed]) -> None:
        """Prints the best trial and writes it to study.json. Raises the errors of `run`."""
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.COMPLETE for trial in trials):
            self._tell_best()
        elif not failed:
            raise ConfigError(
                f"no job's last evaluation has {self._metric}; choose another hydra.sweeper.metric"
            )
        if len(failed) == len(trials) > 1:
            raise JobFailed(f"all {len(trials)} jobs failed; {failed[0]}", failed[0].exit_status)
        if failed:
            raise failed[0]

    def _tell_best(self) -> None:
        best = self._study.best_trial
        found = {"job": best.number, self._metric: best.value, "parameters": best.params}
        (self._directory / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: job {best.number} of {self._n_trials}, {self._metric} {best.value:.5g}: {words}")


def _refuse_settings(metric: str, direction: str, sampler: str, n_trials: int, n_jobs: int) -> None:
    chosen = {"metric": metric, "direction": direction, "sampler": sampler}
    for name, value in chosen.items():
        if value not in KNOWN[name]:
            raise ConfigError(f"hydra.sweeper.{name} must be one of {', '.join(KNOWN[name])}; got {value}")
    for name, number in {"n_trials": n_trials, "n_jobs": n_jobs}.items():
        if number < 1:
            raise ConfigError(f"hydra.sweeper.{name} must be 1 or more; got {number}")


def _distribution(key: str, values: Values) -> optuna.distributions.BaseDistribution:
    """Returns what Optuna chooses the values of a key from. Raises: ConfigError for a bad interval."""
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(values)
    low, high, tags = values
    try:
        if "int" in tags:
            return optuna.distributions.IntDistribution(int(low), int(high), log="log" in tags)
        return optuna.distributions.FloatDistribution(low, high, log="log" in tags)
    except ValueError as error:
        raise ConfigError(f"{key}: interval({low},{high}) cannot be drawn from: {error}") from None
