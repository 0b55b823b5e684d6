"""The configuration as plain dictionaries: what goes on disk, and what a resumed run may change."""

import math
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "passphrase", "credential", "auth"}
TEXT_ALONE = {"token", "key", "auth"}  # whose numbers (max_tokens, key_size) are no secrets


def record(composed: DictConfig | ListConfig) -> Any:
    """The configuration as it goes on disk: interpolations unresolved, secret-like values redacted.

    A list may hold overrides (`key=value`): one that speaks of a secret loses its value.
    """

    def redact(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                str(key): "<redacted>" if is_secret(str(key), value) else redact(value)
                for key, value in node.items()
            }
        if isinstance(node, list):
            return [redact(item) for item in node]
        if isinstance(node, float) and not math.isfinite(node):
            return str(node)  # JSON has no such number
        return redacted(node) if isinstance(node, str) and "=" in node else node

    return redact(OmegaConf.to_container(composed, resolve=False, enum_to_str=True))


def redacted(override: str) -> str:
    """An override (`key=value`) without its value, where it speaks of a secret."""
    names = re.findall(r"([\w.]+)\s*[:=]", override)
    return override.partition("=")[0] + "=<redacted>" if any(map(is_secret, names)) else override


def is_secret(key: str, value: Any = "") -> bool:
    """Whether a word of a key's last part (apiKey, hf_tokens) names a secret, and the value may be one;
    `tokens` alone is data."""
    name = key.rpartition(".")[2]
    words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
    found = words & SECRET_WORDS
    if value is None or (isinstance(value, int | float) and found <= TEXT_ALONE):
        return False
    return name != "tokens" and bool(found)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, where) if isinstance(value, dict) and value else {where: value}
    return flat


def to_yaml(recorded: Any) -> str:
    """A record as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded))
