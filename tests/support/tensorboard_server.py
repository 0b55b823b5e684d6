"""A real `tensorboard`, asked over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any


class Server:
    """On a free loopback port, with the loader that Apple silicon has. Use as a context manager."""

    def __init__(self, directory: Path, log: IO[bytes]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}/data/plugin/"
        options = [
            "--host=127.0.0.1",
            f"--port={port}",
            "--load_fast=false",
            "--samples_per_plugin=scalars=1000",
        ]
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={directory}", *options]
        self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Server":
        try:
            deadline = time.monotonic() + 120
            while not self._answers():
                assert time.monotonic() < deadline and self._process.poll() is None, (
                    "tensorboard does not answer"
                )
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _answers(self) -> bool:
        try:
            self.get("scalars/tags")
        except OSError:  # not listening yet
            return False
        return True

    def get(self, path: str, **query: str) -> Any:
        address = f"{self._address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            return json.load(reply)

    def session_groups(self) -> list[dict[str, Any]]:
        """The rows of the view of hyperparameters."""
        request = {
            "experimentName": "", "startIndex": 0, "sliceSize": 10, "aggregationType": "AGGREGATION_AVG",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
            "colParams": [],
        }  # fmt: skip
        try:
            return self.get("hparams/session_groups", request=json.dumps(request))["sessionGroups"]
        except urllib.error.HTTPError:  # nothing was read yet
            return []
