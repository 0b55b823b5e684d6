"""What a resumed run may change, and what may differ between the hosts of one run.

All functions take configurations as `mlx_ring.config.redaction.redact` returns them.
"""

import hashlib
import json
from typing import Any

from mlx_ring.config.redaction import flatten
from mlx_ring.errors import ConfigError

# Keys, or beginnings of keys, that a resumed run may change; data.path only if the data's digest stays.
RESUMABLE = (
    "trainer.steps", "trainer.split", "run.", "cluster.", "metrics.", "checkpoint.", "evaluation.", "memory.",
    "communicator.backend", "communicator.overlap", "communicator.bucket_bytes", "data.path",
)  # fmt: skip

# Keys that may differ between the hosts of one run.
HOST_KEYS = {"data.path", "data.cache_dir", "cluster.hostfile", "metrics.console", "run.dir"}


def look_ups(config: dict[str, Any]) -> list[str]:
    """Returns the dotted keys that hold a look-up (`${oc.env:…}`) and that a resumed run may not change."""
    return [
        key for key, value in flatten(config).items() if "${" in str(value) and not key.startswith(RESUMABLE)
    ]


def look_ups_sha256(config: dict[str, Any], resolved: dict[str, Any]) -> str:
    """Returns the SHA-256 (hex) of the values that these look-ups gave.

    Args:
        config: the configuration with its look-ups unresolved.
        resolved: the values of the same configuration by dotted key, resolved.
    """
    under = tuple(f"{key}." for key in look_ups(config))
    values = {key: value for key, value in resolved.items() if f"{key}.".startswith(under)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], *, resolved_alike: bool = True) -> None:
    """Checks that a resumed run changes nothing but what it may.

    A key that the saved configuration lacks is accepted, because a later version added it; a new key under
    `arguments` is refused, because the user added it.

    Args:
        saved: the configuration in the checkpoint.
        now: the configuration of the resumed run.
        resolved_alike: whether the look-ups of both gave the same values.

    Raises: ConfigError for the first key that differs and may not, with both values.
    """
    before, after = flatten(saved), flatten(now)
    remedy = "give the old value, or start a new run with checkpoint.initialize_from"
    for key in sorted({*before, *after}, key=lambda key: (not key.endswith(".name"), key)):  # the model first
        added = key not in before and ".arguments" not in key
        if not added and not key.startswith(RESUMABLE) and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key} is {after.get(key)} now and was {before.get(key)} when the checkpoint was saved; a "
                f"resumed run cannot change it: {remedy}"
            )
    if not resolved_alike:
        raise ConfigError(
            f"one of {', '.join(look_ups(now))} looks up another value now than when the checkpoint was "
            f"saved; a resumed run cannot change it: {remedy}"
        )
