"""The configuration as plain values without secrets: what may be written to disk or compared."""

import math
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "passphrase", "credential", "auth"}
SECRET_IF_TEXT = {"token", "key", "auth"}  # numbers under these words (max_tokens, key_size) are no secrets


def redact(composed: DictConfig | ListConfig) -> Any:
    """Returns a composed configuration as plain dictionaries and lists, fit for the disk.

    Look-ups (`${…}`) stay as they were typed, secret-like values become "<redacted>", enums become their
    names, and numbers that JSON lacks (nan, inf) become text. In a list of overrides (`key=value`), one
    that names a secret loses its value.
    """

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                str(key): "<redacted>" if is_secret(str(key), value) else plain(value)
                for key, value in node.items()
            }
        if isinstance(node, list):
            return [plain(item) for item in node]
        if isinstance(node, float) and not math.isfinite(node):
            return str(node)
        return redact_override(node) if isinstance(node, str) and "=" in node else node

    return plain(OmegaConf.to_container(composed, resolve=False, enum_to_str=True))


def redact_override(override: str) -> str:
    """Returns an override (`key=value`), without its value if it names a secret."""
    names = re.findall(r"([\w.]+)\s*[:=]", override)
    return override.partition("=")[0] + "=<redacted>" if any(map(is_secret, names)) else override


def redacted_yaml(composed: DictConfig) -> str:
    """Returns a composed configuration as YAML without secrets."""
    return to_yaml(redact(composed))


def is_secret(key: str, value: Any = "") -> bool:
    """Tells whether a word in the last part of a dotted key (apiKey, hf_tokens) names a secret.

    A number is no secret under the words of SECRET_IF_TEXT, and a key that is just `tokens` holds data.
    """
    name = key.rpartition(".")[2]
    words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
    found = words & SECRET_WORDS
    if value is None or (isinstance(value, int | float) and found <= SECRET_IF_TEXT):
        return False
    return name != "tokens" and bool(found)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Returns the values of a nested dictionary by dotted key; an empty dictionary counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, where) if isinstance(value, dict) and value else {where: value}
    return flat


def to_yaml(plain: Any) -> str:
    """Returns plain values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(plain))
