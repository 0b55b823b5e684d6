"""A custom data set that goes wrong where a test wants it to: `data.import_path=broken_data:build`."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from mlx_ring.data import report_progress
from mlx_ring.data.sources import Dataset, DataSpec


class Samples:
    """32 easy samples; the fault happens when this rank's loader reaches the batch that starts at
    `at_call`."""

    def __init__(self, fault: str, rank: int, at_call: int, repeats: int, once: bool = False) -> None:
        self.fault, self.at_call, self.repeats, self.calls = fault, at_call, repeats, 0
        self.once = once
        self.mine = int(os.environ.get("MLX_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))) == rank

    def __len__(self) -> int:
        return 64

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        trains = threading.current_thread() is not threading.main_thread()  # not a look before the first step
        self.calls += trains
        inputs = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)[indices]
        due = trains and self.mine and self.at_call <= self.calls < self.at_call + self.repeats
        if due and self.once:  # also over restarts
            due = not Path("faulted").exists()
            Path("faulted").touch()
        if due and self.fault == "not_finite":
            inputs = inputs * np.nan
        elif due and self.fault == "raise":
            raise RuntimeError("the disk caught fire")
        elif due and self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif due and self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif due and self.fault == "exit":
            os._exit(0)
        elif due and self.fault == "wait":
            Path("reached").touch()
            threading.Event().wait()
        elif due and self.fault == "tell":
            Path("reached").touch()
        elif due and self.fault == "shout":  # a line that is long and no text
            os.write(1, b"\xff" * 300_000 + b"\n")
        elif due and self.fault == "slow":
            time.sleep(0.05)
        elif due and self.fault == "meet":  # two runs at once
            Path(f"came-{os.getpid()}").touch()
            while len(list(Path().glob("came-*"))) < 2:
                time.sleep(0.01)
        elif due and self.fault == "pause":
            Path("reached").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        unlabelled = due and self.fault == "unlabelled"
        return inputs, np.where(unlabelled, -1, indices % 3).astype(np.int32)


def build(fault: str, rank: int = 1, at_call: int = 5, repeats: int = 1, once: bool = False) -> Dataset:
    spec = DataSpec(kind="classifier", input_shape=(8,), num_classes=3)
    calm = Samples("", rank, 0, 0)
    return Dataset(
        spec=spec, digest="0" * 64, train=Samples(fault, rank, at_call, repeats, once), held_out=calm
    )


class HeldOut(Samples):
    """512 samples. While there is a file `slow`, an evaluation is, and tells that it has begun."""

    def __len__(self) -> int:
        return 512

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        if self.calls > 3 and Path("slow").exists():  # the first ones may be looks before the first step
            Path("evaluating").touch()
            time.sleep(0.2)
        return super().batch(indices % 64)


def long_evaluation() -> Dataset:
    """An evaluation takes 26 s on one rank with micro-batches of 4."""
    spec = DataSpec(kind="classifier", input_shape=(8,), num_classes=3)
    calm = Samples("", 0, 0, 0)
    return Dataset(spec=spec, digest="0" * 64, train=calm, held_out=HeldOut("", 0, 0, 0))


def long(how: str, rank: int, seconds: float) -> Dataset:
    """Takes this many seconds on one rank, and shows in one way that it is at work, or in none."""
    mine = int(os.environ.get("MLX_RANK", "0")) == rank
    end = time.monotonic() + (seconds if mine else 0.0)
    child = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    done = 0
    while (left := end - time.monotonic()) > 0:
        done += 1
        if how == "sleeps":
            time.sleep(left)
        elif how == "child works":
            subprocess.run([sys.executable, "-c", child], check=True)
        elif how == "reads":
            Path(__file__).read_bytes()
            Path(sys.executable).read_bytes()
            time.sleep(0.5)
        elif how == "reports":
            report_progress(np.int64(done), 100, "shards")  # pyright: ignore
            time.sleep(0.5)
    return build("")


def slow() -> Dataset:
    """Takes for ever, as a long preparation seems to."""
    Path("reached").touch()
    threading.Event().wait()
    raise AssertionError
