"""Two hosts on one machine: network namespaces joined by a bridge in a third, an sshd in each, real ssh.

`ip netns exec` mounts /etc/netns/NAME over /etc, so that keys and ssh settings are each host's own and the
user's are never touched. Nothing is attached to a real network. Needs root, iproute2 and openssh-server.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
AVAILABLE = os.geteuid() == 0 and shutil.which("ip") is not None and Path(SSHD).exists()

SSH_CONFIG = """Host 10.77.0.*
  IdentityFile {folder}/id
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 10
"""
SSHD_CONFIG = """ListenAddress {address}
HostKey /etc/ssh/hostkey
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile {folder}/sshd-{number}.pid
"""


class Cluster:
    """Hosts 10.77.0.1 … N. Use as a context manager."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self._folder, self._prefix = folder, f"mr{os.getpid()}"
        self.addresses = [f"10.77.0.{number}" for number in range(1, hosts + 1)]

    def __enter__(self) -> "Cluster":
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def inside(self, number: int, command: list[str]) -> list[str]:
        """The command that runs `command` on host `number`, counted from 1."""
        return ["ip", "netns", "exec", f"{self._prefix}-{number}", *command]

    def _up(self) -> None:
        switch = f"{self._prefix}-0"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self._folder}/id")
        Path("/run/sshd").mkdir(exist_ok=True)
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, address in enumerate(self.addresses, start=1):
            name = f"{self._prefix}-{number}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run(
                "ip",
                "link",
                "add",
                f"port{number}",
                "netns",
                switch,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            _run("ip", "-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            self._ssh(number, address, Path("/etc/netns") / name)

    def _ssh(self, number: int, address: str, etc: Path) -> None:
        (etc / "ssh").mkdir(parents=True)
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{etc}/ssh/hostkey")
        (etc / "ssh/ssh_config").write_text(SSH_CONFIG.format(folder=self._folder))
        (etc / "ssh/sshd_config").write_text(
            SSHD_CONFIG.format(folder=self._folder, address=address, number=number)
        )
        kind, key, *_ = (etc / "ssh/hostkey.pub").read_text().split()
        with (self._folder / "known_hosts").open("a") as file:
            file.write(f"{address} {kind} {key}\n")
        _run(*self.inside(number, [SSHD, "-f", "/etc/ssh/sshd_config"]))

    def _down(self) -> None:
        for number in range(len(self.addresses) + 1):
            name = f"{self._prefix}-{number}"
            pids = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


ENVIRONMENT_PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
