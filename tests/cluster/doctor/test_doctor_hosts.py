"""`mlx-ring doctor`, over real ssh, names each planted fault, its host, and a remedy.

A run of the doctor takes seconds, so two runs meet all faults that leave each other alone, each on a host of
its own: what is wrong on hosts and on the way to them (`faulty`), and what is wrong between hosts (`links`).
"""

import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, SETTINGS, Cluster
from ranks import ROOT, environment

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring"))]
HOSTS = 12
LAUNCH_PORT = 32323  # of the first rank
Found = dict[str, str]


@dataclass
class Report:
    """What one run of the doctor said."""

    status: int
    checks: list[Found]
    stderr: str

    def bad(self, status: str = "fail") -> list[Found]:
        return [check for check in self.checks if check["status"] == status]

    def names(
        self, check: str, host: str, words: Sequence[str], remedy: str, *, status: str = "fail"
    ) -> None:
        """Asserts that this check of this host found the fault, once."""
        of_host = [each for each in self.bad(status) if (each["name"], each["host"]) == (check, host)]
        found = [each for each in of_host if all(word in each["detail"] for word in words)]
        assert len(found) == 1, self.bad(status)
        assert remedy in found[0]["remedy"], found


@dataclass
class Lab:
    """Hosts with a disk and an interpreter each; host 1 asks."""

    cluster: Cluster
    work: Path
    can_limit_rates: bool = True  # this kernel

    def address(self, number: int) -> str:
        return self.cluster.addresses[number - 1]

    def interpreter(self, number: int, line: str = f'exec {sys.executable} "$@"') -> None:
        path = self.cluster.disk(number) / "python"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def hostfile(self, *entries: int | tuple[str, str]) -> str:
        """Writes a host file of hosts by number, or of name and address."""
        pairs = [(self.address(e), self.address(e)) if isinstance(e, int) else e for e in entries]
        hosts = [{"ssh": ssh, "ips": [ip]} for ssh, ip in pairs]
        content = json.dumps({"envs": [f"PATH={ENVIRONMENT_PATH}"], "hosts": hosts})
        (self.cluster.disk(1) / "lab.json").write_text(content)
        return f"{self.work}/lab.json"

    def doctor(self, *overrides: str, hostfile: str | None = None, folder: str = ".") -> Report:
        options = ["--hostfile", hostfile or self.hostfile(1, 2), "--json", "--python", f"{self.work}/python"]
        line = shlex.join([*PROGRAM, "doctor", *options, "--", *overrides])
        command = self.cluster.inside(1, ["sh", "-c", f"cd {folder} && exec {line}"])
        told = {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=self.work, env=environment(), timeout=250, **told)
        assert "Traceback" not in done.stderr, done.stderr
        return Report(done.returncode, json.loads(done.stdout)["checks"], done.stderr)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    with Cluster(folder / "cluster", HOSTS, private=[work]) as cluster:
        for number in range(1, HOSTS + 1):
            Lab(cluster, work).interpreter(number)
        yield Lab(cluster, work)


def with_path(folder: Path) -> str:
    return f'PYTHONPATH={shlex.quote(str(folder))} exec {sys.executable} "$@"'


def on(lab: Lab, number: int, line: str) -> None:
    subprocess.run(lab.cluster.inside(number, ["sh", "-c", line]), cwd="/", check=True, capture_output=True)


def test_hosts_without_a_fault(lab: Lab) -> None:
    report = lab.doctor(hostfile=lab.hostfile(1, 2, 3))
    assert (report.status, report.stderr) == (0, ""), report.checks
    assert all((check["status"] == "ok") == (check["remedy"] == "") for check in report.checks)
    of_third = [check["name"] for check in report.checks if check["host"] == lab.address(3)]
    assert of_third == [
        "reachable", "python", "mlx", "mlx_ring", "source", "configuration", "machine", "blas",
        "libmpi", "disk", "sleep", "variables", f"address {lab.address(3)}", "clock",
        f"port 32325 of {lab.address(3)}", f"link from rank 1 ({lab.address(3)})", "data", "exit status",
    ]  # fmt: skip
    launched = [check for check in report.checks if check["host"] == socket.gethostname()]
    assert [check["name"] for check in launched] == ["launch", "all-reduce", "latency", "bandwidth"]
    assert launched[0]["detail"].startswith("3 ranks joined")


def test_what_only_warns_or_does_no_harm(lab: Lab) -> None:
    """A login that prints, a link that leads nowhere, own code that differs, data that rank 0 will send."""
    files = [lab.cluster.disk(number) / "my_parts.py" for number in (1, 2)]
    for number, file in enumerate(files):
        file.write_text(f"WIDTH = {number}\n")
    nowhere = lab.cluster.disk(2) / "gone.py"
    nowhere.symlink_to("nowhere")
    book(lab, 1, "best")
    lab.interpreter(2, f'echo Welcome; echo 42; exec {sys.executable} "$@"')
    try:
        report = lab.doctor(*BOOKS, "data.distribute=true")
    finally:
        lab.interpreter(2)
        shutil.rmtree(lab.cluster.disk(1) / "books")
        for file in (nowhere, *files):
            file.unlink()
    assert report.status == 0, report.bad()
    words = ["my_parts.py differs from the one here"]
    report.names("own code", lab.address(2), words, "hosts sync", status="warn")


def test_a_rank_that_fails_in_the_launch_is_named(lab: Lab, tmp_path: Path) -> None:
    """Only the launch can find this fault."""
    code = "import sys\nif 'mlx_ring.communication.selftest' in sys.orig_argv: sys.exit('planted')\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    lab.interpreter(2, with_path(tmp_path))
    try:
        report = lab.doctor()
    finally:
        lab.interpreter(2)
    assert report.status == 3
    report.names("launch", lab.address(2), ["rank 1"], "python -P -m mlx_ring.communication.selftest")
    assert len(report.bad()) == 1, report.bad()


# What is wrong on a host, or on the way to it

BOOKS = ("model=transformer", "data=text", "data.path=books", "data.cache_dir=cache")


def book(lab: Lab, number: int, word: str) -> None:
    folder = lab.cluster.disk(number) / "books"
    folder.mkdir()
    (folder / "book.txt").write_text(f"It was the {word} of times. " * 300)


def pretend(folder: Path, python: str, package: str, stale: str) -> Path:
    """Makes a folder for PYTHONPATH: another version of Python and of a package, and a stale checkout."""
    code = f"import platform, time\nplatform.python_version = lambda: {python!r}\n"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    metadata = folder / f"{package}-0.0.9.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.9\n")
    for name in ("mlx_ring", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / stale).open("a") as file:
        file.write("# of another commit\n")
    return folder


OTHER_PYTHON = "3.13.1" if sys.version_info[:2] == (3, 12) else "3.12.1"


def break_installations(lab: Lab, folder: Path) -> None:
    """On hosts 2 to 7: what is installed. Several faults on one host must not hide one another."""
    one = pretend(folder / "2", OTHER_PYTHON, "mlx", "mlx_ring/run/interval.py")
    lab.interpreter(2, with_path(one))
    other = pretend(folder / "3", "3.9.18", "mlx_ring", "conf/config.yaml")
    variables = "LD_PRELOAD= MLX_RANK=1 MLX_METAL_FAST_SYNCH=1 "
    lab.interpreter(3, variables + with_path(other))
    lab.interpreter(4, f'exec {sys.executable} -S "$@"')
    programs = {
        5: ("mlx/core.py", "raise ImportError('libmlx.so: cannot open shared object file: No such file')"),
        6: ("mlx/core.py", "import os; os.kill(os.getpid(), 4)"),  # SIGILL: a build for another chip
        7: ("safetensors.py", "raise ModuleNotFoundError(\"No module named 'safetensors'\")"),
    }
    for number, (name, program) in programs.items():
        (folder / str(number) / name).parent.mkdir(parents=True)
        (folder / str(number) / name).write_text(program)
        lab.interpreter(number, with_path(folder / str(number)))


def break_settings(lab: Lab, folder: Path, undo: ExitStack) -> None:
    """On hosts 8 and 9: clock, disk, data. Hosts 10 and 11 have other keys than host 1 knows; 12 is off."""
    (folder / "8").mkdir()
    code = "import time\ntrue = time.time\ntime.time = lambda: true() + 3600\n"
    (folder / "8/sitecustomize.py").write_text(code)
    lab.interpreter(8, with_path(folder / "8"))
    on(lab, 9, f"mkdir {lab.work}/full && mount -t tmpfs -o size=64k none {lab.work}/full")
    undo.callback(on, lab, 9, f"umount {lab.work}/full")
    book(lab, 1, "best")
    book(lab, 8, "worst")  # host 9 has none
    known = SETTINGS / f"{lab.cluster.name}-1/ssh/known_hosts"
    keys = known.read_text()
    undo.callback(known.write_text, keys)
    lines = [line.split(" ", 1) for line in keys.splitlines()]
    of_host_1 = dict(lines)[lab.address(1)]
    changed = [(a, of_host_1 if a == lab.address(11) else key) for a, key in lines if a != lab.address(10)]
    known.write_text("".join(f"{address} {key}\n" for address, key in changed))
    lab.cluster.cut(12)
    undo.callback(lab.cluster.heal, 12)


@pytest.fixture(scope="module")
def faulty(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("faulty")
    with ExitStack() as undo:
        for number in range(2, 9):
            undo.callback(lab.interpreter, number)
        for number in (1, 8):
            undo.callback(shutil.rmtree, lab.cluster.disk(number) / "books", ignore_errors=True)
        break_installations(lab, folder)
        break_settings(lab, folder, undo)
        hostfile = lab.hostfile(*range(1, HOSTS + 1))
        return lab.doctor(*BOOKS, "run.dir=full/run", hostfile=hostfile)


FAULTS = {  # host, check: words of the detail, of the remedy
    (2, "python"): ([OTHER_PYTHON], "--python"),
    (2, "mlx"): (["0.0.9"], "hosts sync"),
    (2, "source"): (["here"], "same commit"),
    (3, "python"): (["3.9.18"], "--python"),
    (3, "mlx_ring"): (["0.0.9"], "hosts sync"),
    (3, "configuration"): (["here"], "same commit"),
    (3, "variables"): (["MLX_METAL_FAST_SYNCH is 1", "unset"], "alike on every host"),
    (4, "mlx"): (["not installed in"], "hosts sync"),
    (4, "mlx_ring"): (["not installed in"], "hosts sync"),
    (5, "mlx"): (["libmlx.so"], "extras"),
    (6, "mlx"): (["cannot be loaded", "status -4"], "a build for that machine"),
    (7, "mlx_ring"): (["cannot be loaded", "No module named 'safetensors'"], "hosts sync"),
    (8, "data"): (["text, digest", "{1}"], "copy the data"),
    (9, "data"): (["books"], "copy the data"),
    (9, "disk"): (["No space left on device", "full"], "make room"),
    (10, "reachable"): (["Host key verification failed"], "ssh {host} once"),
    (11, "reachable"): (["strict checking"], "ssh-keygen -R {host}"),
    (12, "reachable"): (["ssh failed"], "ssh -o BatchMode=yes {host} true"),
}


@pytest.mark.parametrize(("number", "check"), FAULTS)
def test_a_fault_of_a_host(lab: Lab, faulty: Report, number: int, check: str) -> None:
    words, remedy = FAULTS[number, check]
    host = lab.address(number)
    words = [word.replace("{1}", lab.address(1)) for word in words]
    faulty.names(check, host, words, remedy.format(host=host))


def test_warnings_about_a_host(lab: Lab, faulty: Report) -> None:
    faulty.names("clock", lab.address(8), ["+3600"], "network's time", status="warn")
    faulty.names("variables", lab.address(3), ["MLX_RANK=1"], "unset it", status="warn")
    assert [each["host"] for each in faulty.bad("warn") if each["name"] == "clock"] == [lab.address(8)]


def test_no_other_check_of_a_host_fails(lab: Lab, faulty: Report) -> None:
    assert faulty.status == 3
    found = sorted((check["host"], check["name"]) for check in faulty.bad())
    assert found == sorted((lab.address(number), check) for number, check in FAULTS)


def test_a_folder_that_is_not_there(lab: Lab) -> None:
    (lab.cluster.disk(1) / "only_here").mkdir()
    report = lab.doctor(folder="only_here")
    assert report.status == 3
    words = [f"it has no folder {lab.work}/only_here"]
    report.names("reachable", lab.address(2), words, "hosts sync")
    assert len(report.bad()) == 1, report.bad()


# What is wrong between hosts


def test_an_address_given_to_two_hosts(lab: Lab) -> None:
    twice = [(lab.address(1), lab.address(2)), (lab.address(2), lab.address(2))]
    report = lab.doctor(hostfile=lab.hostfile(*twice))
    assert report.status == 3
    (found,) = report.checks
    assert (found["name"], found["status"]) == ("host file", "fail") and found["remedy"]
    assert all(word in found["detail"] for word in (lab.address(1), lab.address(2), "both have the address"))


def on_network(lab: Lab, last: int) -> str:
    """An address of the emulated network that no host has by itself."""
    return f"{lab.address(1).rpartition('.')[0]}.{last}"


def listener(lab: Lab, number: int, port: int, undo: ExitStack) -> None:
    """Takes a port of a host."""
    code = f"import socket; s = socket.create_server(({lab.address(number)!r}, {port})); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()"]
    busy = undo.enter_context(
        subprocess.Popen(
            lab.cluster.inside(number, command), cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    undo.callback(busy.kill)
    assert busy.stdout and busy.stdout.readline()


def firewall(lab: Lab, number: int, ports: str, undo: ExitStack) -> None:
    rules = "add table ip f; add chain ip f c { type filter hook input priority 0; }; "
    rules += f"add rule ip f c ct state new tcp dport {ports} reject with tcp reset"
    on(lab, number, f"nft {shlex.quote(rules)}")
    undo.callback(on, lab, number, "nft delete table ip f")


STALE, SECOND = 77, 78  # last numbers of addresses
NFT = shutil.which("nft") is not None
LINK_FAULTS = {  # host, check: words of the detail, of the remedy
    (2, "address {stale}"): (["no interface"], "hosts check FILE --write"),
    (2, "link from rank 0 ({stale})"): (["cannot listen"], "hosts check FILE --write"),
    (4, "address {host}"): (["{12}"], "of its own"),
    (5, "port 32327 of {host}"): (["another process listens"], "--starting-port"),
    (8, "address 127.0.0.1"): (["only the host itself"], "{host}"),
    (8, "link from rank 6 (127.0.0.1)"): (["cannot connect"], "use another address"),
}
if NFT:
    LINK_FAULTS |= {
        (6, "port 32328 of {host}"): (["{5} cannot connect"], "firewall"),
        (7, "link from rank 5 ({host})"): (["{6} cannot connect"], "{host}'s firewall"),
    }


@pytest.fixture(scope="module")
def links(lab: Lab) -> Report:
    with ExitStack() as undo:
        on(lab, 12, f"ip address add {lab.address(4)}/32 dev lo")
        undo.callback(on, lab, 12, f"ip address del {lab.address(4)}/32 dev lo")
        listener(lab, 5, LAUNCH_PORT + 4, undo)
        if NFT:
            firewall(lab, 6, str(LAUNCH_PORT + 5), undo)
            firewall(lab, 7, "1024-65535", undo)
        undo.callback(on, lab, 9, "tc qdisc del dev eth0 root || true")
        try:
            lab.cluster.rate(9, "200mbit")  # what host 9 sends, to host 10
        except NotImplementedError:
            lab.can_limit_rates = False
        # One machine by two names, each with an address of its own
        on(lab, 11, f"ip address add {on_network(lab, SECOND)}/24 dev eth0")
        undo.callback(on, lab, 11, f"ip address del {on_network(lab, SECOND)}/24 dev eth0")
        with_suffix = (f"root@{lab.address(11)}", on_network(lab, SECOND))
        stale = (lab.address(2), on_network(lab, STALE))
        loopback = (lab.address(8), "127.0.0.1")
        hostfile = lab.hostfile(1, stale, 3, 4, 5, 6, 7, loopback, 9, 10, 11, 12, with_suffix)
        return lab.doctor(hostfile=hostfile)


@pytest.mark.parametrize(("number", "check"), LINK_FAULTS)
def test_a_fault_between_hosts(lab: Lab, links: Report, number: int, check: str) -> None:
    words, remedy = LINK_FAULTS[number, check]
    host = lab.address(number)

    def filled(text: str) -> str:
        return text.format("", *lab.cluster.addresses, host=host, stale=on_network(lab, STALE))

    links.names(filled(check), host, list(map(filled, words)), filled(remedy))


def test_one_machine_by_two_names(lab: Lab, links: Report) -> None:
    words = [f"same machine as {lab.address(11)}"]
    links.names("reachable", f"root@{lab.address(11)}", words, "list one name twice instead")


def test_no_other_check_between_hosts_fails(lab: Lab, links: Report) -> None:
    assert links.status == 3
    hosts = sorted(check["host"] for check in links.bad())
    assert hosts == sorted([*(lab.address(number) for number, _ in LINK_FAULTS), f"root@{lab.address(11)}"])


def test_a_stale_address_comes_with_what_the_host_has_instead(lab: Lab, links: Report) -> None:
    (found,) = [check for check in links.bad() if check["name"] == f"address {on_network(lab, STALE)}"]
    assert lab.address(2) in found["remedy"]


def test_a_slow_link(lab: Lab, links: Report) -> None:
    if not lab.can_limit_rates:
        pytest.skip("this kernel cannot limit rates")
    words = ["Mbit/s, where the fastest link has"]
    links.names(f"link from rank 8 ({lab.address(10)})", lab.address(10), words, "cable", status="warn")
    assert [check["host"] for check in links.bad("warn") if "link" in check["name"]] == [lab.address(10)]
