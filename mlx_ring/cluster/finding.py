"""Defines a check's finding and prints findings, for `mlx-ring doctor` and `mlx-ring hosts`."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_ring.errors import ClusterError

# One of our processes prints its result as JSON after this mark, because other lines may be printed too.
FOUND = "found: "
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding, with the fields that `--json` prints."""

    name: str  # the check's name
    host: str
    status: Status
    detail: str  # what was found
    remedy: str  # what to do about it; empty if the status is ok


def ok(name: str, host: str, detail: str) -> Check:
    """Returns a finding that nothing is wrong."""
    return Check(name=name, host=host, status="ok", detail=detail, remedy="")


def warn(name: str, host: str, detail: str, remedy: str) -> Check:
    """Returns a finding of a problem with which the hosts can still train."""
    return Check(name=name, host=host, status="warn", detail=detail, remedy=remedy)


def fail(name: str, host: str, detail: str, remedy: str) -> Check:
    """Returns a finding of a problem with which the hosts cannot train."""
    return Check(name=name, host=host, status="fail", detail=detail, remedy=remedy)


def read_result(output: str) -> Any:
    """Returns the last result that one of our processes printed after FOUND; None if it printed none."""
    results = [line.partition(FOUND)[2] for line in output.splitlines() if FOUND in line]
    return json.loads(results[-1]) if results else None


def failed(checks: Iterable[Check]) -> list[Check]:
    """Returns the failures among these findings."""
    return [check for check in checks if check.status == "fail"]


def report(found: Iterable[Check], echo: Callable[[str], None], *, as_json: bool, with_hosts: bool) -> None:
    """Prints findings with `echo`.

    Args:
        found: the findings; each is printed as soon as its check is done.
        echo: prints one line.
        as_json: whether to print all findings at the end, as one JSON object, instead of line by line.
        with_hosts: whether a line names the host.

    Raises: ClusterError, after all findings are printed, if one is a failure.
    """
    checks: list[Check] = []
    for check in found:
        checks.append(check)
        if not as_json:
            where = f" on {check.host}" if with_hosts and check.host else ""
            echo(f"{check.name}{where} … [{check.status}] {check.detail}")
            if check.remedy:
                echo(f"    {check.remedy}")
    if as_json:
        echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    if bad := failed(checks):
        names = [f"{check.name} on {check.host}" if with_hosts else check.name for check in bad]
        raise ClusterError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(names)}")
