"""Asks Hydra for a configuration: where `conf/` is, what its look-ups give, what Hydra's errors mean."""

import contextlib
import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.config.parser import explain, nearest_key, parse
from mlx_ring.config.redaction import redact_override
from mlx_ring.config.run_config import RunConfig
from mlx_ring.config.typed_text import as_typed, in_shell, quoted_forms, with_texts
from mlx_ring.errors import ConfigError, MlxRingError

PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.exists())  # wheel, checkout


def compose_run(*overrides: str) -> RunConfig:
    """Returns the configuration with which `train.py OVERRIDES` would run, for programs that build runs.

    Give `run.dir` among the overrides: its default needs a group of ranks. Raises: ConfigError.
    """
    register_look_ups()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return parse(compose("config", overrides=list(map(as_typed, overrides))))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain_composition(error) from error
    except ValueError as error:  # Hydra does not catch `=3`
        raise ConfigError(f"the command line cannot be used: {error}; correct it") from error


def recorded_run(redacted: dict[str, Any], *overrides: str) -> RunConfig:
    """Returns the configuration of a run that was saved as `RunConfig.redacted`.

    Args:
        redacted: what was saved.
        overrides: values to change, each as KEY=VALUE.

    Raises: ConfigError for a value that breaks a rule, and for an override that is not KEY=VALUE.
    """
    register_look_ups()
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item} is not of the form KEY=VALUE; give for example data.path=FOLDER")
    try:
        changed = OmegaConf.create(with_texts(redacted))
        for override in OverridesParser.create().parse_overrides(list(map(as_typed, overrides))):
            OmegaConf.update(changed, override.key_or_group, override.value())
        return parse(changed)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain_composition(error) from error


def explain_composition(error: HydraException | OmegaConfBaseException) -> MlxRingError:
    """Turns an error of Hydra or OmegaConf into one line that names the key and what was meant."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    text = " ".join(str(error).split() or str(error.__cause__).split())
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(f"there is no {group}={name}; known: {', '.join(sorted(error.options))}")
    if found := re.search(r"Could not override '([^']+)'", text):
        # The hint comes from the keys of those choices that were typed, such as model=cnn.
        known = {f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml")}
        choices = [item for item in sys.argv[1:] if item in known]
        inner = str(getattr(error.__cause__, "full_key", None) or "")
        key = max(found[1], inner, key=len)  # model.a for model={a:1}
        with initialize_config_dir(str(CONF), version_base="1.3"):
            hint = nearest_key(key, compose("config", overrides=choices))
        return ConfigError(f"unknown configuration key {key}; {hint}")
    return ConfigError(text)


def _unreadable(error: OverrideParseException) -> ConfigError:
    """Says how to quote a value that Hydra's grammar does not take, if it is meant as it stands."""
    shown = redact_override(error.override)
    parser = OverridesParser.create()
    for form in quoted_forms(shown):
        with contextlib.suppress(HydraException):
            parser.parse_override(form)
            return ConfigError(f"{shown} cannot be read; put its value in quotes: {in_shell(form)}")
    if shown != error.override:  # the reason may quote what is secret
        return ConfigError(f"{shown} cannot be read; put its value in quotes")
    reason = " ".join(str(error).split()).removeprefix(f"Error parsing override '{error.override}' ")
    return ConfigError(f"{shown} cannot be read: {reason}")


def register_look_ups() -> None:
    """Tells OmegaConf what our look-ups give, except `${mlx_ring.run_id:}`, which needs the ranks."""
    OmegaConf.register_new_resolver("mlx_ring.usual_codec", usual_codec, replace=True)
    OmegaConf.register_new_resolver(
        "mlx_ring.standard_library", lambda: sysconfig.get_path("stdlib"), replace=True
    )


def register_sweep_id(sweep_id: str) -> None:
    """Sets what `${mlx_ring.run_id:}` gives in the process of a multirun, which joins no group of ranks."""
    OmegaConf.register_new_resolver("mlx_ring.run_id", lambda: sweep_id, replace=True)


def usual_codec() -> str:
    """Returns the codec to use if none is chosen: exact on a CPU, where it costs little; native on a GPU.

    Decides without loading MLX: its Linux builds for a GPU are packages of their own, and a Mac has Metal.
    """
    cuda = any(list(distributions(name=name)) for name in ("mlx-cuda-12", "mlx-cuda-13"))
    return "native" if cuda or sys.platform == "darwin" else "exact"
