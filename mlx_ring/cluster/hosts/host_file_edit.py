"""Changes a host file: adds and removes hosts, changes addresses, and leaves its other settings alone."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from mlx_ring.cluster.hosts.host_file import HostFile, check_ssh_name, parse_hostfile, read_hostfile
from mlx_ring.cluster.hosts.host_json import read_json
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.whole_file import whole_file

SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"


class HostFileEdit:
    """The content of a host file that exists or is to be made. Nothing is written before `save`."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """`make`: whether the file may be missing. Raises: ConfigError if the file has a mistake."""
        self.path = path
        self._subject = f"host file {path}"
        self.file: HostFile | None = None
        self._content: dict[str, Any] = {"backend": "ring", "envs": [], "hosts": []}
        if path.exists() or not make:
            self.file = read_hostfile(path)
            content: Any = read_json(path, self._subject)
            self._content |= content if isinstance(content, dict) else {"hosts": content}

    @property
    def names(self) -> list[str]:
        """The hosts in the file, each once, in the order of their ranks."""
        return self.file.names if self.file is not None else []

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that are set on every host."""
        return self.file.envs if self.file is not None else {}

    @property
    def addresses(self) -> dict[str, tuple[str, ...]]:
        """The addresses of each host in the file."""
        return {host.ssh: host.ips for host in self.file.hosts} if self.file is not None else {}

    def refuse_several_addresses(self) -> None:
        """Raises: ConfigError if hosts have several addresses each: only a person can choose those."""
        if any(len(ips) > 1 for ips in self.addresses.values()):
            raise ConfigError(f"{self.path} gives several addresses a host: correct it by hand")

    def refuse_listed(self, names: list[str]) -> None:
        """Raises: ConfigError for a name that no host can have, or that is in the file already."""
        for name in names:
            check_ssh_name("mlx-ring hosts add", name)
            if name in self.names or names.count(name) > 1:
                raise ConfigError(
                    f"{name} is listed in {self.path} already; for two ranks there, write its line twice"
                )

    def add(self, name: str, address: str) -> None:
        """Adds a host with one address, as the last rank."""
        self._content["hosts"].append({"ssh": name, "ips": [address]})

    def remove(self, names: tuple[str, ...]) -> None:
        """Removes hosts. Raises: ConfigError if one is not in the file, or none would be left."""
        for name in names:
            if name not in self.names:
                raise ConfigError(f"{name} is not listed in {self.path}; it has {', '.join(self.names)}")
        rest = [entry for entry in self._content["hosts"] if entry["ssh"] not in names]
        if not rest:
            raise ConfigError(f"{names[-1]} is the last host of {self.path}; remove the file instead")
        self._content["hosts"] = rest

    def replace(self, file: HostFile) -> None:
        """Takes the hosts of another file, in its order."""
        self._content["hosts"] = [{"ssh": host.ssh, "ips": list(host.ips)} for host in file.hosts]

    def set_address(self, name: str, address: str) -> None:
        """Gives a host this address instead of its old ones."""
        for entry in self._content["hosts"]:
            if entry["ssh"] == name:
                entry["ips"] = [address]

    def set_path(self, python: str) -> None:
        """Adds the PATH that `mlx.launch … train.py` needs on a host, unless the file sets one.

        Over ssh no login shell sets it.
        """
        if "PATH" not in self.environment:
            self._content["envs"] = [*self._content["envs"], path_variable(python)]

    def save(self) -> None:
        """Writes the file, one host a line.

        Raises: ConfigError, and leaves the file as it was, if the new content has a mistake.
        """
        self.file = parse_hostfile(self._content, self._subject)
        *rest, hosts = sorted(self._content.items(), key=lambda item: item[0] == "hosts")
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rest]
        entries = ",\n".join(f"    {json.dumps(entry)}" for entry in hosts[1])
        lines.append(f'  "hosts": [\n{entries}\n  ]')
        path = self.path.resolve()  # a link stays a link
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A host's variables may be secrets: the file keeps its permissions.
            mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
            with whole_file(path, mode=mode) as new:
                new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._subject} cannot be written: {error.strerror}") from None


def path_variable(python: str = sys.executable) -> str:
    """Returns PATH=… with the folder of that interpreter, which holds `train.py` and `mlx.launch` too."""
    return f"PATH={os.path.dirname(python)}:{SYSTEM_PATH}"  # noqa: PTH120 - a path on another host
