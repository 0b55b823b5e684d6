"""`mlx-ring doctor`, over real ssh, names each planted fault, its host, and a remedy."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, SETTINGS, Cluster
from ranks import ROOT, environment

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring"))]
Found = dict[str, str]


@dataclass
class Lab:
    """Three hosts with a disk and an interpreter each; host 1 asks. Faults are planted on host 2."""

    cluster: Cluster
    work: Path
    checks: list[Found] = field(default_factory=list[Found])
    stderr: str = ""

    def address(self, number: int) -> str:
        return self.cluster.addresses[number - 1]

    def interpreter(self, number: int, line: str = f'exec {sys.executable} "$@"') -> None:
        path = self.cluster.disk(number) / "python"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def hostfile(self, *entries: tuple[str, str]) -> str:
        hosts = [
            {"ssh": ssh, "ips": [ip]} for ssh, ip in entries or [(a, a) for a in self.cluster.addresses[:2]]
        ]
        path = self.cluster.disk(1) / "lab.json"
        path.write_text(json.dumps({"envs": [f"PATH={ENVIRONMENT_PATH}"], "hosts": hosts}))
        return "lab.json"

    def doctor(self, *overrides: str, hostfile: str | None = None) -> int:
        """Returns the exit status."""
        options = ["--hostfile", hostfile or self.hostfile(), "--json", "--python", f"{self.work}/python"]
        command = self.cluster.inside(1, [*PROGRAM, "doctor", *options, "--", *overrides])
        done = subprocess.run(
            command, cwd=self.work, env=environment(), capture_output=True, text=True, timeout=200
        )
        assert "Traceback" not in done.stderr, done.stderr
        self.checks, self.stderr = json.loads(done.stdout)["checks"], done.stderr
        return done.returncode

    def bad(self, status: str = "fail") -> list[Found]:
        return [check for check in self.checks if check["status"] == status]

    def names(
        self, check: str, words: list[str], remedy: str, *, number: int = 2, status: str = "fail"
    ) -> None:
        """Asserts that this check found the fault on one host, and that no other check failed anywhere."""
        found = [each for each in self.bad(status) if each["name"].startswith(check)]
        assert [each["host"] for each in found] == [self.address(number)], self.checks
        assert all(word in found[0]["detail"] for word in words), found
        assert remedy in found[0]["remedy"], found
        assert status == "warn" or self.bad() == found, self.bad()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    with Cluster(folder / "cluster", 3, private=[work]) as cluster:
        lab = Lab(cluster, work)
        for number in (1, 2, 3):
            lab.interpreter(number)
        yield lab


@contextmanager
def other_python(lab: Lab, line: str) -> Iterator[None]:
    lab.interpreter(2, line)
    try:
        yield
    finally:
        lab.interpreter(2)


def with_path(folder: Path) -> str:
    return f'PYTHONPATH={shlex.quote(str(folder))} exec {sys.executable} "$@"'


def on(lab: Lab, number: int, line: str) -> None:
    subprocess.run(lab.cluster.inside(number, ["sh", "-c", line]), cwd="/", check=True, capture_output=True)


def test_hosts_without_a_fault(lab: Lab) -> None:
    three = [(address, address) for address in lab.cluster.addresses]
    assert (lab.doctor(hostfile=lab.hostfile(*three)), lab.stderr) == (0, ""), lab.checks
    assert all((check["status"] == "ok") == (check["remedy"] == "") for check in lab.checks)
    of_third = [check["name"] for check in lab.checks if check["host"] == lab.address(3)]
    assert of_third == [
        "reachable", "python", "mlx", "mlx_ring", "source", "configuration", "machine", "blas",
        "libmpi", "disk", "sleep", "variables", f"address {lab.address(3)}", "clock",
        f"port 32325 of {lab.address(3)}", f"link from rank 1 ({lab.address(3)})", "data", "exit status",
    ]  # fmt: skip
    launched = [check for check in lab.checks if check["host"] == socket.gethostname()]
    assert [check["name"] for check in launched] == ["launch", "all-reduce", "latency", "bandwidth"]
    assert launched[0]["detail"].startswith("3 ranks joined")


# What is installed


def test_an_interpreter_without_packages(lab: Lab) -> None:
    with other_python(lab, f'exec {sys.executable} -S "$@"'):
        assert lab.doctor() == 3
    assert {(check["name"], check["host"]) for check in lab.bad()} == {
        ("mlx", lab.address(2)),
        ("mlx_ring", lab.address(2)),
    }
    assert all(
        "not installed in" in check["detail"] and "hosts sync" in check["remedy"] for check in lab.bad()
    )


@pytest.mark.parametrize("version", ["3.12.1", "3.9.18"])
def test_another_python(lab: Lab, tmp_path: Path, version: str) -> None:
    if sys.version_info[:2] == (3, 12):
        version = version.replace("3.12", "3.13")
    code = f"import platform\nplatform.python_version = lambda: {version!r}\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    lab.names("python", [version], "--python")


@pytest.mark.parametrize(("name", "check"), [("mlx", "mlx"), ("mlx_ring", "mlx_ring")])
def test_another_version(lab: Lab, tmp_path: Path, name: str, check: str) -> None:
    metadata = tmp_path / f"{name}-0.0.9.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.9\n")
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    lab.names(check, ["0.0.9"], "hosts sync")


def test_a_build_of_mlx_that_cannot_be_loaded(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    words = "libmlx.so: cannot open shared object file: No such file or directory"
    (tmp_path / "mlx/core.py").write_text(f"raise ImportError({words!r})")
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    found, *_ = lab.bad()
    assert (found["name"], found["host"]) == ("mlx", lab.address(2)) and "extras" in found["remedy"], found


def test_a_stale_checkout(lab: Lab, tmp_path: Path) -> None:
    for name in ("mlx_ring", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "mlx_ring/run/interval.py").open("a") as file:
        file.write("# of another commit\n")
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
        lab.names("source", ["here"], "same commit")
        (tmp_path / "mlx_ring/run/interval.py").write_text((ROOT / "mlx_ring/run/interval.py").read_text())
        with (tmp_path / "conf/config.yaml").open("a") as file:
            file.write("# of another commit\n")
        assert lab.doctor() == 3
    lab.names("configuration", ["here"], "same commit")


def test_own_code_that_differs(lab: Lab) -> None:
    files = [lab.cluster.disk(number) / "my_parts.py" for number in (1, 2)]
    for number, file in enumerate(files):
        file.write_text(f"WIDTH = {number}\n")
    try:
        assert lab.doctor() == 0
    finally:
        for file in files:
            file.unlink()
    lab.names("own code", ["my_parts.py differs from the one here"], "hosts sync", status="warn")


def test_a_library_that_is_missing(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "safetensors.py").write_text("raise ModuleNotFoundError(\"No module named 'safetensors'\")")
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    lab.names("mlx_ring", ["cannot be loaded", "No module named 'safetensors'"], "hosts sync")


def test_a_build_for_another_chip(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text("import os; os.kill(os.getpid(), 4)")  # SIGILL
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    lab.names("mlx", ["cannot be loaded", "status -4"], "a build for that machine")


def test_noise_of_a_login_and_odd_files_do_no_harm(lab: Lab) -> None:
    lock = lab.cluster.disk(2) / "gone.py"
    lock.symlink_to("nowhere")
    try:
        with other_python(lab, f'echo Welcome; echo 42; exec {sys.executable} "$@"'):
            assert lab.doctor() == 0, lab.bad()
    finally:
        lock.unlink()


# What a host is set to


def test_a_variable_of_one_host(lab: Lab) -> None:
    with other_python(lab, f'MLX_METAL_FAST_SYNCH=1 exec {sys.executable} "$@"'):
        assert lab.doctor() == 3
    lab.names("variables", ["MLX_METAL_FAST_SYNCH is 1", "unset"], "alike on every host")


def test_one_finding_hides_no_other(lab: Lab) -> None:
    line = f'LD_PRELOAD= MLX_RANK=1 MLX_METAL_FAST_SYNCH=1 exec {sys.executable} "$@"'
    with other_python(lab, line):
        assert lab.doctor() == 3
    named = {
        check["detail"].split()[0]: check["status"] for check in lab.checks if check["name"] == "variables"
    }
    assert named["MLX_METAL_FAST_SYNCH"] == "fail" and named["MLX_RANK=1"] == "warn", named


def test_a_clock_that_is_off(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time\ntrue = time.time\ntime.time = lambda: true() + 3600\n"
    )
    with other_python(lab, with_path(tmp_path)):
        lab.doctor()
    lab.names("clock", ["+3600"], "network's time", status="warn")


def test_a_full_disk(lab: Lab) -> None:
    on(lab, 2, f"mkdir -p {lab.work}/full && mount -t tmpfs -o size=64k none {lab.work}/full")
    try:
        assert lab.doctor("run.dir=full/run") == 3
    finally:
        on(lab, 2, f"umount {lab.work}/full")
    lab.names("disk", ["No space left on device", "full"], "make room")


def test_other_data(lab: Lab) -> None:
    for number in (1, 2):
        folder = lab.cluster.disk(number) / "books"
        folder.mkdir(exist_ok=True)
        (folder / "book.txt").write_text(f"It was the {'best' if number == 1 else 'worst'} of times. " * 300)
    run = ("model=transformer", "data=text", "data.path=books", "data.cache_dir=cache")
    assert lab.doctor(*run) == 3
    lab.names("data", ["text, digest", lab.address(1)], "copy the data")
    shutil.rmtree(lab.cluster.disk(2) / "books")
    assert lab.doctor(*run) == 3
    lab.names("data", ["books"], "copy the data")
    assert lab.doctor(*run, "data.distribute=true") == 0, lab.bad()  # rank 0 sends it


# The way there


def test_an_unknown_host_key(lab: Lab) -> None:
    known = SETTINGS / f"{lab.cluster.name}-1/ssh/known_hosts"
    whole = known.read_text()
    lines = [line for line in whole.splitlines() if not line.startswith(lab.address(2))]
    known.write_text("\n".join(lines) + "\n")
    try:
        assert lab.doctor() == 3
    finally:
        known.write_text(whole)
    lab.names("reachable", ["Host key verification failed"], f"ssh {lab.address(2)} once")


def test_a_changed_host_key(lab: Lab) -> None:
    known = SETTINGS / f"{lab.cluster.name}-1/ssh/known_hosts"
    whole = known.read_text()
    keys = dict(line.split(" ", 1) for line in whole.splitlines())
    known.write_text(whole.replace(keys[lab.address(2)], keys[lab.address(3)]))
    try:
        assert lab.doctor() == 3
    finally:
        known.write_text(whole)
    lab.names("reachable", ["strict checking"], f"ssh-keygen -R {lab.address(2)}")


def test_a_host_that_is_off(lab: Lab) -> None:
    lab.cluster.cut(2)
    try:
        assert lab.doctor() == 3
    finally:
        lab.cluster.heal(2)
    lab.names("reachable", ["ssh failed"], f"ssh -o BatchMode=yes {lab.address(2)} true")


def test_a_folder_that_is_not_there(lab: Lab) -> None:
    here = lab.cluster.disk(1) / "only_here"
    here.mkdir()
    options = f"--hostfile {lab.work}/{lab.hostfile()} --json --python {lab.work}/python"
    command = ["sh", "-c", f"cd {lab.work}/only_here && exec {shlex.join(PROGRAM)} doctor {options}"]
    done = subprocess.run(
        lab.cluster.inside(1, command),
        cwd=lab.work,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 3, done
    lab.checks = json.loads(done.stdout)["checks"]
    lab.names("reachable", [f"it has no folder {lab.work}/only_here"], "hosts sync")


# Addresses and ports


def test_a_stale_address(lab: Lab) -> None:
    stale = lab.address(1).rpartition(".")[0] + ".77"
    assert lab.doctor(hostfile=lab.hostfile((lab.address(1), lab.address(1)), (lab.address(2), stale))) == 3
    assert {(check["name"], check["host"]) for check in lab.bad()} == {
        (f"address {stale}", lab.address(2)),
        (f"link from rank 0 ({stale})", lab.address(2)),
    }
    assert all("hosts check FILE --write" in check["remedy"] for check in lab.bad())
    assert lab.address(2) in lab.bad()[0]["remedy"]  # what it has instead


def test_an_address_that_two_hosts_have(lab: Lab) -> None:
    on(lab, 3, f"ip address add {lab.address(2)}/32 dev lo")
    try:
        assert lab.doctor(hostfile=lab.hostfile(*((a, a) for a in lab.cluster.addresses))) == 3
    finally:
        on(lab, 3, f"ip address del {lab.address(2)}/32 dev lo")
    named = [check for check in lab.bad() if check["name"] == f"address {lab.address(2)}"]
    assert [check["host"] for check in named] == [lab.address(2)], lab.bad()
    assert lab.address(3) in named[0]["detail"] and "of its own" in named[0]["remedy"]


def test_an_address_given_to_two_hosts(lab: Lab) -> None:
    twice = [(lab.address(1), lab.address(2)), (lab.address(2), lab.address(2))]
    assert lab.doctor(hostfile=lab.hostfile(*twice)) == 3
    (found,) = lab.checks
    assert (found["name"], found["status"]) == ("host file", "fail") and found["remedy"]
    assert all(word in found["detail"] for word in (lab.address(1), lab.address(2), "both have the address"))


def test_an_address_that_only_the_host_itself_reaches(lab: Lab) -> None:
    lab.doctor(hostfile=lab.hostfile((lab.address(1), lab.address(1)), (lab.address(2), "127.0.0.1")))
    found = next(check for check in lab.bad() if check["name"] == "address 127.0.0.1")
    assert found["host"] == lab.address(2) and lab.address(2) in found["remedy"]


def test_one_machine_by_two_names(lab: Lab) -> None:
    again = f"root@{lab.address(2)}"
    entries = [(lab.address(2), lab.address(2)), (again, lab.address(1))]
    assert lab.doctor(hostfile=lab.hostfile(*entries)) == 3
    found = next(check for check in lab.bad() if check["name"] == "reachable")
    assert found["host"] == again and f"same machine as {lab.address(2)}" in found["detail"]


def test_a_port_in_use(lab: Lab) -> None:
    code = f"import socket; s = socket.create_server(({lab.address(2)!r}, 32324)); print(flush=True); input()"
    with subprocess.Popen(
        lab.cluster.inside(2, [sys.executable, "-c", code]),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as busy:
        assert busy.stdout and busy.stdout.readline()
        assert lab.doctor() == 3
        busy.kill()
    lab.names("port 32324", ["another process listens"], "--starting-port")


@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nftables")
@pytest.mark.parametrize("ports", ["32324", "1024-65535"])
def test_a_firewall(lab: Lab, ports: str) -> None:
    rules = "add table ip f; add chain ip f c { type filter hook input priority 0; }; "
    rules += f"add rule ip f c ct state new tcp dport {ports} reject with tcp reset"
    with ExitStack() as undo:
        on(lab, 2, f"nft {shlex.quote(rules)}")
        undo.callback(on, lab, 2, "nft delete table ip f")
        assert lab.doctor() == 3
    if ports == "32324":
        lab.names("port 32324", [f"{lab.address(1)} cannot connect"], "firewall")
    else:
        lab.names("link from rank 0", [f"{lab.address(1)} cannot connect"], f"{lab.address(2)}'s firewall")


def test_a_slow_link(lab: Lab) -> None:
    try:
        lab.cluster.rate(1, "200mbit")  # what host 1 sends, to host 2
        lab.doctor()
    except NotImplementedError as error:
        pytest.skip(str(error))
    finally:
        on(lab, 1, "tc qdisc del dev eth0 root || true")
    lab.names("link from rank 0", ["Mbit/s, where the fastest link has"], "cable", status="warn")


def test_a_rank_that_fails_in_the_launch_is_named(lab: Lab, tmp_path: Path) -> None:
    """Only the launch can find this fault."""
    code = "import sys\nif 'mlx_ring.communication.selftest' in sys.orig_argv: sys.exit('planted')\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    with other_python(lab, with_path(tmp_path)):
        assert lab.doctor() == 3
    lab.names("launch", ["rank 1"], "python -m mlx_ring.communication.selftest")
