"""The configuration as plain dictionaries: what goes on disk, and what a resumed run may change."""

import hashlib
import json
import math
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mlx_ring.errors import ConfigError

SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "passphrase", "credential", "auth"}
TEXT_ALONE = {"token", "key", "auth"}  # whose numbers (max_tokens, key_size) are no secrets

# What a resumed run may change; data.path may move as long as the data's digest stays.
RESUMABLE = (
    "trainer.steps", "trainer.split", "run.", "cluster.", "metrics.", "checkpoint.", "evaluation.", "memory.",
    "communicator.backend", "communicator.overlap", "communicator.bucket_bytes", "data.path",
)  # fmt: skip
# What may differ between the hosts of one run.
HOST_KEYS = {"data.path", "data.cache_dir", "cluster.hostfile", "metrics.console", "run.dir"}


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


def look_ups(recorded: dict[str, Any]) -> list[str]:
    """The dotted keys whose values are looked up (`${oc.env:…}`), and that a resumed run may not change."""
    return [
        key
        for key, value in flatten(recorded).items()
        if "${" in str(value) and not key.startswith(RESUMABLE)
    ]


def look_ups_sha256(recorded: dict[str, Any], resolved: dict[str, Any]) -> str:
    """Digest of what these look-ups gave; `resolved` is the configuration's values by dotted key."""
    under = tuple(f"{key}." for key in look_ups(recorded))
    values = {key: value for key, value in resolved.items() if f"{key}.".startswith(under)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], *, resolved_alike: bool = True) -> None:
    """Compare two records; `resolved_alike` says whether their look-ups gave the same values.

    A field that the saved record lacks came with a later version; only what users name may come anew.

    Raises: ConfigError for the first field that a resumed run may not change, with both values.
    """
    before, after = flatten(saved), flatten(now)
    remedy = "give the old value, or start a new run with checkpoint.initialize_from"
    for key in sorted({*before, *after}, key=lambda key: (not key.endswith(".name"), key)):  # the model first
        new = key not in before and ".arguments" not in key
        if not new and not key.startswith(RESUMABLE) and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key} is {after.get(key)} now and was {before.get(key)} when the checkpoint was saved; a "
                f"resumed run cannot change it: {remedy}"
            )
    if not resolved_alike:
        raise ConfigError(
            f"one of {', '.join(look_ups(now))} looks up another value now than when the checkpoint was "
            f"saved; a resumed run cannot change it: {remedy}"
        )


def to_yaml(recorded: Any) -> str:
    """A record as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded))
