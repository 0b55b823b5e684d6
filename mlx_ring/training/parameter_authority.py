"""Rank 0's say: it gives the first weights, makes sure that all ranks run the same program, and decides when
to act.

There is no server: after the first broadcast every rank holds the same weights and keeps them equal by
applying the same update. What only one rank can know (a clock, a signal) travels as flags inside the
gradient's own reduction.
"""

import time
from dataclasses import dataclass

from mlx_ring.communication.agreement import checksums, odd_one_out, sha256_of
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import TrainingError, agreed


@dataclass(frozen=True)
class Plan:
    """What is due after a step, the same on every rank."""

    verify: bool
    evaluate: bool
    save: bool
    stop: bool


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
