"""Keeps paths and names as they are typed: Hydra would make numbers of `run.dir=3.10` and `data.path=1e3`."""

import re
from dataclasses import fields
from typing import Any

from mlx_ring.config.choices import CHOICES
from mlx_ring.config.run_config import SECTIONS
from mlx_ring.errors import ConfigError

SCHEMAS = [*SECTIONS.items(), *((group, each) for group in CHOICES for each in CHOICES[group].values())]
TEXTS = {  # the keys whose value is a text, or a list of texts
    f"{group}.{field.name}"
    for group, schema in SCHEMAS
    for field in fields(schema)
    if field.type in (str, str | None, list[str])
} | {
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra.searchpath",
    "hydra.sweeper.study_name", "hydra.sweeper.storage",
}  # fmt: skip
GROUP = re.compile(r"(?!seed$)[A-Za-z_][\w/@-]*")  # of a choice, such as `experiment=2027`
# A value that uses Hydra's quotes, escapes, look-ups or functions says itself what it means.
EXPLICIT = re.compile(r"['\"\\$]|(?<!choice)\(")
ELEMENT = re.compile(r"[^,()\[\]]+")
NOT_TEXT = ("null", "true", "false", "nan", "inf")  # Hydra reads these words as values, unless quoted


def as_typed(override: str) -> str:
    """Puts quotes around what Hydra would read as a number or a truth value, if the key holds texts.

    The elements of a list or of a sweep get quotes of their own. `null` stays null.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    if (name not in TEXTS and not GROUP.fullmatch(name)) or EXPLICIT.search(value):
        return override
    return f"{key}={ELEMENT.sub(_quote_value, value)}" if value else override


def sets(override: str, key: str) -> bool:
    """Tells whether an override gives this key a value: `KEY=…`, `+KEY=…` or `++KEY=…`."""
    return override.partition("=")[0].lstrip("+") == key


def without_quotes(override: str) -> str:
    """Undoes `as_typed`; an override that somebody else quoted stays as it is."""
    plain = re.sub(r"'([\w.+-]+)'", r"\1", override)
    return plain if as_typed(plain) == override else override


def quoted(value: str) -> str:
    """Returns a text in quotes if Hydra's grammar of overrides needs them."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./@:+-]*", value) and value.lower() not in NOT_TEXT:
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), value)
    return f"'{escaped}'"


def in_shell(override: str) -> str:
    """Returns an override as it must be typed in a shell, which would take Hydra's quotes away."""
    return '"' + re.sub(r'(["$`\\])', r"\\\1", override) + '"' if "'" in override else override


def quoted_forms(override: str) -> list[str]:
    """Returns what an override that Hydra cannot read may have meant: with its value in quotes, or with those
    elements of a list or group in quotes that hold `=`. Empty if no text can stand there."""
    key, _, value = override.partition("=")
    holds_text = key.lstrip("+") in TEXTS
    if not holds_text and "=" not in value:
        return []
    whole = f"{key}={quoted(value)}"
    elements = re.sub(r"[^,()\[\]{}:]*=[^,()\[\]{}]*", lambda found: quoted(found[0]), value)
    if value.startswith(("[", "{")):
        return [f"{key}={elements}", *([whole] if holds_text else [])]
    return [whole]


def refuse_numbers(key: str, value: Any) -> None:
    """Raises: ConfigError if a file gives a number or a truth value for a text: its spelling is lost."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int | float) and key in TEXTS:
            kind = "truth value" if isinstance(item, bool) else "number"
            raise ConfigError(f"{key} must be a text; got the {kind} {item}: put it in quotes in its file")


def with_texts(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded configuration with texts for the numbers that earlier versions recorded instead."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(item) for item in value]
        return str(value) if isinstance(value, int | float) else value

    def texts(group: str, values: dict[str, Any]) -> dict[str, Any]:
        return {name: text(each) if f"{group}.{name}" in TEXTS else each for name, each in values.items()}

    return {
        group: texts(group, values) if isinstance(values, dict) else values
        for group, values in record.items()
    }


def _quote_value(element: re.Match[str]) -> str:
    """Returns an element of a value in quotes if it reads as a number or a truth value."""
    word = element[0].strip()
    try:
        float(word)
    except ValueError:
        return f"'{word}'" if word.lower() in ("true", "false") else element[0]
    return f"'{word}'"
