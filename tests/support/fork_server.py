"""Starts Python programs as forks of a process that has already loaded what a rank loads.

Two thirds of a rank's time in a test is loading MLX, NumPy, Hydra and this package. Here a server loads them
once for every worker of pytest. Each program is still a process of its own, with its own arguments,
environment, directory and output, and runs its file from the first line, as `__main__`.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

# What the loader, Python or a library reads before the first line of a program.
READ_AT_LOAD = ("LD_", "PYTHON", "OPENBLAS_", "OMP_", "MLX_DISABLE")
MESSAGE_BYTES = 200_000
ROOT = Path(__file__).parents[2]
LOADED = (
    "mlx_ring.train", "mlx_ring.run.coordinator", "mlx_ring.cli.commands", "numpy.random",
    "hydra_plugins.mlx_ring_launcher", "hydra_plugins.mlx_ring_optuna",
)  # fmt: skip


def can_fork(command: Sequence[str], variables: dict[str, str]) -> bool:
    """Whether a fork does what a new interpreter would: no option of Python's, no variable that it reads."""
    if sys.platform != "linux" or command[0] != sys.executable or not Path(command[1]).is_file():
        return False
    folder = Path(command[1]).parent
    if (folder / "mlx_ring").exists() and folder != ROOT:  # another copy of the package than the one loaded
        return False
    names = {name for name in variables.keys() | os.environ.keys() if name.startswith(READ_AT_LOAD)}
    return all(variables.get(name) == os.environ.get(name) for name in names - {"PYTHONPATH"})


class ForkedProcess:
    """A started program, with the methods of `subprocess.Popen` that tests use. Its input is empty."""

    def __init__(self, command: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self._server = _server()
        sys.audit("subprocess.Popen", command[0], command, cwd, env)  # the same event: see conftest.py
        self._printed: tuple[str, str] | None = None
        request = {"argv": list(command[1:]), "cwd": str(Path(cwd).resolve()), "env": env}
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            # Opened anew: the program writes at the end while a test reads from the start.
            self.stdout, self.stderr = (_reader(file) for file in (stdout, stderr))
            self.pid: int = self._server.ask(request, (stdout, stderr))

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.01)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended."""
        self.wait(timeout)
        if self._printed is None:
            with self.stdout, self.stderr:
                self.stdout.seek(0)
                self._printed = self.stdout.read(), self.stderr.read()
        return self._printed

    def send_signal(self, number: int) -> None:
        try:
            ended = self.poll() is not None
        except OSError:  # its server is gone, but the program may still run
            ended = False
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _reader(file: IO[bytes]) -> IO[str]:
    return Path(f"/proc/self/fd/{file.fileno()}").open()


class _Server:
    """The connection to a server of this process's own. The server ends when the connection does."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_BYTES)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())], pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], files: Sequence[IO[bytes]] = ()) -> Any:
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [file.fileno() for file in files])
            answer = self._socket.recv(MESSAGE_BYTES)
            assert answer, "the server that starts ranks has ended"
        except BaseException:  # such as a test's time limit: the next answer would be that of this question
            _server.cache_clear()
            self._socket.close()
            raise
        return json.loads(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@cache
def _server() -> _Server:
    return _Server()


def _load() -> None:
    """Imports what a rank imports, and starts no thread and no computation."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in LOADED:
        import_module(name)
    OverridesParser.create().parse_overrides(["trainer.steps=1", "model.hidden_sizes=[1]"])


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Answers requests. Returns: a request to start a program, in the new process that is to run it."""
    while True:
        message, files, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                for target, file in enumerate(files, start=1):
                    os.dup2(file, target)
        for file in files:
            os.close(file)
        if answer == 0 and "poll" not in request:
            return request
        connection.send(json.dumps(answer).encode())


def _run(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    """Runs the file `argv[0]`, as a new interpreter would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    np.random.seed()  # noqa: NPY002 - else all forks would share the state that users may draw from
    tempfile.tempdir = None  # else TMPDIR would not be read
    own = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(argv[0]).resolve().parent), *own, *sys.path[1:]]
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to its whole group
    _load()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        request = _serve(connection)
    _run(**request)
