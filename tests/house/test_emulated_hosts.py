"""The emulated hosts do what they say: cut, crash, boot, disks of their own, nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, NAMESPACES, SETTINGS, Cluster, wait_until
from ranks import SUPPORT

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]

SSH_FAILED = 255


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all hosts see alike; of `shared`/own each has its own."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), 3, private=[shared / "own", shared / "other"]) as hosts:
        yield hosts


def ssh(
    hosts: Cluster, command: str, *, to: int, timeout_seconds: int = 10
) -> subprocess.CompletedProcess[str]:
    """From host 1."""
    line = ["ssh", "-n", "-o", f"ConnectTimeout={timeout_seconds}", hosts.addresses[to - 1], command]
    return subprocess.run(hosts.inside(1, line), capture_output=True, text=True)


def times_out(hosts: Cluster, *, to: int) -> bool:
    done = ssh(hosts, "true", to=to, timeout_seconds=1)
    return done.returncode == SSH_FAILED and "timed out" in done.stderr


def reached(hosts: Cluster, *, to: int) -> bool:
    return ssh(hosts, "true", to=to).returncode == 0


def test_hosts_are_reached_by_ssh_and_only_their_own_network_is(hosts: Cluster) -> None:
    for number in (1, 2, 3):
        shown = ssh(hosts, "ip -brief -4 address", to=number).stdout.split()
        assert [word for word in shown if "/" in word] == ["127.0.0.1/8", f"{hosts.addresses[number - 1]}/24"]
    assert ssh(hosts, "ip route", to=2).stdout.split()[0] == hosts.addresses[0].rpartition(".")[0] + ".0/24"


def test_a_cut_cable_is_silent_and_can_be_healed(hosts: Cluster) -> None:
    hosts.cut(2)
    assert times_out(hosts, to=2)
    assert reached(hosts, to=3)
    hosts.heal(2)
    assert reached(hosts, to=2)


def test_a_connection_survives_a_cut(hosts: Cluster, tmp_path: Path) -> None:
    """Neither side is told, so what was sent meanwhile arrives later."""
    line = hosts.inside(1, ["ssh", hosts.addresses[1], "cat"])
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as remote:
        assert remote.stdin and remote.stdout
        remote.stdin.write("before\n")
        remote.stdin.flush()
        assert remote.stdout.readline() == "before\n"
        hosts.cut(2)
        assert times_out(hosts, to=2)
        remote.stdin.write("after\n")
        remote.stdin.close()
        hosts.heal(2)
        assert remote.stdout.read() == "after\n"
    assert remote.returncode == 0


def test_an_interface_goes_down_and_up(hosts: Cluster) -> None:
    hosts.link_down(1)
    done = ssh(hosts, "true", to=2)  # a host without a network knows it at once
    assert done.returncode == SSH_FAILED and "unreachable" in done.stderr
    hosts.link_up(1)
    assert reached(hosts, to=2)


def test_a_crash_leaves_no_process_and_boot_brings_the_host_back(hosts: Cluster, shared: Path) -> None:
    line = hosts.inside(
        1, ["ssh", hosts.addresses[1], f"echo kept > {shared}/own/file; echo here; sleep 1000"]
    )
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as remote:
        assert remote.stdout and remote.stdout.readline() == "here\n"
        assert "sleep 1000" in hosts.processes(2).values()
        pids = hosts.processes(2)
        hosts.crash(2)
        assert hosts.processes(2) == {}
        assert not [pid for pid in pids if Path(f"/proc/{pid}/ns/net").exists()]
        assert remote.poll() is None  # nobody told the other end
        assert times_out(hosts, to=2)
        hosts.boot(2)
        assert ssh(hosts, f"cat {shared}/own/file", to=2).stdout == "kept\n"
        remote.kill()
    assert hosts.processes(2) == {} and hosts.processes(1) == {}


def test_private_directories_differ_and_shared_ones_do_not(hosts: Cluster, shared: Path) -> None:
    for number in (1, 2, 3):
        assert ssh(hosts, f"echo {number} > {shared}/own/number; echo {number} >> {shared}/all", to=number)
    assert (shared / "all").read_text() == "1\n2\n3\n"
    assert [(hosts.disk(number) / "number").read_text() for number in (1, 2, 3)] == ["1\n", "2\n", "3\n"]
    assert ssh(hosts, f"ls {shared}/other", to=2).stdout == ""
    assert list((shared / "own").iterdir()) == []  # outside of all hosts
    (hosts.disk(3, shared / "other") / "from outside").write_text("seen\n")
    look = hosts.inside(3, ["cat", "other/from outside"])  # where the command is given
    assert subprocess.run(look, cwd=shared, capture_output=True, text=True).stdout == "seen\n"


def test_a_rate_is_kept(hosts: Cluster) -> None:
    try:
        hosts.rate("all", "8mbit")
    except NotImplementedError as error:
        pytest.skip(str(error))
    # two megabytes at a megabyte a second, less the burst
    timed = "head -c 2000000 /dev/zero | tr '\\0' x"
    began = os.times().elapsed
    assert len(ssh(hosts, timed, to=2).stdout) == 2_000_000
    assert os.times().elapsed - began > 1.5
    hosts.rate("all", "1gbit")


# Nothing is left

HOLDER = """
import sys
from pathlib import Path
from emulated_hosts import Cluster

with Cluster(Path(sys.argv[1]), 2) as hosts:
    print(hosts.name, *hosts.addresses, flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir()
    line = [sys.executable, "-c", HOLDER, str(folder)]
    return subprocess.Popen(line, cwd=SUPPORT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def traces(name: str, folder: Path) -> list[str]:
    """Namespaces, settings and processes of a cluster."""
    entries = [str(path) for place in (NAMESPACES, SETTINGS) for path in place.glob(f"{name}-*")]
    for pid in folder.glob("sshd-*.pid"):
        entries += [str(pid)] if Path(f"/proc/{pid.read_text().strip()}/ns/net").exists() else []
    return entries


def test_two_clusters_at_once_and_nothing_is_left_of_either(tmp_path: Path, hosts: Cluster) -> None:
    """One ends as it should, the other's process is killed; a third lives on."""
    first, second = start_holder(tmp_path / "first"), start_holder(tmp_path / "second")
    with first, second:
        assert first.stdout and second.stdout
        (name, *addresses), (other, *others) = (
            first.stdout.readline().split(),
            second.stdout.readline().split(),
        )
        assert len({name, other, hosts.name}) == 3
        assert len({*addresses, *others, *hosts.addresses}) == 7
        for each, folder in ((name, "first"), (other, "second")):
            assert len(traces(each, tmp_path / folder)) >= 7  # three namespaces, two settings, two processes
        first.communicate()
        assert first.returncode == 0
        assert traces(name, tmp_path / "first") == []
        second.send_signal(signal.SIGTERM)
        second.wait()
        wait_until(lambda: traces(other, tmp_path / "second") == [], f"cluster {other} is removed")
    assert reached(hosts, to=2)


def test_the_user_space_switch_delays_loses_and_cuts(tmp_path: Path) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no tap devices")
    connect = "import socket, sys, time; began = time.monotonic(); "
    connect += "socket.create_connection((sys.argv[1], 22), 20).close(); print(time.monotonic() - began)"

    def connecting_seconds() -> float:
        line = hosts.inside(1, [sys.executable, "-c", connect, hosts.addresses[1]])
        return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)

    with Cluster(tmp_path, 2, user_space_switch=True) as hosts:
        assert min(connecting_seconds() for _ in range(3)) < 0.3
        hosts.delay(150)  # there and back
        assert connecting_seconds() >= 0.3
        hosts.delay(0, loss_percent=100)
        assert times_out(hosts, to=2)
        hosts.delay(0)
        hosts.cut(2)
        assert times_out(hosts, to=2)
        hosts.heal(2)
        assert reached(hosts, to=2)
    assert traces(hosts.name, tmp_path) == []


def test_a_failure_within_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Cluster(tmp_path, 1) as hosts:
        hosts.crash(1)
        raise ZeroDivisionError
    assert traces(hosts.name, tmp_path) == []
