"""The configuration as plain dictionaries: what goes on disk, and what a resumed run may change."""

import hashlib
import json
import math
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mlx_ring.errors import ConfigError

SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "passphrase", "credential", "auth"}

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
                str(key): "<redacted>" if is_secret(str(key)) and value is not None else redact(value)
                for key, value in node.items()
            }
        if isinstance(node, list):
            return [redact(item) for item in node]
        if isinstance(node, float) and not math.isfinite(node):
            return str(node)  # JSON has no such number
        if isinstance(node, str) and "=" in node:
            names = re.findall(r"([\w.]+)\s*[:=]", node)
            return node.partition("=")[0] + "=<redacted>" if any(map(is_secret, names)) else node
        return node

    return redact(OmegaConf.to_container(composed, resolve=False, enum_to_str=True))


def is_secret(key: str) -> bool:
    """Whether a word of a key's last part (apiKey, hf_tokens) names a secret; `tokens` alone is data."""
    name = key.rpartition(".")[2]
    words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
    return name != "tokens" and not words.isdisjoint(SECRET_WORDS)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, where) if isinstance(value, dict) and value else {where: value}
    return flat


def fixed_sha256(values: dict[str, Any]) -> str:
    """Digest of the resolved values, by dotted key, that a resumed run may not change."""
    fixed = {
        key: value for key, value in values.items() if value is not None and not key.startswith(RESUMABLE)
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], *, resolved_alike: bool = True) -> None:
    """Compare two records; `resolved_alike` says whether their look-ups gave the same values.

    Raises: ConfigError for the first field that a resumed run may not change, with both values.
    """
    before, after = flatten(saved), flatten(now)
    remedy = "give the old value, or start a new run with checkpoint.initialize_from"
    for key in sorted({*before, *after}, key=lambda key: (not key.endswith(".name"), key)):  # the model first
        if not key.startswith(RESUMABLE) and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key} is {after.get(key)} now and was {before.get(key)} when the checkpoint was saved; a "
                f"resumed run cannot change it: {remedy}"
            )
    looked_up = [key for key, value in after.items() if "${" in str(value) and not key.startswith(RESUMABLE)]
    if looked_up and not resolved_alike:
        raise ConfigError(
            f"one of {', '.join(looked_up)} looks up another value now than when the checkpoint was saved; a "
            f"resumed run cannot change it: {remedy}"
        )


def to_yaml(recorded: Any) -> str:
    """A record as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded))
