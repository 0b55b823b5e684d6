"""Checks whether this machine repeats the bits of a gradient, for `mlx-ring doctor --exact`.

Exact mode needs a micro-batch's gradient to have the same bits every time and on every machine of the run.
Each operation is repeated on equal inputs, and the bits are compared. Machines of the same kind print equal
digests.
"""

import hashlib
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_ring.cluster.finding import Check, Status
from mlx_ring.cluster.rank.environment import refuse_temporary_folder
from mlx_ring.communication.agreement import checksums, sha256_of
from mlx_ring.communication.machine import describe_machine
from mlx_ring.training.exact.operations import Operation, operations

REPEATS = 8


def exact_checks() -> Iterator[Check]:
    """Yields one check per operation, as soon as it is done, and at the end one check for all of them."""
    refuse_temporary_folder()
    digests: list[str] = []
    failed = 0
    for operation in operations(gpu=mx.default_device() == mx.gpu):
        check, digest = exact_check(operation)
        failed += check.status == "fail"
        if not operation.instead:
            digests.append(digest)
        yield check
        mx.clear_cache()
    together = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]
    yield _check(
        "all that exact mode uses",
        "fail" if failed else "ok",
        f"digest {together} of {len(digests)} operations on {describe_machine()}",
        "train with a communicator other than exact, or on another machine" if failed else "",
    )


def exact_check(operation: Operation, repeats: int = REPEATS) -> tuple[Check, str]:
    """Repeats an operation on equal inputs and compares the bits.

    Returns: the check, and a digest of the first result's bits: 8 hexadecimal digits, or "none" if the
        operation raised an error.
    """
    try:
        digests, seconds, values = _repeated(operation, repeats)
    except (RuntimeError, ValueError) as error:  # this device lacks the operation
        reason = " ".join(str(error).split())
        return _check(operation.name, "fail", f"it ended in an error: {reason}", _remedy(operation)), "none"
    distinct = len(set(digests))
    detail = (
        f"{repeats} repeats, {distinct} distinct result{'s' if distinct > 1 else ''}, "
        f"{statistics.median(seconds) * 1000:.3f} ms, digest {digests[0]}"
    )
    wrong = operation.expected is not None and values != operation.expected
    if wrong:
        detail += f"; it gave {values} for {operation.expected}"
    if distinct == 1 and not wrong:
        return _check(operation.name, "ok", detail, ""), digests[0]
    if operation.instead:
        return _check(operation.name, "warn", f"{detail}; {operation.instead}", operation.remedy), digests[0]
    return _check(operation.name, "fail", detail, _remedy(operation)), digests[0]


def _repeated(operation: Operation, repeats: int) -> tuple[list[str], list[float], Any]:
    """Returns each repeat's digest and time in seconds; and the last values if the right ones are known."""
    compute = operation.prepare()
    mx.eval(compute())  # compiles kernels and allocates memory, so the times below hold neither
    digests: list[str] = []
    seconds: list[float] = []
    values: Any = None
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        result = compute()
        mx.eval(result)
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
        arrays: dict[str, Any] = dict(tree_flatten(result))
        digests.append(sha256_of(checksums(arrays))[:8])
        if operation.expected is not None:
            (values,) = (array.tolist() for array in arrays.values())
        del result, arrays
    return digests, seconds, values


def _remedy(operation: Operation) -> str:
    return (
        operation.remedy or f"do not use communicator=exact here with a model that computes {operation.name}"
    )


def _check(name: str, status: Status, detail: str, remedy: str) -> Check:
    return Check(
        name=f"exact: {name}", host=socket.gethostname(), status=status, detail=detail, remedy=remedy
    )
