"""What one rank tells all others in every step, beside its gradients."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class RankFlags:
    """One rank's flags of one step. They travel in the gradients' own reduction: no further message.

    To add one, add a field with the default False, 0 or 0.0, which means "nothing to tell". It travels as a
    float32 and is read back as the default's type; every rank gets the flags of all ranks.

    If any field of any rank is not 0, every rank reads the whole table. On a GPU that waits for all that was
    issued. So while steps are issued ahead, leave a measurement at 0 except in steps that need it.
    """

    stop: bool = False  # a signal asked this rank to stop
    save: bool = False  # rank 0's clock says that a checkpoint is due
    micro_batch_seconds: float = 0.0  # this rank's, for one micro-batch of the step before; 0: not known

    @property
    def asks(self) -> bool:
        """Whether this rank asks for something before any further step: steps issued after this are void."""
        return self.stop or self.save

    def to_floats(self) -> list[float]:
        """The fields in their order, for the wire."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_table(cls, table: Iterable[Iterable[float]]) -> list[Self]:
        """Every rank's flags, by rank, from rows of what `to_floats` gave."""
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}

        def read(row: Iterable[float]) -> dict[str, Any]:
            return {name: kinds[name](value) for name, value in zip(kinds, row, strict=True)}

        return [cls(**read(row)) for row in table]
