"""A coordinator that another program than train.py drives."""

import sys
from pathlib import Path

import pytest
from ranks import SMALL, SUPPORT, start, status


@pytest.mark.ranks
@pytest.mark.parametrize("copies", ["every_host", "rank_0"])
def test_it_makes_its_own_directory(tmp_path: Path, copies: str) -> None:
    """The command line has Hydra make it; here the run does, on two ranks that leave tokens in it."""
    program = [sys.executable, str(SUPPORT / "own_coordinator.py"), "new/run"]
    start([*SMALL, f"checkpoint.copies={copies}"], tmp_path, world_size=2, program=program).wait().ok()
    final = status(tmp_path / "new")
    assert (final["state"], final["step"], final["world_size"]) == ("completed", 6, 2)
    run = tmp_path / "new/run"
    assert run.stat().st_mode & 0o777 == 0o700
    assert not list(run.glob(".disk-*"))
