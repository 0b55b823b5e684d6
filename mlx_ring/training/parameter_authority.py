"""What rank 0 decides: the first weights, whether all ranks still hold the same ones, and what is due when.

There is no server. After the first broadcast every rank holds the same weights, and keeps them equal by
applying the same update. What only one rank can know (a clock, a signal) travels as flags in the gradients'
own reduction.
"""

import time
from dataclasses import dataclass

from mlx_ring.communication.agreement import checksums, first_outlier, sha256_of
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import TrainingError, agreed
from mlx_ring.training.rank_flags import RankFlags


@dataclass(frozen=True)
class Plan:
    """What is due after a step, the same on every rank."""

    verify: bool
    evaluate: bool
    save: bool
    stop: bool


class ParameterAuthority:
    """Decides for all ranks what is due. Every rank has one, built with the same arguments."""

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
        """None for an interval: not at any interval."""
        self._communicator = communicator
        self._total_steps = total_steps
        self._verify_every_steps = verify_every_steps
        self._evaluate_every_steps = evaluate_every_steps
        self._save_every_steps = save_every_steps
        self._save_every_seconds = save_every_seconds
        self._last_save = time.monotonic()
        self.stop_requested = False  # a signal handler sets it

    def broadcast(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays, bit for bit. Collective: every rank must call, with arrays of the same shapes."""
        return self._communicator.broadcast(arrays)

    def verify(self, parameters: Arrays, step: int) -> str:
        """Checks that every rank holds the same parameters. Collective: every rank must call.

        Args:
            parameters: this rank's, by dotted path.
            step: the number of finished updates, for the message.

        Returns: a digest of the parameters (SHA-256, hex, of their checksums).

        Raises:
            TrainingError: on every rank, naming the rank that differs and the first parameter that does.
        """
        own = checksums(parameters)
        table = self._communicator.gather_objects(own)
        hosts = self._communicator.hosts
        for path, sums in zip(sorted(parameters), zip(*table, strict=True), strict=True):
            if pair := first_outlier(list(sums)):
                two = [f"{sums[rank]:08x} on rank {rank} ({hosts[rank]})" for rank in pair]
                raise agreed(
                    TrainingError(
                        f"replicas differ after step {step}: {path} has checksum {two[0]} and {two[1]}; that "
                        "machine is at fault, or it is of another kind and rounds otherwise (use machines of "
                        "one kind), or the model changes its own arrays; the newest checkpoint is from before"
                    )
                )
        return sha256_of(own)

    def flags(self) -> RankFlags:
        """What this rank asks for, to be told to all ranks."""
        by_clock = (
            self._communicator.rank == 0
            and self._save_every_seconds is not None
            and time.monotonic() - self._last_save >= self._save_every_seconds
        )
        return RankFlags(stop=self.stop_requested, save=by_clock)

    def saved(self) -> None:
        """Notes that a checkpoint is being written: the clock of `save_every_seconds` starts again."""
        self._last_save = time.monotonic()

    def evaluation_is_due(self, step: int) -> bool:
        """Whether the weights after `step` are to be evaluated. The first weights are not."""
        if step == 0:
            return False
        return step >= self._total_steps or _due(step, self._evaluate_every_steps)

    def may_be_due(self, step: int) -> bool:
        """Whether something is due after `step` by its number alone: no later step may be issued before."""
        return (
            self.evaluation_is_due(step)
            or _due(step, self._verify_every_steps)
            or _due(step, self._save_every_steps)
        )

    def decide(self, step: int, flags: list[RankFlags]) -> Plan:
        """What is due after `step`. All ranks hold the same flags, so they decide alike, with no message.

        Args:
            step: the number of finished updates.
            flags: every rank's, of that step.
        """
        stop = any(each.stop for each in flags)
        by_clock = any(each.save for each in flags)
        last = stop or step >= self._total_steps
        save = last or by_clock or _due(step, self._save_every_steps)
        evaluate = self.evaluation_is_due(step)
        # What is evaluated or saved must be what every rank holds.
        verify = evaluate or save or _due(step, self._verify_every_steps)
        return Plan(verify=verify, evaluate=evaluate, save=save, stop=last)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
