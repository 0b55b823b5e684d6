"""Kills a process again and again while it saves checkpoints, and reads all that it left.

    python killed_while_saving.py CHECKPOINTS KILLS

Prints "readable" for each checkpoint that it reads and "interrupted" for each save that was cut short. Fails
if a checkpoint cannot be read, or if one is lost whose end was reported.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.checkpoint_files import HostArray


def save_for_ever(checkpoints: Path, pipe: int) -> None:
    """Saves one checkpoint after another; reports the step of each in four bytes."""
    disk.sweep(checkpoints)
    while True:
        step = max([disk.step_of(path) for path in disk.scan(checkpoints)], default=0) + 1
        arrays = {"a": HostArray("float32", (1 << 17,), np.full(1 << 17, step, np.float32))}
        disk.write(checkpoints, step, {"model": arrays, "optimizer": arrays}, {"progress": {"step": step}})
        os.write(pipe, step.to_bytes(4, "little"))
        for old in disk.scan(checkpoints)[3:]:
            disk.remove(old)


def kill_once(checkpoints: Path, seconds: float) -> int:
    """Kills such a process this long after its first save. Returns the last step that it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(checkpoints, writing)
    os.close(writing)
    reported = os.read(reading, 4)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported += os.read(reading, 1 << 16)
    os.close(reading)
    return int.from_bytes(reported[-4:], "little")


def main() -> None:
    checkpoints, kills = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(0)
    for _ in range(kills):
        reported = kill_once(checkpoints, chance.uniform(0, 0.03))
        found = disk.scan(checkpoints)
        assert disk.step_of(found[0]) >= reported, "one is lost"
        for path in found:
            assert disk.verify(path)["step"] == disk.step_of(path)
            print("readable")
        for _path in checkpoints.glob(".*"):
            print("interrupted")


if __name__ == "__main__":
    main()
