"""Checks that all ranks hold the same and run the same program."""

import hashlib
import json
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_ring
from mlx_ring.cluster.hosts.host_probe import digest
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import MLX_VERSION
from mlx_ring.errors import ClusterError, agreed

REMEDIES = {
    "mlx_ring": "install the same version on every host",
    "source": "a checkout is stale: bring every host to the same commit",
    "mlx": "install the same version on every host",
    "data": "copy the data to that host, or set data.distribute=true",
    "parameters": "the model's code differs: bring every host to the same version",
    "fast_synch": "set MLX_METAL_FAST_SYNCH alike on every host, best not at all",
}


def sha256_of(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(array: mx.array) -> mx.array:
    """A uint32 scalar that changes if any one word of the array does.

    It is the sum mod 2^32 of the array's words, each times an odd number. It is exact on every device,
    because integers may be added in any order.
    """
    words = array.reshape(-1).view({1: mx.uint8, 2: mx.uint16}.get(array.itemsize, mx.uint32))
    weights = 2 * mx.arange(words.size, dtype=mx.uint32) + 1
    return (words.astype(mx.uint32) * weights).sum()


def checksums(arrays: Arrays) -> list[int]:
    """The checksum of each array, in the order of the sorted paths."""
    sums: Any = mx.stack([checksum(arrays[path]) for path in sorted(arrays)]).tolist()
    return sums


def first_outlier(values: list[Any]) -> tuple[int, int] | None:
    """The first place whose value differs from the most common one, and the first place of that one.

    If several values are equally common, the one that comes first counts as the most common. Returns None if
    all values are equal.
    """
    usual = values.index(Counter(values).most_common(1)[0][0])
    odd = next((place for place, value in enumerate(values) if value != values[usual]), None)
    return None if odd is None else (odd, usual)


def parameter_shapes(parameters: Arrays) -> dict[str, str]:
    """Each parameter's path with its dtype and shape, as text."""
    return {path: f"{array.dtype} {array.shape}" for path, array in parameters.items()}


def agree(communicator: Communicator, record: dict[str, Any]) -> None:
    """Refuses to go on unless all ranks give the same values. Collective: every rank must call.

    There are two rounds: the values, then every rank's verdict on them, so that all ranks leave together.

    Args:
        record: this rank's JSON values, by name. `host`, its host name, is the only one that may differ.

    Raises:
        ClusterError: on every rank, naming the rank, its host and both values.
    """
    records = communicator.gather_objects(record)
    differences = [text for rank in range(1, len(records)) for text in _differences(rank, records)]
    verdicts = communicator.gather_objects(differences)
    refused = list(dict.fromkeys(text for verdict in verdicts for text in verdict))
    if refused:
        more = f" (and {len(refused) - 1} more differences)" if len(refused) > 1 else ""
        raise agreed(ClusterError(f"the ranks do not agree: {refused[0]}{more}"))


def _differences(rank: int, records: list[dict[str, Any]]) -> list[str]:
    first, other = records[0], records[rank]
    found: list[str] = []
    for key in first:
        if key == "host" or first[key] == other.get(key):
            continue
        mine, theirs = first[key], other.get(key)
        name, remedy = key, REMEDIES.get(key, "start every rank with the same command on the same checkout")
        if isinstance(mine, dict) and isinstance(theirs, dict):  # the configuration: name the field
            name = next(field for field in {**mine, **theirs} if mine.get(field) != theirs.get(field))
            mine, theirs = mine.get(name), theirs.get(name)
        found.append(
            f"{name} is {_short(theirs)} on rank {rank} (host {other['host']}) "
            f"and {_short(mine)} on rank 0 (host {first['host']}); {remedy}"
        )
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else text[:80]  # the beginning of a SHA-256 is enough


def program_record() -> dict[str, Any]:
    """What this rank runs: its host, the versions, and a digest of this package's own code.

    The digest is there because a stale checkout has the same version.
    """
    return {
        "host": socket.gethostname(),
        "mlx_ring": mlx_ring.__version__,
        "source": digest(Path(mlx_ring.__file__).parent, "*.py"),
        "mlx": MLX_VERSION,
        "fast_synch": os.environ.get("MLX_METAL_FAST_SYNCH", ""),
    }
