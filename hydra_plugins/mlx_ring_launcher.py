"""Hydra's launcher for `train.py -m …`: each job is a distributed run of its own (`mlx_ring/sweep/sweep.py`).

Every Hydra program in this environment imports this file, so it imports mlx_ring only when it is used.
"""

import atexit
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from mlx_ring.sweep.sweep import IsHopeless, Job
    from mlx_ring.sweep.table import Row


class MlxRingLauncher(Launcher):
    """`hydra/launcher=mlx_ring`."""

    def __init__(self, parallel: int, max_restarts: int) -> None:
        self.parallel = parallel
        self._max_restarts = max_restarts
        self.is_hopeless: IsHopeless | None = None  # set by a sweeper that ends jobs early
        self.shows_table = True

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Opens the sweep. Raises: ConfigError, before anything is written, if there can be no sweep."""
        from mlx_ring.sweep.multirun import begin_multirun

        self._searchpath = begin_multirun(config)
        self._loader = hydra_context.config_loader
        self._config = config
        self.directory = Path(config.hydra.sweep.dir)
        atexit.register(self._redact)  # in every case: Hydra's sweepers write secrets to the disk

    def _redact(self) -> None:
        """Replaces the multirun.yaml that Hydra wrote by one without secrets."""
        from mlx_ring.config.redaction import redacted_yaml

        written = self.directory / "multirun.yaml"
        if written.exists():
            written.write_text(redacted_yaml(self._config))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs these jobs and returns their results. Hydra raises the first failure when all have ended."""
        from mlx_ring.sweep.sweep import run_jobs
        from mlx_ring.sweep.table import show

        configs = [
            self._composed(overrides, initial_job_idx + place)
            for place, overrides in enumerate(job_overrides)
        ]
        self._redact()
        rows = run_jobs(
            self.directory,
            [self._job(config) for config in configs],
            parallel=self.parallel,
            max_restarts=self._max_restarts,
            is_hopeless=self.is_hopeless,
        )
        if self.shows_table:
            show(self.directory)
        return [_job_return(config, row, self.directory) for config, row in zip(configs, rows, strict=True)]

    def _composed(self, overrides: Sequence[str], number: int) -> DictConfig:
        """Composes the configuration of one job."""
        from mlx_ring.config.typed_text import as_typed, without_quotes

        config = self._loader.load_sweep_config(self._config, list(map(as_typed, overrides)))
        typed = [(each, without_quotes(each)) for each in config.hydra.overrides.task]
        separator = config.hydra.job.config.override_dirname.kv_sep
        with open_dict(config):
            config.hydra.overrides.task = [plain for _, plain in typed]
            for words in typed:  # the folder of a job may be named by it
                quoted, plain = (each.replace("=", separator) for each in words)
                config.hydra.job.override_dirname = config.hydra.job.override_dirname.replace(quoted, plain)
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            HydraConfig.instance().set_config(config)  # for ${hydra:…} in the sub-directory's name
            config.run.dir = str(self.directory / config.hydra.sweep.subdir)
        return config

    def _job(self, config: DictConfig) -> "Job":
        from mlx_ring.sweep.sweep import Job

        cluster = config.cluster
        return Job(
            number=config.hydra.job.num,
            overrides=tuple(config.hydra.overrides.task),
            searchpath=self._searchpath,
            directory=Path(config.run.dir),
            ranks=cluster.ranks,
            hostfile=None if cluster.hostfile is None else Path(cluster.hostfile),
            backend=cluster.backend,
        )


class _Result(JobReturn):
    """A job's result. Unlike Hydra's own, does not print all overrides before it raises the job's error."""

    row: "Row"

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _job_return(config: DictConfig, row: "Row", directory: Path) -> JobReturn:
    """Returns a job's result: the last loss, which other sweepers minimize, and the row, for ours."""
    from mlx_ring.sweep.table import failure

    error = failure(row, directory)
    result = _Result()
    result.overrides = OmegaConf.to_container(config.hydra.overrides.task)  # pyright: ignore[reportAttributeAccessIssue]
    result.hydra_cfg = OmegaConf.create({"hydra": config.hydra})
    result.cfg = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    result.working_dir = str(config.run.dir)
    result.task_name = JobRuntime.instance().get("name")
    result.status = JobStatus.FAILED if error else JobStatus.COMPLETED
    result.return_value = error or row.evaluation.get("loss")
    result.row = row
    return result
