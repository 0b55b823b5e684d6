"""Holds the markers to the truth: an unmarked test that starts ranks or hosts fails as it starts them."""

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kernels import precompile_header
from ranks import train

LAUNCHERS = {"train.py", "mlx.launch", "mpirun"}
# Modules that are a rank, or that start ranks.
PROGRAMS = re.compile(
    r"\bmlx_ring\.(train|cluster\.agent|cluster\.rank\.openblas|communication\.selftest)(?!\w)"
)
HEADER = pytest.StashKey[Path | None]()  # the compiled one, if this process has made it
_running: list[pytest.Item] = []


def pytest_configure(config: pytest.Config) -> None:
    # Ranks would ignore what is ignored here, as under nohup.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    if not hasattr(config, "workerinput"):  # once, before pytest-xdist starts its workers
        config.stash[HEADER] = precompile_header()


def pytest_unconfigure(config: pytest.Config) -> None:
    if header := config.stash.get(HEADER, None):
        header.unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.clear()


def needed_markers(command: Sequence[str]) -> set[str]:
    """The markers of which a test needs one before it may start this command."""
    names = [Path(word).name for word in command]
    if command[0] == "ip" and "netns" in command:
        return {"hosts"}
    supervised = "mlx-ring" in names and "run" in command
    benchmark = any(Path(word).parent.name == "benchmarks" for word in command)
    program = any(PROGRAMS.search(word) for word in command)
    if supervised or benchmark or program or LAUNCHERS.intersection(names):
        return {"ranks", "hosts"}
    return set()


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event != "subprocess.Popen" or not _running:
        return
    command, environment = arguments[1], arguments[3]
    assert isinstance(command, list | tuple)
    needed = needed_markers([str(word) for word in command])
    if isinstance(environment, dict) and Path(environment.get("MLX_HOSTFILE") or "none").is_file():
        needed = {"ranks", "hosts"}  # a rank of a ring, whatever its program
    marked = {mark.name for mark in _running[0].iter_markers()}
    if needed and not needed & marked:
        pytest.fail(f"it starts {command[:4]} and is marked neither of {sorted(needed)}")


sys.addaudithook(_watch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a completed `run` of six steps, saved every three. For tests that copy it."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, "checkpoint.every_steps=3").ok()
    return folder
