"""Hosts on one machine: network namespaces joined by a switch in one more, an sshd in each, real ssh.

`ip netns exec` mounts /etc/netns/NAME over /etc, so that keys and ssh settings are each host's own and the
user's are never touched. Nothing is attached to a real network. The hosts share the kernel, the clock, the
numbers of processes and, but for private directories, the files. Needs root, iproute2 and openssh-server.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import psutil
from kernels import share_kernels
from network_switch import NAMESPACES, Bridge, UserSpaceSwitch, run

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SETTINGS = Path("/etc/netns")  # of hosts, by namespace
ENVIRONMENT_PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])

SSH_CONFIG = """Host {network}.*
  IdentityFile /etc/ssh/id
  UserKnownHostsFile /etc/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 10
"""
SSHD_CONFIG = """ListenAddress {address}
HostKey /etc/ssh/hostkey
AuthorizedKeysFile /etc/ssh/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile {folder}/sshd-{number}.pid
SetEnv TMPDIR={folder}/tmp
"""


def _available() -> bool:
    tools = [shutil.which(name) for name in ("ip", "tc", "unshare", "nsenter", "ssh", "ssh-keygen")]
    if os.geteuid() != 0 or None in tools or not Path(SSHD).exists():
        return False
    # root of a container may lack the right to do it
    return subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode == 0


AVAILABLE = _available()


class Cluster:
    """Hosts 1 … N, host n at `addresses[n - 1]`, of the cluster's own network. Use as a context manager.

    A path in `private` is a directory of its own on every host, empty at first; it outlives a crash. What is
    made is removed when the context ends, or when this process does, however it ends.
    """

    def __init__(
        self, folder: Path, hosts: int, private: Sequence[Path] = (), *, user_space_switch: bool = False
    ) -> None:
        """`folder` takes the hosts' logs and disks, and lies in none of the private directories."""
        self._folder, self._private = folder.resolve(), [path.resolve() for path in private]
        assert not any(self._folder.is_relative_to(path) for path in self._private)
        self._numbers = range(1, hosts + 1)
        self._switch_class = UserSpaceSwitch if user_space_switch else Bridge
        self._sshd: dict[int, int] = {}  # process by host

    def __enter__(self) -> "Cluster":
        self.name, self._network = _claim()
        self.addresses = [f"{self._network}.{number}" for number in self._numbers]
        # It removes the cluster at the end of its input: when told to, or when this process is no more.
        self._guard = subprocess.Popen(
            [sys.executable, __file__, self.name], stdin=subprocess.PIPE, start_new_session=True
        )
        with ExitStack() as undo:
            undo.callback(self._await_guard)
            self._switch = self._switch_class(self._host(0))
            undo.callback(self._switch.close)
            self._up()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def down(self) -> None:
        """Remove all that was made, but for files in `folder`."""
        self._undo.close()

    def _await_guard(self) -> None:
        self._guard.communicate()
        assert self._guard.returncode == 0, f"cluster {self.name} could not be removed"

    # What runs on a host

    def inside(self, number: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on host `number`, in the directory where it is given."""
        assert number in self._sshd, f"host {number} has crashed"
        enter = f"nsenter --target {self._sshd[number]} --net --mount"
        return ["sh", "-c", f'exec {enter} -- env --chdir="$PWD" "$@"', "sh", *command]

    def processes(self, number: int) -> dict[int, str]:
        """The command line of every process of a host, but for its sshd and what serves a login."""
        found: dict[int, str] = {}
        for pid in _pids(self._host(number)):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if not process.name().startswith("sshd"):
                    found[pid] = shlex.join(process.cmdline())
        return found

    def disk(self, number: int, path: Path | None = None) -> Path:
        """Where the private directory `path` (usually the first) of a host is seen from outside."""
        index = self._private.index(path.resolve()) if path else 0
        return self._folder / f"disk-{number}" / str(index)

    # What befalls a host

    def cut(self, number: int) -> None:
        """Pull the host's cable at the switch: both sides hear nothing, no FIN, no RST."""
        self._switch.cut(number)

    def heal(self, number: int) -> None:
        self._switch.heal(number)

    def link_down(self, number: int) -> None:
        """Take down the host's own interface: the host knows that it has no network."""
        run("ip", "-n", self._host(number), "link", "set", "eth0", "down")

    def link_up(self, number: int) -> None:
        run("ip", "-n", self._host(number), "link", "set", "eth0", "up")

    def crash(self, number: int) -> None:
        """As a loss of power: nobody hears of it, no process is left."""
        self.cut(number)
        _kill(self._host(number))
        del self._sshd[number]

    def boot(self, number: int) -> None:
        """Start a crashed host again."""
        self._start_sshd(number)
        self.heal(number)

    def cable(self, one: int, other: int, network: str) -> None:
        """A second link between two hosts: eth1, with addresses .1 and .2 of a network such as "10.9.0"."""
        ends = [self._host(one), self._host(other)]
        run("ip", "link", "add", "eth1", "netns", ends[0], "type", "veth", "peer", "eth1", "netns", ends[1])
        for last, host in enumerate(ends, start=1):
            run("ip", "-n", host, "address", "add", f"{network}.{last}/24", "dev", "eth1")
            run("ip", "-n", host, "link", "set", "eth1", "up")

    def rate(self, number: int | Literal["all"], rate: str) -> None:
        """Limit what a host sends, as in "100mbit". Raises: NotImplementedError on a kernel that cannot."""
        for each in self._numbers if number == "all" else [number]:
            limit = f"tbf rate {rate} burst 128kb latency 100ms"
            line = f"tc -n {self._host(each)} qdisc replace dev eth0 root {limit}"
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode != 0:
                raise NotImplementedError(f"{line}: {done.stderr}")

    def delay(self, milliseconds: float, loss_percent: float = 0) -> None:
        """Delay every frame, one way, and lose some. For a cluster with the user-space switch."""
        assert isinstance(self._switch, UserSpaceSwitch)
        self._switch.delay(milliseconds, loss_percent)

    # Up

    def _host(self, number: int) -> str:
        return f"{self.name}-{number}"

    def _up(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        (self._folder / "tmp").mkdir(parents=True, exist_ok=True)
        share_kernels(self._folder / "tmp")
        for path in self._private:
            path.mkdir(parents=True, exist_ok=True)
        _keygen(self._folder / "id")
        for number in self._numbers:
            self._plug_in(number, self._host(number))
            self._set_up_ssh(number, SETTINGS / self._host(number))
        for number in self._numbers:
            shutil.copy(self._folder / "known_hosts", SETTINGS / self._host(number) / "ssh")
            self._start_sshd(number)

    def _plug_in(self, number: int, host: str) -> None:
        run("ip", "netns", "add", host)
        run("ip", "-n", host, "link", "set", "lo", "up")
        self._switch.plug_in(number, host)
        run("ip", "-n", host, "addr", "add", f"{self.addresses[number - 1]}/24", "dev", "eth0")
        run("ip", "-n", host, "link", "set", "eth0", "up")

    def _set_up_ssh(self, number: int, etc: Path) -> None:
        address = self.addresses[number - 1]
        (etc / "ssh").mkdir(parents=True)
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "ssh/ssh_config").write_text(SSH_CONFIG.format(network=self._network))
        (etc / "ssh/sshd_config").write_text(
            SSHD_CONFIG.format(folder=self._folder, address=address, number=number)
        )
        for name in ("id", "id.pub"):
            shutil.copy(self._folder / name, etc / "ssh")
        _keygen(etc / "ssh/hostkey")
        kind, key, *_ = (etc / "ssh/hostkey.pub").read_text().split()
        with (self._folder / "known_hosts").open("a") as file:
            file.write(f"{address} {kind} {key}\n")

    def _start_sshd(self, number: int) -> None:
        """Its mount namespace, which `ip netns exec` makes, is the host's: private directories lie in it."""
        script = ""
        for path in self._private:
            self.disk(number, path).mkdir(parents=True, exist_ok=True)
            script += f"mount --bind {shlex.quote(str(self.disk(number, path)))} {shlex.quote(str(path))} && "
        log, running = self._folder / f"sshd-{number}.log", self._folder / f"sshd-{number}.pid"
        running.unlink(missing_ok=True)
        script += f"exec {SSHD} -f /etc/ssh/sshd_config -E {shlex.quote(str(log))}"
        run("ip", "netns", "exec", self._host(number), "sh", "-c", script)
        # written once it listens
        wait_until(lambda: running.exists() and running.read_text().endswith("\n"), f"sshd runs: see {log}")
        self._sshd[number] = int(running.read_text())


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = 20) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s until {what}"
        time.sleep(0.01)


def _claim() -> tuple[str, str]:
    """A name that no other cluster of this machine has, held by its switch's namespace, and its network."""
    for index in (number % 2**16 for number in range(os.getpid(), os.getpid() + 100)):
        name = f"mr{index}"
        done = subprocess.run(["ip", "netns", "add", f"{name}-0"], capture_output=True, text=True)
        if done.returncode == 0:
            return name, f"10.{index >> 8}.{index & 255}"
    raise AssertionError(f"no network namespace could be made: {done.stderr}")


def _keygen(path: Path) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _pids(host: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def _kill(host: str) -> None:
    """Kill every process of a host, also those begun meanwhile."""

    def nobody_is_left() -> bool:
        pids = _pids(host)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(nobody_is_left, f"the processes of {host} are gone")


def _remove(name: str) -> None:
    hosts = [path.name for path in NAMESPACES.glob(f"{name}-*")]
    for host in hosts:
        _kill(host)
    for host in sorted(hosts, reverse=True):  # the switch, which holds the name, is the last
        shutil.rmtree(SETTINGS / host, ignore_errors=True)
        run("ip", "netns", "del", host)


if __name__ == "__main__":
    sys.stdin.read()
    _remove(sys.argv[1])
