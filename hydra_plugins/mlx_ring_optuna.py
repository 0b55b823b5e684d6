"""`hydra/sweeper=optuna`: Optuna chooses the values of each job, in one study (`mlx_ring/sweep/study.py`).

Every Hydra program in this environment imports this file, so it imports mlx_ring only when it is used.
"""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """What varies is typed as for any sweep: `1e-3,3e-3`, `choice(…)`, `range(…)`; or also `interval(…)`."""

    def __init__(self, params: dict[str, str], **options: Any) -> None:
        self._params = params
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader = hydra_context.config_loader
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs all trials. Raises: ConfigError if nothing varies; JobFailed if a job failed."""
        from mlx_ring.config.typed_text import as_typed
        from mlx_ring.sweep.study import Study

        typed = [*(as_typed(f"{key}={value}") for key, value in self._params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self._loader).parse_overrides(typed)
        fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
        space = {each.get_key_element(): _values(each) for each in overrides if each.is_sweep_override()}
        Study(self._launcher.directory, fixed, space, **self._options).run(self._launcher)


def _values(override: Override) -> list[str] | tuple[float, float, set[str]]:
    """Returns the choices as they are typed, or the bounds of an interval and its tags."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        tags: set[str] = value.tags | ({"int"} if isinstance(value.start, int) else set[str]())
        assert value.start is not None and value.end is not None
        return value.start, value.end, tags
    from mlx_ring.config.typed_text import without_quotes

    key = override.get_key_element()
    jobs = [without_quotes(f"{key}={each}") for each in override.sweep_string_iterator()]
    return [job.removeprefix(f"{key}=") for job in jobs]
