"""Turns what Hydra composed into a `RunConfig`; a mistake becomes one line that names the key."""

import difflib
import re
from dataclasses import fields
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from mlx_ring.config.choices import CHOICES
from mlx_ring.config.redaction import redact
from mlx_ring.config.rules import require
from mlx_ring.config.run_config import SECTIONS, RunConfig
from mlx_ring.config.typed_text import refuse_numbers
from mlx_ring.errors import ConfigError, MlxRingError

CONTAINERS = {ListConfig: (list, "a list: [1,2]"), DictConfig: (dict, "a group of values: {name:value}")}
# Of a global batch in exact mode. At this number 6 % of a language model's sums were off by more than 1 %.
MOST_MICRO_BATCHES = 4096
# Finds in OmegaConf's message the key that was referred to, and what is wrong with its value.
REFERENCE = re.compile(r"'\$\{([\w.]+)\}': (.+)")


def parse(composed: DictConfig) -> RunConfig:
    """Checks a composed configuration and converts it.

    Raises: ConfigError, with the key, the value and the rule.
    """
    _refuse_targets(composed)
    known = {*SECTIONS, *CHOICES, "seed"}
    for key in composed:
        if str(key) not in known:
            raise ConfigError(f"unknown configuration key {key}; {_nearest(str(key), known)}")
    if missing := sorted(known - {str(key) for key in composed}):
        raise ConfigError(f"{missing[0]} is missing from the configuration; it cannot be left out")
    try:
        values = {key: _section(composed, key) for key in known - {"seed"}}
        seed = composed["seed"]
    except OmegaConfBaseException as error:
        raise explain(error) from error
    require(type(seed) is int and 0 <= seed < 2**32, "seed", seed, "an integer in [0, 2**32)")
    config = RunConfig(seed=seed, redacted=redact(composed), **values)
    if config.schedule.warmup_steps >= config.trainer.steps:
        rule = f"below trainer.steps={config.trainer.steps}"
        require(False, "schedule.warmup_steps", config.schedule.warmup_steps, rule)
    if config.communicator.name == "exact" and config.trainer.num_micro_batches > MOST_MICRO_BATCHES:
        raise ConfigError(
            f"trainer.global_batch_size must be at most {MOST_MICRO_BATCHES} micro-batches with "
            f"communicator=exact, which share 31 bits; got {config.trainer.num_micro_batches}: raise "
            "trainer.micro_batch_size, or choose communicator=native"
        )
    return config


def _section(composed: DictConfig, key: str) -> Any:
    """Returns the dataclass of one group, checked."""
    node = composed[key]
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{key} must be a group of values; got {node!r}")
    schema = SECTIONS.get(key)
    if schema is None:
        name = node["name"] if "name" in node else None  # noqa: SIM401 - get() raises if the value is ???
        if name not in CHOICES[key]:
            raise ConfigError(f"{key}.name is {name!r}; known: {', '.join(CHOICES[key])}")
        schema = CHOICES[key][name]
    unknown = sorted(str(field) for field in set(node) - {field.name for field in fields(schema)})
    if unknown:
        names = {f"{key}.{field.name}" for field in fields(schema)}
        raise ConfigError(
            f"unknown configuration key {key}.{unknown[0]}; {_nearest(f'{key}.{unknown[0]}', names)}"
        )
    # The group stays inside the whole, so that error messages and look-ups use whole keys.
    whole = OmegaConf.create({})
    whole._set_parent(composed)  # pyright: ignore[reportPrivateUsage]
    for name, value in cast(Any, OmegaConf.to_container(node, resolve=False)).items():
        refuse_numbers(f"{key}.{name}", value)
    resolved: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    typed = OmegaConf.create({key: OmegaConf.structured(schema)})
    for name, value in resolved.items():
        field = typed[key]._get_node(name)
        wanted, what = CONTAINERS.get(type(field), (object, ""))
        accepted = isinstance(value, wanted) or (value is None and field._is_optional())
        require(accepted, f"{key}.{name}", value, what)
    return OmegaConf.to_object(OmegaConf.merge(typed, {key: resolved}))[key]  # type: ignore[index]


def _refuse_targets(node: Any, path: str = "") -> None:
    """Raises: ConfigError for a `_target_` anywhere: with it a file could make Hydra call anything."""
    if isinstance(node, DictConfig):
        for key in node:
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                raise ConfigError(
                    f"{where} is refused: choose a model, data set or loss by its name or import_path"
                )
            _refuse_targets(node._get_node(key), where)  # pyright: ignore[reportPrivateUsage]
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():  # pyright: ignore[reportPrivateUsage]
        for index, item in enumerate(node._iter_ex(resolve=False)):  # pyright: ignore[reportPrivateUsage]
            _refuse_targets(item, f"{path}[{index}]")


def _nearest(key: str, known: set[str]) -> str:
    """Suggests the key that was meant: the same name in another group, else a similar one in this group, else
    lists them all."""
    group, _, name = key.rpartition(".")
    siblings = {
        other.rpartition(".")[2]: other for other in sorted(known) if other.rpartition(".")[0] == group
    }
    meant = [other for other in sorted(known) if other.endswith(f".{name}")]
    meant += [siblings[near] for near in difflib.get_close_matches(name, siblings, n=1)]
    if not siblings:
        meant += difflib.get_close_matches(key, known, n=1)
        siblings = {other: other for other in sorted(known) if "." not in other}
    return f"did you mean {meant[0]}?" if meant else f"known: {', '.join(siblings.values())}"


def _all_keys(node: Any, path: str = "") -> set[str]:
    """Returns the dotted key of every node."""
    if not isinstance(node, DictConfig) or node._is_missing() or node._is_none():  # pyright: ignore[reportPrivateUsage]
        return {path} if path else set()
    keys: set[str] = {path} if path else set()
    for key in node:
        keys |= _all_keys(node._get_node(key), f"{path}.{key}" if path else str(key))  # pyright: ignore[reportPrivateUsage]
    return keys


def nearest_key(key: str, composed: DictConfig) -> str:
    """Suggests what a mistyped key was meant to be, from the keys of a composed configuration."""
    return _nearest(key, {name for name in _all_keys(composed) if not name.startswith("hydra")})


def explain(error: BaseException) -> MlxRingError:
    """Turns an error of OmegaConf into one line that names the key, or finds our own error inside it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MlxRingError):
            return cause
        cause = cause.__cause__ or cause.__context__
    key = str(getattr(error, "full_key", None) or "configuration")
    text = str(getattr(error, "msg", None) or error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} has no value; give it on the command line: {key}=…")
    if isinstance(error, InterpolationValidationError) and (found := REFERENCE.search(first)):
        wrong = "cannot be null" if "'None'" in found[2] else f"cannot be used: {found[2]}"
        return ConfigError(f"{found[1]} {wrong}; {key} is made of it: give another value, or leave it out")
    if isinstance(error, InterpolationKeyError):
        return ConfigError(f"{key} refers to a key that does not exist: {first}")
    if isinstance(error, InterpolationResolutionError):
        loop = "; it refers to itself" if "recursion" in text.lower() else ""
        return ConfigError(f"{key} cannot be resolved: {first}{loop}")
    if isinstance(error, ConfigKeyError):
        return ConfigError(f"unknown configuration key {key}: {first}")
    return ConfigError(f"{key}: {first}")
