"""One run of `mlx-ring run` under a stop-watch: what it prints and when, its processes, what it leaves."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local_ranks
import psutil

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"  # the latter for broken_data.py
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring")), "run"]
TINY = (
    "run.dir=run", "communicator=exact", "trainer.global_batch_size=32", "trainer.micro_batch_size=4",
    "trainer.compile=false", "model.hidden_sizes=[16]", "model.dropout=0", "metrics.tensorboard=false",
    "evaluation.every_steps=null", "metrics.log_every_steps=1", "checkpoint.every_steps=20", "data=custom",
    "data.import_path=broken_data:build", "data.prefetch=1", "schedule=constant",
)  # fmt: skip
STEP = re.compile(r"\] step (\d+)/")
FOR_EVER = "trainer.steps=1000000"


class TimedRun:
    """A supervised run in a folder of its own, which starts at once.

    As a context manager it ends all processes of the run and removes the folder.
    """

    def __init__(
        self, *options: str, overrides: tuple[str, ...] = (), fault: str = "{fault: none}",
        wrap: Callable[[list[str]], list[str]] = lambda command: command, folder: Path | None = None,
    ) -> None:  # fmt: skip
        """Starts the run.

        Args:
            options: options of `mlx-ring run`.
            overrides: added to those of a tiny model.
            fault: the arguments of `tests/support/broken_data.py`.
            wrap: turns the command into one that runs elsewhere, such as on an emulated host.
            folder: the working directory; a temporary one by default.
        """
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mlx_ring-fault-"))
        self.record = self.folder / "run"
        self.lines: list[tuple[float, str]] = []
        command = [*PROGRAM, *options, "--", *TINY, f"data.arguments={fault}", *overrides]
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            wrap(command), cwd=self.folder, env=local_ranks.environment_of_ranks(PYTHONPATH=PYTHONPATH),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "TimedRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for process in self.left():
            process.kill()
        self.process.wait()
        self._reader.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    # What the run does

    def seen(self, pattern: str, since: float = 0.0, seconds: float = 120.0) -> tuple[float, str]:
        """Waits for a line that matches and was printed after `since`. Returns its time and the line.

        Raises: TimeoutError with the newest lines.
        """
        deadline = time.monotonic() + seconds
        position = 0
        while True:
            lines = self.lines[position:]
            for at, line in lines:
                if at >= since and re.search(pattern, line):
                    return at, line
            position += len(lines)
            if time.monotonic() > deadline or (
                self.process.poll() is not None and not self._reader.is_alive()
            ):
                raise TimeoutError(f"{pattern!r} was not printed:\n{self.told()}")
            time.sleep(0.005)

    def trains(self, since: float = 0.0, beyond: int = 0) -> tuple[float, int]:
        """Waits until a step greater than `beyond` is logged after `since`. Returns its time and the step.

        Raises: TimeoutError with the newest lines.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for at, step in self.steps():
                if at >= since and step > beyond:
                    return at, step
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.005)
        raise TimeoutError(f"no step beyond {beyond} was logged:\n{self.told()}")

    def steps(self) -> list[tuple[float, int]]:
        """Returns each step that was logged, after the time at which it was."""
        return [(at, int(match[1])) for at, line in list(self.lines) if (match := STEP.search(line))]

    @property
    def step(self) -> int:
        """The newest step that was logged."""
        return self.steps()[-1][1]

    def told(self) -> str:
        """Returns the newest lines."""
        return "\n".join(line for _, line in self.lines[-60:])

    def wait(self, seconds: float = 120) -> int:
        """Waits until the run has ended. Returns its exit status."""
        status = self.process.wait(seconds)
        self._reader.join()
        return status

    def stop(self) -> int:
        """Stops the run as Ctrl-C does, so that it saves first. Returns its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    # What the run consists of, and what it leaves

    def ranks(self) -> dict[int, psutil.Process]:
        """Returns the processes of the ranks, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in self.left():
            try:
                if any(part.endswith("train.py") for part in process.cmdline()):
                    found[int(process.environ()["MLX_RANK"])] = process
            except (psutil.Error, KeyError):
                continue
        return found

    def left(self) -> list[psutil.Process]:
        """Returns the processes whose working directory is the run's folder: supervisor, agents and ranks."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def orphans(self, seconds: float = 20.0) -> int:
        """Waits until no process is left, or for this many seconds. Returns how many are left."""
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(left)

    def status(self) -> dict[str, Any]:
        return json.loads((self.record / "status.json").read_text())

    def rows(self, kind: str) -> list[dict[str, Any]]:
        text = (self.record / "metrics.jsonl").read_text()
        return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.rows("train")}


@functools.cache
def reference(steps: int) -> dict[int, float]:
    """Returns the losses of the first steps of the same run on one rank to which nothing happens."""
    with TimedRun("-n", "1", overrides=(f"trainer.steps={steps}",)) as run:
        assert run.wait(600) == 0, run.told()
        return run.losses()
