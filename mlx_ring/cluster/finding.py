"""One finding of `mlx-ring doctor`, and how findings are told. No mlx here."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_ring.errors import ClusterError

FOUND = "found: "  # begins the line in which a process of ours tells what it found, among what others print
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding, as `--json` prints it. `remedy` is empty where the status is ok."""

    name: str
    host: str
    status: Status
    detail: str
    remedy: str


def ok(name: str, host: str, detail: str) -> Check:
    return Check(name=name, host=host, status="ok", detail=detail, remedy="")


def warn(name: str, host: str, detail: str, remedy: str) -> Check:
    return Check(name=name, host=host, status="warn", detail=detail, remedy=remedy)


def fail(name: str, host: str, detail: str, remedy: str) -> Check:
    return Check(name=name, host=host, status="fail", detail=detail, remedy=remedy)


def found_in(text: str) -> Any:
    """What a process of ours told in a line of its output; None where it did not."""
    told = [line.partition(FOUND)[2] for line in text.splitlines() if FOUND in line]
    return json.loads(told[-1]) if told else None


def failed(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.status == "fail"]


def tell(found: Iterable[Check], echo: Callable[[str], None], *, as_json: bool, with_hosts: bool) -> None:
    """Print findings as they come, or all of them as JSON.

    Raises: ClusterError, after the last, where one is a failure.
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
