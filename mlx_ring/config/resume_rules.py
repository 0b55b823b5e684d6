"""What a resumed run may change, and what may differ between the hosts of one run."""

import hashlib
import json
from typing import Any

from mlx_ring.config.redaction import flatten
from mlx_ring.errors import ConfigError

# What a resumed run may change; data.path may move as long as the data's digest stays.
RESUMABLE = (
    "trainer.steps", "trainer.split", "run.", "cluster.", "metrics.", "checkpoint.", "evaluation.", "memory.",
    "communicator.backend", "communicator.overlap", "communicator.bucket_bytes", "data.path",
)  # fmt: skip


# What may differ between the hosts of one run.
HOST_KEYS = {"data.path", "data.cache_dir", "cluster.hostfile", "metrics.console", "run.dir"}


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
