"""What the benchmarks conclude from what they saw."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import growth
import harness

STEPS = np.arange(20_000.0)
NOISE = np.random.default_rng(0)


@pytest.mark.parametrize("planted", [0.0, 3e-3])
def test_a_slope_is_told_from_none(planted: float) -> None:
    found, half = growth.slope(STEPS, 100 + planted * STEPS + NOISE.normal(size=STEPS.size))
    assert abs(found - planted) < 2 * half and (abs(found) > half) == (planted > 0)


@pytest.mark.parametrize("leaked", [0, 40])
def test_a_leak_is_told_from_rare_jumps(leaked: int) -> None:
    """Pages of 4096 bytes: two touched at some time, and one after every 500 steps."""
    pages = 2.0 * (STEPS > 14_000) + leaked * (STEPS // 500) / 40
    found, half = growth.drift(STEPS, 4096 * pages)
    assert (found > half) == (leaked > 0)


def test_too_short_a_run_proves_nothing() -> None:
    with pytest.raises(harness.Failed, match="too fast"):
        growth.drift(STEPS[:30], STEPS[:30])


@pytest.mark.parametrize("text", ["", "0,1", "1,1", "two"])
def test_numbers_that_make_no_sense_are_refused(text: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--ranks", type=harness.numbers(1))
    assert parser.parse_args(["--ranks", "4,1"]).ranks == [4, 1]
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--ranks", text])
