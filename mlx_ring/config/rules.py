"""Rules that a field of the configuration must keep."""

import math
import re
from pathlib import Path
from typing import ClassVar

from mlx_ring.errors import ConfigError


def require(accepted: bool, key: str, value: object, rule: str) -> None:
    """Raises: ConfigError, with the key, the rule and the value, if the value is not accepted."""
    if not accepted:
        raise ConfigError(f"{key} must be {rule}; got {value}")


def expand_home(key: str, value: str) -> Path:
    """Returns the path that a field names, with the home folder in place of `~`.

    Raises: ConfigError if there is no such home: HOME is not set and the system does not know the user.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{key}={value} is in a home folder that is not known here; give {key} a whole path, or set HOME"
        ) from None


class Section:
    """Base of every group's dataclass: checks its fields and names them by their whole key.

    Most rules let null pass, because the type of a field already says whether it may be null. Every method
    raises ConfigError with the key, the rule and the value.
    """

    group: ClassVar[str]

    def require(self, accepted: bool, field: str, rule: str) -> None:
        """Refuses the value of `field` unless it is `accepted`; `rule` follows the words "must be"."""
        require(accepted, f"{self.group}.{field}", getattr(self, field), rule)

    def at_least(self, least: int, *fields: str, unit: str = "", or_null: bool = False) -> None:
        """Requires each of these fields to be `least` or more, or also null if `or_null`."""
        rule = f"{'null or ' if or_null else ''}at least {least}{unit}"
        for field in fields:
            value = getattr(self, field)
            self.require((or_null and value is None) or value >= least, field, rule)

    def positive(self, *fields: str) -> None:
        """Requires each of these fields to be null or a finite number above 0."""
        for field in fields:
            value = getattr(self, field)
            good = value is None or (math.isfinite(value) and value > 0)
            self.require(good, field, "a finite number above 0")

    def fraction(self, *fields: str) -> None:
        """Requires each of these fields to be at least 0 and below 1."""
        for field in fields:
            self.require(0 <= getattr(self, field) < 1, field, "in [0, 1)")

    def importable(self, field: str) -> None:
        """Requires the field to have the form package.module:name."""
        value = getattr(self, field)
        good = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value) is not None
        require(good, f"{self.group}.{field}", repr(value), "of the form package.module:name")
