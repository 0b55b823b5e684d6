"""One run of `mlx-ring run` under a stop-watch: what it printed and when, its processes, what it left."""

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
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"  # where broken_data.py is
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
    """Started at once, in a folder of its own. Use as a context manager, which removes all that is left."""

    def __init__(
        self, *options: str, overrides: tuple[str, ...] = (), fault: str = "{fault: none}",
        wrap: Callable[[list[str]], list[str]] = lambda command: command, folder: Path | None = None,
    ) -> None:  # fmt: skip
        """`wrap` makes the command one that runs elsewhere, such as on an emulated host."""
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

    # What it does

    def seen(self, pattern: str, since: float = 0.0, seconds: float = 120.0) -> tuple[float, str]:
        """When a line was printed that matches, and the line. Raises: TimeoutError with all lines."""
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
        """When a step greater than `beyond` was first logged, and which."""
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
        """When each step was logged."""
        return [(at, int(match[1])) for at, line in list(self.lines) if (match := STEP.search(line))]

    @property
    def step(self) -> int:
        """The newest step logged."""
        return self.steps()[-1][1]

    def told(self) -> str:
        return "\n".join(line for _, line in self.lines[-60:])

    def wait(self, seconds: float = 120) -> int:
        status = self.process.wait(seconds)
        self._reader.join()
        return status

    def stop(self) -> int:
        """As by Ctrl-C: it saves and leaves."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    # What it consists of, and leaves

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks."""
        found: dict[int, psutil.Process] = {}
        for process in self.left():
            try:
                if any(part.endswith("train.py") for part in process.cmdline()):
                    found[int(process.environ()["MLX_RANK"])] = process
            except (psutil.Error, KeyError):
                continue
        return found

    def left(self) -> list[psutil.Process]:
        """The processes that work in its folder, of it or of its ranks."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def orphans(self, seconds: float = 20.0) -> int:
        """How many processes are left so long after the end."""
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
def reference(steps: int = 3000) -> dict[int, float]:
    """The losses of the same run on one rank to which nothing happens."""
    with TimedRun("-n", "1", overrides=(f"trainer.steps={steps}",)) as run:
        assert run.wait(600) == 0, run.told()
        return run.losses()
