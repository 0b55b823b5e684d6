"""One Optuna study of a sweep: it draws each job's values, hears its evaluations, ends hopeless ones. No mlx.

A trial has its job's number. The study is kept in the sweep's directory, so that the same command goes on.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from mlx_ring.errors import ConfigError, Interrupted, MlxRingError
from mlx_ring.sweep.table import Row, failure, show

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection
    from optuna.trial import Trial, TrialState
except ImportError as error:
    raise ConfigError("hydra/sweeper=optuna needs Optuna; pip install 'mlx-ring[sweep]'") from error

Values = list[str] | tuple[float, float, set[str]]  # choices; or low, high and tags (int, log)
SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
KNOWN = {
    "metric": ("loss", "accuracy", "perplexity", "bits_per_byte"),
    "direction": ("minimize", "maximize"),
    "sampler": tuple(SAMPLERS),
}
RESULT = "study.json"


class Launcher(Protocol):
    """What a study needs of the plugin that runs jobs."""

    parallel: int
    hopeless: Any
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
        """`fixed` are overrides, as the keys of `space` are with their values. Raises: ConfigError."""
        _refuse(metric, direction, sampler, n_trials, 1 if n_jobs is None else n_jobs)
        if not space:
            raise ConfigError(
                "nothing varies; give for example optimizer.learning_rate='interval(1e-4,1e-2)'"
            )
        self._directory, self._fixed, self._metric = directory, fixed, metric
        self._n_trials, self._n_jobs = n_trials, n_jobs
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
        own = None if seed is None else seed + known  # not the values again that an earlier start has drawn
        self._study.sampler = SAMPLERS[sampler](seed=own)
        self._prunes = prune
        self._trials: dict[int, Trial] = {}

    def run(self, launcher: Launcher) -> None:
        """Until there are so many trials. Raises: JobFailed for the first job that failed, when all have
        ended; for one that was asked to stop, at once."""
        launcher.parallel = self._n_jobs or launcher.parallel
        launcher.hopeless, launcher.shows_table = self._is_hopeless if self._prunes else None, False
        failures: list[MlxRingError] = []
        try:
            while batch := self._next(launcher.parallel):
                failures += self._batch(launcher, batch)
        finally:
            show(self._directory)
        self._conclude()
        if failures:
            raise failures[0]

    def _batch(self, launcher: Launcher, batch: list[Trial]) -> list[MlxRingError]:
        """Some trials at once. Returns: the failures. Raises: MlxRingError where the sweep was stopped."""
        self._trials = {trial.number: trial for trial in batch}
        failures: list[MlxRingError] = []
        for result in launcher.launch([self._overrides(trial) for trial in batch], batch[0].number):
            row: Row = result.row
            if (failed := failure(row, self._directory)) is not None:
                if row.state in ("pending", "stopped") or row.exit_status == Interrupted.exit_status:
                    raise failed
                failures.append(failed)
            self._tell(row)
        return failures

    def _next(self, parallel: int) -> list[Trial]:
        """Trials with numbers that follow one another: what an earlier start has left, then new ones."""
        known = self._study.get_trials(deepcopy=False)
        left = [trial for trial in known if trial.state == TrialState.RUNNING]
        if left:
            run = [each for place, each in enumerate(left) if each.number == left[0].number + place]
            return [Trial(self._study, each._trial_id) for each in run[:parallel]]  # pyright: ignore[reportPrivateUsage]
        return [self._study.ask(self._space) for _ in range(min(parallel, self._n_trials - len(known)))]

    def _overrides(self, trial: Trial) -> list[str]:
        return [*self._fixed, *(f"{key}={value}" for key, value in trial.params.items())]

    def _is_hopeless(self, number: int, evaluation: dict[str, float]) -> bool:
        trial = self._trials[number]
        if self._metric not in evaluation:
            return False
        trial.report(evaluation[self._metric], int(evaluation["step"]))
        return trial.should_prune()

    def _tell(self, row: Row) -> None:
        value = row.evaluation.get(self._metric)
        if row.state == "pruned":
            self._study.tell(row.number, state=TrialState.PRUNED)
        elif row.state == "completed" and value is not None:
            self._study.tell(row.number, value)
        else:
            self._study.tell(row.number, state=TrialState.FAIL)

    def _conclude(self) -> None:
        """The best of them, for people and for programs."""
        completed = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if not completed:
            raise ConfigError(
                f"no job's last evaluation has {self._metric}; choose another hydra.sweeper.metric"
            )
        best = self._study.best_trial
        found = {"job": best.number, self._metric: best.value, "parameters": best.params}
        (self._directory / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: job {best.number} of {self._n_trials}, {self._metric} {best.value:.5g}: {words}")


def _refuse(metric: str, direction: str, sampler: str, n_trials: int, n_jobs: int) -> None:
    chosen = {"metric": metric, "direction": direction, "sampler": sampler}
    for name, value in chosen.items():
        if value not in KNOWN[name]:
            raise ConfigError(f"hydra.sweeper.{name} must be one of {', '.join(KNOWN[name])}; got {value}")
    for name, number in {"n_trials": n_trials, "n_jobs": n_jobs}.items():
        if number < 1:
            raise ConfigError(f"hydra.sweeper.{name} must be 1 or more; got {number}")


def _distribution(key: str, values: Values) -> optuna.distributions.BaseDistribution:
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(values)
    low, high, tags = values
    try:
        if "int" in tags:
            return optuna.distributions.IntDistribution(int(low), int(high), log="log" in tags)
        return optuna.distributions.FloatDistribution(low, high, log="log" in tags)
    except ValueError as error:
        raise ConfigError(f"{key}: interval({low},{high}) cannot be drawn from: {error}") from None
