"""Rank 0's say: it gives the first weights, makes sure that all ranks run the same program, and decides when
to act.

There is no server: after the first broadcast every rank holds the same weights and keeps them equal by
applying the same update. What only one rank can know (a clock, a signal) travels as flags inside the
gradient's own reduction.
"""

import hashlib
import json
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_ring
from mlx_ring.communicator import Communicator
from mlx_ring.errors import ClusterError, TrainingError, agreed
from mlx_ring.host_probe import digest
from mlx_ring.mlx_version import MLX_VERSION

Arrays = dict[str, mx.array]

REMEDIES = {
    "mlx_ring": "install the same version on every host",
    "source": "a checkout is stale: bring every host to the same commit",
    "mlx": "install the same version on every host",
    "data": "copy the data to that host, or set data.distribute=true",
    "parameters": "the model's code differs: bring every host to the same version",
    "fast_synch": "set MLX_METAL_FAST_SYNCH alike on every host, best not at all",
}


@dataclass(frozen=True)
class Plan:
    """What is due after a step, the same on every rank."""

    verify: bool
    evaluate: bool
    save: bool
    stop: bool


def sha256_of(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(array: mx.array) -> mx.array:
    """A uint32 that changes with any one word: the sum mod 2^32 of the words, each times an odd number.

    Exact on every device, for integers may be added in any order.
    """
    words = array.reshape(-1).view({1: mx.uint8, 2: mx.uint16}.get(array.itemsize, mx.uint32))
    weights = 2 * mx.arange(words.size, dtype=mx.uint32) + 1
    return (words.astype(mx.uint32) * weights).sum()


def checksums(arrays: Arrays) -> list[int]:
    """The checksum of each array, in the order of the sorted paths."""
    sums: Any = mx.stack([checksum(arrays[path]) for path in sorted(arrays)]).tolist()
    return sums


def odd_one_out(values: list[Any]) -> tuple[int, int] | None:
    """The first place that differs from the most common value, and the first place of that; None where all
    are equal. Of equally common values the first counts."""
    usual = values.index(Counter(values).most_common(1)[0][0])
    odd = next((place for place, value in enumerate(values) if value != values[usual]), None)
    return None if odd is None else (odd, usual)


def parameter_shapes(parameters: Arrays) -> dict[str, str]:
    """Each parameter's path with its dtype and shape, as text."""
    return {path: f"{array.dtype} {array.shape}" for path, array in parameters.items()}


def agree(communicator: Communicator, record: dict[str, Any]) -> None:
    """Refuse to go on unless all ranks show the same record; `host` alone may differ.

    Two rounds: the records, then every rank's verdict, so that all leave together.
    Collective: every rank must call. Raises: ClusterError naming the rank, the host and both values.
    """
    records = communicator.gather_objects(record)
    differences = [text for rank in range(1, len(records)) for text in _differences(rank, records)]
    verdicts = communicator.gather_objects(differences)
    refused = list(dict.fromkeys(text for verdict in verdicts for text in verdict))
    if refused:
        more = f" (and {len(refused) - 1} more differences)" if len(refused) > 1 else ""
        raise agreed(ClusterError(f"the ranks do not agree: {refused[0]}{more}"))


def program_record() -> dict[str, Any]:
    """What this rank runs: its host, the versions, and a digest of this package's own code.

    A stale checkout bears the same version.
    """
    return {
        "host": socket.gethostname(),
        "mlx_ring": mlx_ring.__version__,
        "source": digest(Path(mlx_ring.__file__).parent, "*.py"),
        "mlx": MLX_VERSION,
        "fast_synch": os.environ.get("MLX_METAL_FAST_SYNCH", ""),
    }


class ParameterAuthority:
    """Decides for all ranks; built on every rank, with the same arguments."""

    def __init__(
        self,
        communicator: Communicator,
        *,
        total_steps: int,
        verify_every_steps: int | None,
        evaluate_every_steps: int | None,
        save_every_steps: int | None,
        save_every_seconds: float | None,
    ) -> None:
        self._communicator = communicator
        self._total_steps = total_steps
        self._verify_every_steps = verify_every_steps
        self._evaluate_every_steps = evaluate_every_steps
        self._save_every_steps = save_every_steps
        self._save_every_seconds = save_every_seconds
        self._last_save = time.monotonic()
        self.stop_requested = False  # set from a signal

    def broadcast(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays, bit for bit. Collective: every rank must call, with arrays of the same shapes."""
        return self._communicator.broadcast(arrays)

    def verify(self, parameters: Arrays, step: int) -> str:
        """Make sure that every rank holds the same parameters. Collective: every rank must call.

        Returns: a digest of them (SHA-256, hex, of their checksums).
        Raises: TrainingError on every rank, naming the odd rank and the first parameter that differs.
        """
        own = checksums(parameters)
        table, hosts = self._communicator.gather_objects(own), self._communicator.hosts
        for path, sums in zip(sorted(parameters), zip(*table, strict=True), strict=True):
            if pair := odd_one_out(list(sums)):
                two = [f"{sums[rank]:08x} on rank {rank} ({hosts[rank]})" for rank in pair]
                raise agreed(
                    TrainingError(
                        f"replicas differ after step {step}: {path} has checksum {two[0]} and {two[1]}; that "
                        "machine is at fault, or it is of another kind and rounds otherwise (use machines of "
                        "one kind), or the model changes its own arrays; the newest checkpoint is from before"
                    )
                )
        return sha256_of(own)

    def flags(self) -> list[float]:
        """This rank's wishes, to be summed over ranks: [stop, save by the clock]."""
        by_clock = (
            self._communicator.rank == 0
            and self._save_every_seconds is not None
            and time.monotonic() - self._last_save >= self._save_every_seconds
        )
        return [float(self.stop_requested), float(by_clock)]

    def saved(self) -> None:
        """A checkpoint is on its way: the clock of `save_every_seconds` starts anew."""
        self._last_save = time.monotonic()

    def may_be_due(self, step: int) -> bool:
        """Whether the step's number alone asks for something, to be done before any later step is issued."""
        return (
            step >= self._total_steps
            or _due(step, self._verify_every_steps)
            or _due(step, self._evaluate_every_steps)
            or _due(step, self._save_every_steps)
        )

    def decide(self, step: int, flags: list[float]) -> Plan:
        """What is due after `step`, from the summed flags: equal on every rank, with no further message."""
        stop, by_clock = flags[0] > 0, flags[1] > 0
        last = stop or step >= self._total_steps
        save = last or by_clock or _due(step, self._save_every_steps)
        evaluate = step >= self._total_steps or _due(step, self._evaluate_every_steps)
        # What is evaluated or saved must be every rank's.
        verify = evaluate or save or _due(step, self._verify_every_steps)
        return Plan(verify=verify, evaluate=evaluate, save=save, stop=last)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


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
    return text[:12] if len(text) == 64 else text[:80]  # a SHA-256 is told by its beginning
