"""`mlx-ring hosts` makes, checks and changes host files and copies code and environments, over real ssh."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from emulated_hosts import AVAILABLE, Cluster
from ranks import ROOT, SMALL, environment, rows, status

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
BIN = Path(sys.executable).parent


@dataclass
class Lab:
    """Three hosts with a disk each; commands are typed on host 1. Hosts 1 and 2 share a second cable."""

    cluster: Cluster
    work: Path

    def type(self, *command: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
        inside = self.cluster.inside(1, ["sh", "-c", f'cd "{folder}" && exec "$@"', "sh", *command])
        done = subprocess.run(
            inside,
            cwd=self.work,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def hosts(self, *arguments: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
        return self.type(str(BIN / "mlx-ring"), "hosts", *arguments, folder=folder)

    def disk(self, number: int) -> Path:
        return self.cluster.disk(number)

    def read(self, name: str) -> Any:
        return json.loads((self.disk(1) / name).read_text())

    def write(self, name: str, content: Any) -> None:
        (self.disk(1) / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    with Cluster(folder / "cluster", 3, private=[work]) as cluster:
        yield Lab(cluster, work)


def entry(address: str, ip: str = "") -> dict[str, Any]:
    return {"ssh": address, "ips": [ip or address]}


# The host file


def test_a_lab_from_nothing(lab: Lab) -> None:
    """mlx.launch takes the file as one command made it, with the bare word train.py."""
    addresses = lab.cluster.addresses
    done = lab.hosts("add", "hosts/lab.json", *addresses[:2])
    assert (done.returncode, done.stderr) == (0, ""), done
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == addresses[:2]
    assert all("bit/s" in line and "eth0" in line for line in done.stdout.splitlines())
    assert lab.hosts("add", "hosts/lab.json", addresses[2]).returncode == 0
    path = f"PATH={BIN}:/usr/bin:/bin:/usr/sbin:/sbin"
    assert lab.read("hosts/lab.json") == {
        "backend": "ring", "envs": [path], "hosts": [entry(address) for address in addresses],
    }  # fmt: skip
    done = lab.type(
        str(BIN / "mlx.launch"), "--hostfile", "hosts/lab.json", "train.py", *SMALL, "run.dir=run"
    )
    assert status(lab.disk(1), "run")["world_size"] == 3, done
    assert len(rows(lab.disk(1), "train", "run")) == 6


def test_the_fastest_address(lab: Lab) -> None:
    one, two, three = lab.cluster.addresses
    lab.cluster.cable(1, 2, "10.9.0")
    lab.cluster.rate("all", "100mbit")
    done = lab.hosts("add", "fast.json", one, two)
    assert lab.read("fast.json")["hosts"] == [entry(one, "10.9.0.1"), entry(two, "10.9.0.2")], done
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("    not")] == [one, two]
    # Host 3 has one address. Host 1 now comes after host 3, which cannot reach it by the cable.
    done = lab.hosts("add", "fast.json", three)
    assert done.returncode == 3 and f"address on {one} … [fail] 10.9.0.1 (eth1" in done.stdout, done
    done = lab.hosts("check", "fast.json", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert [(check["host"], check["status"]) for check in checks] == [
        (one, "fail"),
        (two, "ok"),
        (three, "ok"),
    ]
    assert f"{three} cannot connect" in checks[0]["detail"] and one in checks[0]["remedy"]
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    done = lab.hosts("check", "fast.json", "--write")
    assert done.returncode == 0 and f"changed to {one}" in done.stdout, done
    assert [each["ips"] for each in lab.read("fast.json")["hosts"]] == [[one], ["10.9.0.2"], [three]]
    # A slower address works, but gets a warning.
    lab.write("slow.json", [entry(one), entry(two)])
    done = lab.hosts("check", "slow.json")
    assert done.returncode == 0 and done.stdout.count("… [warn]") == 2, done
    assert "not its fastest" in done.stdout and "10.9.0.2 (eth1" in done.stdout
    assert lab.read("slow.json") == [entry(one), entry(two)]


def test_a_stale_address_is_mended(lab: Lab) -> None:
    one, _, three = lab.cluster.addresses
    content = {"hosts": [entry(one), entry(three, one.rpartition(".")[0] + ".77")], "envs": ["A=1"]}
    lab.write("stale.json", content)
    done = lab.hosts("check", "stale.json")
    assert done.returncode == 3 and f"address on {three} … [fail]" in done.stdout, done
    assert ".77 is not an address of it now" in done.stdout and lab.read("stale.json") == content
    done = lab.hosts("check", "stale.json", "--write")
    assert done.returncode == 0, done
    assert lab.read("stale.json")["hosts"] == [entry(one), entry(three)]
    assert lab.read("stale.json")["envs"][0] == "A=1"


def test_removing(lab: Lab) -> None:
    one, two, three = lab.cluster.addresses
    content = {"envs": ["PATH=/bin"], "hosts": [entry(one), entry(two) | {"rdma": []}, entry(three)]}
    lab.write("lab.json", content)
    done = lab.hosts("remove", "lab.json", three)
    assert (done.returncode, done.stdout) == (0, f"lab.json has {one}, {two}\n"), done
    assert lab.read("lab.json") == {"backend": "ring", "envs": ["PATH=/bin"], "hosts": content["hosts"][:2]}
    refused(
        lab.hosts("remove", "lab.json", two, three), f"{three} is not listed in lab.json; it has {one}, {two}"
    )
    assert lab.hosts("remove", "lab.json", two).returncode == 0
    refused(lab.hosts("remove", "lab.json", one), "is the last host of lab.json")


def refused(done: subprocess.CompletedProcess[str], words: str, status: int = 2) -> None:
    assert done.returncode == status and words in done.stderr and len(done.stderr.splitlines()) == 1, done


def test_hosts_that_cannot_be_added(lab: Lab) -> None:
    one, two, _ = lab.cluster.addresses
    content = [entry(one), entry(two)]
    lab.write("whole.json", content)
    nobody = one.rpartition(".")[0] + ".99"
    refused(lab.hosts("add", "whole.json", nobody), f"host {nobody}: ssh failed", 3)
    refused(lab.hosts("add", "whole.json", f"root@{two}"), f"is the same machine as {two}", 3)
    refused(lab.hosts("add", "whole.json", two), f"{two} is listed in whole.json already")
    refused(lab.hosts("add", "whole.json", "--", "-oProxyCommand=x"), "take it for an option")
    refused(lab.hosts("check", "nothing.json"), "nothing.json cannot be read")
    several = [entry(one) | {"ips": [one, "10.0.0.1"]}, entry(two) | {"ips": [two, "10.0.0.2"]}]
    lab.write("several.json", several)
    refused(lab.hosts("add", "several.json", nobody), "gives several addresses a host")
    refused(lab.hosts("add", "whole.json/lab.json", one), "cannot be written")
    done = lab.hosts("check", "whole.json")
    assert done.returncode == 0 and lab.read("whole.json") == content, done
    lab.write("gone.json", [*content, entry(nobody)])
    done = lab.hosts("check", "gone.json")
    assert done.returncode == 3 and f"reachable on {nobody} … [fail] ssh failed" in done.stdout, done
    assert done.stdout.count("address on") == 2


def test_a_file_of_one_machine_is_left_alone(lab: Lab) -> None:
    content = json.loads((ROOT / "hostfiles/lab.json").read_text())
    lab.write("local.json", content)
    done = lab.hosts("check", "local.json", "--write")
    assert (done.returncode, done.stdout.count("[ok]")) == (0, 1), done
    assert lab.read("local.json")["hosts"] == content


def test_a_file_keeps_its_mode_and_place(lab: Lab) -> None:
    one, two, _ = lab.cluster.addresses
    lab.write("secret.json", [entry(one), entry(two)])
    (lab.disk(1) / "secret.json").chmod(0o600)
    (lab.disk(1) / "link.json").symlink_to("secret.json")
    assert lab.hosts("remove", "link.json", two).returncode == 0
    assert (lab.disk(1) / "link.json").is_symlink() and lab.read("secret.json")["hosts"] == [entry(one)]
    assert (lab.disk(1) / "secret.json").stat().st_mode & 0o777 == 0o600


def test_a_host_that_is_not_set_up_yet(lab: Lab) -> None:
    """Any Python on the host finds its addresses; the folder of this name may be missing there."""
    one, two, _ = lab.cluster.addresses
    (lab.disk(1) / "only_here").mkdir(exist_ok=True)
    done = lab.hosts("add", "new.json", one, two, "--python", f"{lab.work}/no/python", folder="only_here")
    assert done.returncode == 0, done
    assert lab.read("only_here/new.json")["envs"][0].startswith(f"PATH={lab.work}/no:")


# Thunderbolt

PORTS = "Hardware Port: Ethernet\nDevice: en0\n\nHardware Port: Thunderbolt 1\nDevice: en2\n"


def thunderbolt(name: str, own: str, peer: str) -> str:
    """What `system_profiler SPThunderboltDataType -json` prints about a port with a cable to another Mac."""
    port = {
        "device_name_key": name,
        "domain_uuid_key": own,
        "receptacle_1_tag": {"receptacle_id_key": "1"},
        "_items": [{"domain_uuid_key": peer}],
    }
    return json.dumps({"SPThunderboltDataType": [port]})


def test_thunderbolt_is_left_to_mlx(lab: Lab) -> None:
    """mlx.distributed_config itself, on hosts that answer as Macs with a cable between them would."""
    names = lab.cluster.addresses[:2]
    for number, (own, peer) in enumerate((("a", "b"), ("b", "a")), start=1):
        tools = lab.disk(number) / "bin"
        tools.mkdir()
        port = thunderbolt(f"mac{number}", own, peer)
        for tool, line in (
            ("system_profiler", f"cat <<'END'\n{port}\nEND"),
            ("networksetup", f"cat <<'END'\n{PORTS}\nEND"),
            ("sudo", f'echo "$@" >> {lab.work}/sudo.log'),
        ):
            (tools / tool).write_text(f"#!/bin/sh\n{line}\n")
            (tools / tool).chmod(0o755)
        mount = ["mount", "--bind", str(lab.work / "bin"), "/usr/local/bin"]
        subprocess.run(lab.cluster.inside(number, mount), cwd="/", check=True)
    done = lab.hosts("thunderbolt", "cables.json", *names, "--auto-setup")
    assert done.returncode == 0, done
    assert "ifconfig en2 inet 192.168.0.1 netmask 255.255.255.252" in (lab.disk(1) / "sudo.log").read_text()
    made = lab.read("cables.json")
    assert {host["ssh"]: host["ips"] for host in made["hosts"]} == {
        names[0]: ["192.168.0.1"], names[1]: ["192.168.0.2"],
    }  # fmt: skip
    assert made["envs"] == [f"PATH={BIN}:/usr/bin:/bin:/usr/sbin:/sbin"]
    refused(lab.hosts("thunderbolt", "none.json", names[0]), "type this in a terminal, or give --auto-setup")
    failed = lab.hosts("thunderbolt", "none.json", lab.cluster.addresses[2], "--auto-setup")
    refused(failed, "error: mlx.distributed_config ended with status 1 and made no host file: json", 3)
    assert not (lab.disk(1) / "none.json").exists()


# Copying


def test_a_lab_is_made_ready_by_one_command(lab: Lab) -> None:
    """Copies a checkout from host 1 to two others and makes their environments; then they train."""
    checkout = lab.disk(1) / "check out"
    done = subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("mlx_ring", "conf", "pyproject.toml"):  # as they are now, committed or not
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        shutil.rmtree(checkout / name, ignore_errors=True)
        copy(ROOT / name, checkout / name)
    shutil.copy(ROOT / "uv.lock", checkout)
    (checkout / "outputs").mkdir()
    (checkout / "outputs/large").write_text("what git ignores stays")
    uv = Path(shutil.which("uv") or "uv").parent
    names = lab.cluster.addresses[1:]
    path = f"PATH={lab.work}/check out/.venv/bin:{uv}:{BIN}:/usr/bin:/bin"
    lab.write(
        "check out/lab.json", {"envs": [path, "UV_OFFLINE=1"], "hosts": [entry(name) for name in names]}
    )
    done = lab.hosts("sync", "lab.json", folder="check out")
    assert done.returncode == 0, done
    assert done.stdout.count("copy on") == done.stdout.count("environment on") == 2, done.stdout
    for number in (2, 3):
        there = lab.disk(number) / "check out"
        assert (there / ".venv/bin/train.py").exists() and (there / "uv.lock").exists()
        assert not (there / "outputs").exists() and not (there / ".git").exists()
    python = f"{lab.work}/check out/.venv/bin/python"
    done = lab.type(
        str(BIN / "mlx-ring"), "run", "--hostfile", "lab.json", "--python", python, "--",
        *SMALL, "run.dir=trained", folder="check out",
    )  # fmt: skip
    assert done.returncode == 0, done
    assert status(lab.disk(2) / "check out", "trained")["world_size"] == 2
    changes_come_too(lab, checkout)


def changes_come_too(lab: Lab, checkout: Path) -> None:
    """Does not copy what git ignores, and removes from the package there what is gone here.

    Files that only the host has stay, and the folder where this is typed is left alone.
    """
    there = lab.disk(2) / "check out"
    (there / "mlx_ring/stale.py").write_text("")
    (there / "notes.txt").write_text("of this host")
    (checkout / "my_parts.py").write_text("WIDTH = 3\n")  # which git ignores
    for path in ("data[1]", "conf"):
        (checkout / path).mkdir(exist_ok=True)
        (checkout / path / "secret.yaml").write_text("token: 1")
    (checkout / ".git/info/exclude").write_text("secret.yaml\n/data[[]1]\n")
    content = lab.read("check out/lab.json")
    lab.write("check out/all.json", content | {"hosts": [entry(lab.cluster.addresses[0]), *content["hosts"]]})
    command = [f"{lab.work}/check out/.venv/bin/mlx-ring", "hosts", "sync", "all.json"]
    done = subprocess.run(["uv", "sync", "--offline", "-q"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = lab.type(*command, "--no-environment", "--json", folder="check out")
    checks = json.loads(done.stdout)["checks"]
    assert [check["name"] for check in checks] == ["copy"] * 3 and done.returncode == 0, done
    assert checks[0]["detail"].endswith("is this very folder")
    assert not (there / "mlx_ring/stale.py").exists()
    assert (there / "notes.txt").exists() and (there / "my_parts.py").exists()
    assert (there / "trained/status.json").exists() and (there / "conf/config.yaml").exists()
    assert not (there / "data[1]").exists() and not (there / "conf/secret.yaml").exists()
    assert list(there.glob(".mlx_ring_sync*")) == list(checkout.glob(".mlx_ring_sync*")) == []
    done = lab.hosts("sync", "lab.json", "--", "--no-such-option", folder="check out")
    assert done.returncode == 3 and done.stdout.count("uv sync ended with status 2") == 2, done


def test_nothing_is_removed_of_another_project(lab: Lab) -> None:
    mine, there = (lab.disk(number) / "other" for number in (1, 2))
    for folder in (mine, there):
        (folder / "conf").mkdir(parents=True)
        (folder / "pyproject.toml").write_text("")
    (there / "conf/own.yaml").write_text("a: 1")
    (mine / ".env").write_text("TOKEN=1")
    (mine / "model.py").write_text("")
    lab.write("other/lab.json", [entry(lab.cluster.addresses[1])])
    done = lab.hosts("sync", "lab.json", "--no-environment", folder="other")
    assert done.returncode == 0, done
    assert (there / "conf/own.yaml").exists() and (there / "model.py").exists()
    assert not (there / ".env").exists()


def test_what_cannot_be_copied(lab: Lab) -> None:
    nobody = lab.cluster.addresses[0].rpartition(".")[0] + ".99"
    (lab.disk(1) / "project/.git").mkdir(parents=True)
    lab.write("project/lab.json", [entry(lab.cluster.addresses[1]), entry(nobody)])
    refused(lab.hosts("sync", "lab.json", folder="project"), "has no pyproject.toml")
    done = lab.hosts("sync", "lab.json", "--no-environment", folder="project")
    assert done.returncode == 3 and f"copy on {nobody} … [fail] ssh failed" in done.stdout, done
    assert (lab.disk(2) / "project/lab.json").exists()
    refused(lab.hosts("sync", str(lab.work / "project/lab.json"), folder="/"), "is no project's folder")
