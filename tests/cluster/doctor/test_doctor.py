"""The command mlx-ring doctor, run as a process: on this machine, and on operations that do not repeat."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from ranks import environment

from mlx_ring.cluster.finding import Check
from mlx_ring.training.exact.doctor_checks import exact_check
from mlx_ring.training.exact.operations import Operation, operations

CLI = "from mlx_ring.cli import main; main()"
PLANTED = """
import mlx.core as mx
import mlx_ring.training.exact.doctor_checks
from mlx_ring.training.exact.operations import Operation

steady = Operation(name="steady", prepare=lambda: lambda: mx.ones((3,)))
fickle = Operation(name="fickle", prepare=lambda: lambda: mx.random.normal((3,)), {instead})
mlx_ring.training.exact.doctor_checks.operations = lambda gpu: [steady, fickle]
"""


def doctor(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + CLI, "doctor", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def checks_of(ended: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    printed: Any = json.loads(ended.stdout)
    assert list(printed) == ["checks"]
    for check in printed["checks"]:
        assert list(check) == ["name", "host", "status", "detail", "remedy"]
        assert all(isinstance(value, str) for value in check.values())
        assert check["host"] == socket.gethostname()
        assert (check["status"] == "ok") == (check["remedy"] == "")
    return printed["checks"]


def fickle(**more: Any) -> Operation:
    return Operation(name="planted", prepare=lambda: lambda: [mx.zeros((2,)), mx.random.normal((3,))], **more)


def steady(compute: Callable[[], Any], **more: Any) -> Operation:
    return Operation(name="planted", prepare=lambda: compute, **more)


# This machine


@pytest.mark.ranks
def test_this_machine() -> None:
    """The doctor examines this machine and starts two ranks on it."""
    ended = doctor("--json", "data=synthetic")
    assert (ended.returncode, ended.stderr) == (0, "")
    checks = {check["name"]: check for check in checks_of(ended)}
    for name in ("reachable", "python", "mlx", "mlx_ring", "source", "disk", "address 127.0.0.1"):
        assert checks[name]["status"] == "ok", checks[name]
    assert checks["data"]["detail"].startswith("synthetic, digest ")
    assert checks["launch"]["detail"].startswith("2 ranks joined and left")
    for name, figure in (("latency", r"\d+ µs"), ("bandwidth", r"\d+\.\d\d Gbit/s")):
        assert re.match(figure, checks[name]["detail"]), checks[name]
    assert checks["exit status"]["detail"] == "rank 1 left with 42, and that status arrived here"


def test_lines_for_a_reader() -> None:
    ended = doctor("--python", "/nowhere/python")
    assert ended.returncode == 3 and ended.stderr == "error: 1 of 2 checks failed: reachable\n", ended
    assert ended.stdout.splitlines() == [
        "reachable … [fail] /nowhere/python cannot be run: No such file or directory",
        "    give an interpreter that is there, with --python",
        "launch … [warn] not tried",
        "    mend what failed above, then run the doctor again",
    ]


def test_overrides_with_a_mistake_are_status_2() -> None:
    ended = doctor("--", "data=nothing")
    assert ended.returncode == 2 and "there is no data=nothing" in ended.stderr, ended


# Exactness


def test_every_operation_repeats_on_this_machine() -> None:
    """All repeat on a CPU with the BLAS of MLX's wheel; a GPU may give warnings."""
    ended = doctor("--exact", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    checks = checks_of(ended)
    table = operations(gpu=mx.default_device() == mx.gpu)
    assert [check["name"] for check in checks] == [
        *(f"exact: {operation.name}" for operation in table),
        "exact: all that exact mode uses",
    ]
    if mx.default_device() == mx.cpu:
        assert {check["status"] for check in checks} == {"ok"}
    for check in checks[:-1]:
        assert re.match(
            r"8 repeats, \d distinct results?, \d+\.\d{3} ms, digest [0-9a-f]{8}", check["detail"]
        )
    relied_on = sum(not operation.instead for operation in table)
    assert re.match(rf"digest [0-9a-f]{{12}} of {relied_on} operations on .+, MLX \d", checks[-1]["detail"])


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_an_operation_that_does_not_repeat_is_status_3(arguments: list[str]) -> None:
    ended = doctor("--exact", *arguments, before=PLANTED.format(instead=""))
    assert ended.returncode == 3
    assert ended.stderr.startswith(
        "error: 2 of 3 checks failed: exact: fickle, exact: all that exact mode uses"
    )
    assert len(ended.stderr.splitlines()) == 1
    if arguments:
        assert [check["status"] for check in checks_of(ended)] == ["ok", "fail", "fail"]
    else:
        steady, fickle, remedy, together, _ = ended.stdout.splitlines()
        assert steady.startswith("exact: steady … [ok] 8 repeats, 1 distinct result, ")
        assert fickle.startswith("exact: fickle … [fail] 8 repeats, 8 distinct results, ")
        assert remedy == "    do not use communicator=exact here with a model that computes fickle"
        assert together.startswith("exact: all that exact mode uses … [fail] digest ")


def test_one_that_exact_mode_replaces_only_warns() -> None:
    planted = PLANTED.format(instead="instead='another is used', remedy='use that too'")
    first, second = (doctor("--exact", "--json", before=planted) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    checks = checks_of(first)
    assert [check["status"] for check in checks] == ["ok", "warn", "ok"]
    assert checks[1]["detail"].endswith("; another is used") and checks[1]["remedy"] == "use that too"
    # The digest over all operations covers only those that repeat, so another process gets the same.
    assert checks_of(second)[2] == checks[2]


# One check


def test_each_distinct_result_counts() -> None:
    results = iter([0, 0, 1, 1, 2])
    check, _ = exact_check(steady(lambda: mx.array(next(results))), repeats=4)  # one more warms up
    assert check.status == "fail" and "4 repeats, 3 distinct results" in check.detail


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32, mx.bool_])
def test_one_bit_changes_the_digest(dtype: mx.Dtype) -> None:
    one, other = mx.zeros((5,), dtype=dtype), (mx.arange(5) == 3).astype(dtype)
    digests = [exact_check(steady(lambda array=array: {"a": array}))[1] for array in (one, other, one)]
    assert digests[0] == digests[2] != digests[1]


def test_a_known_result_must_come_out() -> None:
    check, _ = exact_check(steady(lambda: mx.array([0, 2]), expected=[0, 1]))
    assert check.status == "fail" and check.detail.endswith("; it gave [0, 2] for [0, 1]")
    check, _ = exact_check(steady(lambda: mx.array([0, 2]), expected=[0, 2]))
    assert check.status == "ok"


def test_an_operation_the_device_does_not_have_fails() -> None:
    def compute() -> Any:
        raise ValueError("no such\nkernel")

    check, _ = exact_check(steady(compute))
    assert (check.status, check.detail) == ("fail", "it ended in an error: no such kernel")


def test_a_remedy_is_given_where_there_is_one() -> None:
    remedies = [exact_check(fickle(**more))[0] for more in ({}, {"remedy": "use another"})]
    assert all(isinstance(check, Check) and check.status == "fail" for check in remedies)
    assert [check.remedy for check in remedies] == [
        "do not use communicator=exact here with a model that computes planted",
        "use another",
    ]


def test_the_table_of_a_gpu_has_both_dtypes() -> None:
    """Building the table needs no GPU: inputs are made only when an operation's turn comes."""
    names = [operation.name for operation in operations(gpu=True)]
    assert len(set(names)) == len(names)
    in_float32 = {name.removesuffix(", float32") for name in names if name.endswith(", float32")}
    assert in_float32 == {name.removesuffix(", bfloat16") for name in names if name.endswith(", bfloat16")}
    assert {"attention, reproducible", "embedding rows, reproducible", "a whole transformer"} <= in_float32
