"""A host file is read as mlx.launch reads it; a mistake is one line that says where it is."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx._distributed_utils.common import Hostfile
from ranks import ROOT

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.errors import ConfigError

A, B = '{"ssh": "a", "ips": ["10.0.0.1"]}', '{"ssh": "b", "ips": ["10.0.0.2"]}'
WRONG = {  # the file's content, and what the refusal must name
    "empty": ("", ["names no hosts", "got null"]),
    "not JSON": ('[{"ssh": "a"},\n  oops]', ["not JSON at line 2, column 3"]),
    "not UTF-8": (b"\xff", ["cannot be read", "utf-8"]),
    "too deep": ("[" * 100_000, ["nested too deeply"]),
    "endless number": ("1" * 10_000, ["is not a list of hosts", "digits"]),
    "no hosts": ("[]", ["names no hosts", '{"ssh": NAME, "ips": [IPv4 address]}', "got []"]),
    "a number": ("3", ["names no hosts", "got 3"]),
    "no hosts in an object": ('{"backend": "ring"}', ["names no hosts", "got null"]),
    "hosts no list": ('{"hosts": {"ssh": "a"}}', ["names no hosts"]),
    "mistyped hosts": ('{"host": []}', ['unknown key "host"', "did you mean hosts?"]),
    "mistyped envs": (f'{{"env": [], "hosts": [{A}]}}', ['unknown key "env"', "did you mean envs?"]),
    "entry no object": (f'[{A}, "b"]', ["entry 2", '{"ssh": NAME', 'got "b"']),
    "MLX_HOSTFILE's format": ('[["10.0.0.1:5000"]]', ["entry 1", '{"ssh": NAME', 'got ["10.0.0.1:5000"]']),
    "no ssh": (f'[{A}, {{"ips": ["10.0.0.2"]}}]', ["entry 2", 'no "ssh"', '{"ips": ["10.0.0.2"]}']),
    "ssh a number": ('[{"ssh": 5, "ips": ["10.0.0.1"]}]', ["entry 1", "ssh must be the name", "got 5"]),
    "ssh empty": ('[{"ssh": "", "ips": ["10.0.0.1"]}]', ["entry 1", "ssh must be the name", 'got ""']),
    "ssh an option": (
        '[{"ssh": "-oProxyCommand=x", "ips": ["10.0.0.1"]}]',
        ["entry 1", '"-oProxyCommand=x"', "starts with -", "option"],
    ),
    "ssh with a space": ('[{"ssh": "a b", "ips": ["10.0.0.1"]}]', ["entry 1", '"a b"', "holds a space"]),
    "ssh with NUL": ('[{"ssh": "a\\u0000", "ips": ["10.0.0.1"]}]', ["entry 1", '"a\\u0000"', "character"]),
    "ssh with an escape": ('[{"ssh": "a\\u001b[2J", "ips": []}]', ["entry 1", '"a\\u001b[2J"', "character"]),
    "ssh half a character": ('[{"ssh": "\\ud800", "ips": []}]', ["entry 1", '"\\ud800"', "character"]),
    "ssh a command": ('[{"ssh": "a;reboot", "ips": ["10.0.0.1"]}]', ["entry 1", '"a;reboot"', "character"]),
    "ssh with a port": ('[{"ssh": "a:22", "ips": ["10.0.0.1"]}]', ["entry 1", '"a:22"', "ssh://NAME:PORT"]),
    "no ips": (f'[{A}, {{"ssh": "b"}}]', ["entry 2 (b)", "has no ips", "IPv4"]),
    "ips empty": (f'[{A}, {{"ssh": "b", "ips": []}}]', ["entry 2 (b)", "has no ips", "IPv4"]),
    "ips mistyped": ('[{"ssh": "a", "ip": ["10.0.0.1"]}]', ["entry 1", '"ip"', "did you mean ips?"]),
    "ips text": ('[{"ssh": "a", "ips": "10.0.0.1"}]', ["entry 1 (a)", "must be a list", 'got "10.0.0.1"']),
    "ips numbers": ('[{"ssh": "a", "ips": [167772161]}]', ["entry 1 (a)", "must be a list", "167772161"]),
    "a host name": (
        f'[{A}, {{"ssh": "b", "ips": ["b.local"]}}]',
        ["entry 2 (b)", "'b.local'", "not an IP address", "no host names", "give the IPv4 address"],
    ),
    "no address": ('[{"ssh": "a", "ips": ["10.0.0.256"]}]', ["entry 1 (a)", "'10.0.0.256'", "not an IP"]),
    "brackets": ('[{"ssh": "a", "ips": ["[10.0.0.1]"]}]', ["entry 1 (a)", "'[10.0.0.1]'", "not an IP"]),
    "IPv6": ('[{"ssh": "a", "ips": ["fe80::1"]}]', ["entry 1 (a)", "fe80::1 is IPv6", "IPv4 address"]),
    "every address": (
        '[{"ssh": "a", "ips": ["0.0.0.0"]}]',
        ["entry 1 (a)", "0.0.0.0", "no address of"],
    ),
    "address with a port": (
        '[{"ssh": "a", "ips": ["10.0.0.1:5000"]}]',
        ["entry 1 (a)", "'10.0.0.1:5000'", "holds a port", "give the address alone"],
    ),
    "an address of two hosts": (
        '[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.1"]}]',
        ["entries 1 (a) and 2 (b)", "10.0.0.1", "same ssh name"],
    ),
    "an address twice": (
        '[{"ssh": "a", "ips": ["10.0.0.1", "10.0.0.1"]}]',
        ["entry 1 (a)", '["10.0.0.1", "10.0.0.1"]', "twice"],
    ),
    "unequal": (
        f'[{A}, {{"ssh": "b", "ips": ["10.0.0.2", "10.0.1.2"]}}]',
        ["as many ips", "entry 1 (a): 1", "entry 2 (b): 2"],
    ),
    "envs an object": (f'{{"envs": {{"A": "1"}}, "hosts": [{A}]}}', ["envs must be a list", "an object"]),
    "envs a number": (f'{{"envs": [1], "hosts": [{A}]}}', ["envs entry 1", "KEY=VALUE", "got 1"]),
    "envs without =": (f'{{"envs": ["A=1", "PATH"], "hosts": [{A}]}}', ["envs entry 2", "KEY=", '"PATH"']),
    "envs with a space": (f'{{"envs": ["A B=1"], "hosts": [{A}]}}', ["envs entry 1", "KEY=VALUE", '"A B"']),
    "envs with NUL": (f'{{"envs": ["A=\\u0000"], "hosts": [{A}]}}', ["envs entry 1", "A", "control"]),
    "envs twice": (f'{{"envs": ["A=1", "A=2"], "hosts": [{A}]}}', ["envs entry 2", "A is set a second"]),
    "backend unknown": (
        f'{{"backend": "rings", "hosts": [{A}]}}',
        ['unknown backend "rings"', "known: ring, mpi, nccl, jaccl, jaccl-ring"],
    ),
    "backend a list": (f'{{"backend": ["ring"], "hosts": [{A}]}}', ['unknown backend ["ring"]', "known: "]),
}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "hosts.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    message = str(caught.value)
    assert message.startswith(f"host file {path}")
    assert message.isprintable()
    return message


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, name: str) -> None:
    content, words = WRONG[name]
    message = refusal(write(tmp_path, content))
    assert [word for word in words if word not in message] == [], message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.json")
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("backend", ["mpi", "nccl", "jaccl", "jaccl-ring"])
def test_another_backend_is_for_another_launcher(tmp_path: Path, backend: str) -> None:
    message = refusal(write(tmp_path, f'{{"backend": "{backend}", "hosts": [{A}, {B}]}}'))
    for words in (f"for backend {backend},", "mlx-ring run --hostfile starts rings only", "mlx.launch"):
        assert words in message


@pytest.mark.parametrize(
    "port", ["0", "-1", "99999", "text", "", "٣"], ids=["0", "-1", "99999", "text", "none", "arabic"]
)
def test_a_port_of_ssh_has_its_range(tmp_path: Path, port: str) -> None:
    content = json.dumps([{"ssh": f"ssh://me@a:{port}", "ips": ["10.0.0.1"]}])
    message = refusal(write(tmp_path, content))
    assert "entry 1" in message and f"between 1 and 65535; got {port!r}" in message


def test_no_depth_ends_in_a_traceback(tmp_path: Path) -> None:
    """Some depths can be read, but are too deep to be printed."""
    for depth in range(800, 1000):
        refusal(write(tmp_path, "[" * depth + "]" * depth))


@pytest.mark.parametrize("hosts", [f"[{A}]", "[]"], ids=["hosts", "no hosts"])
@pytest.mark.parametrize("envs", ['["API-KEY=hunter2"]', '["API_KEY=hunter2\\u0000"]', '"API_KEY=hunter2"'])
def test_a_secret_is_not_shown(tmp_path: Path, envs: str, hosts: str) -> None:
    assert "hunter2" not in refusal(write(tmp_path, f'{{"envs": {envs}, "hosts": {hosts}}}'))


# What is right


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"[{A}]", HostFile(hosts=(Host(ssh="a", ips=("10.0.0.1",)),), envs={}, backend=None)),
        (
            f'{{"backend": "ring", "envs": ["A=b=c", "E="], "hosts": [{A}, {A}, {B}], "comment": "mine"}}',
            HostFile(
                hosts=(*[Host(ssh="a", ips=("10.0.0.1",))] * 2, Host(ssh="b", ips=("10.0.0.2",))),
                envs={"A": "b=c", "E": ""},
                backend="ring",
            ),
        ),
        (
            '{"backend": "", "hosts": [{"ssh": "me@a", "ips": ["10.0.0.1", "10.0.1.1"], "rdma": []}]}',
            HostFile(hosts=(Host(ssh="me@a", ips=("10.0.0.1", "10.0.1.1")),), envs={}, backend=None),
        ),
        (
            '[{"ssh": "ssh://a:2222", "ips": ["8.8.8.8"]}, {"ssh": "fe80::1%en0", "ips": ["10.0.0.2"]}]',
            HostFile(
                hosts=(
                    Host(ssh="ssh://a:2222", ips=("8.8.8.8",)),
                    Host(ssh="fe80::1%en0", ips=("10.0.0.2",)),
                ),
                envs={},
                backend=None,
            ),
        ),
    ],
    ids=["one host", "three ranks on two hosts", "two cables", "forms of ssh"],
)
def test_what_is_right_is_read(tmp_path: Path, content: str, expected: HostFile) -> None:
    assert read_hostfile(write(tmp_path, content)) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mlx.launch leaves it open
@pytest.mark.parametrize("path", sorted((ROOT / "hostfiles").glob("*.json")), ids=lambda path: path.name)
def test_what_is_shipped_is_read_as_mlx_launch_reads_it(path: Path) -> None:
    theirs, ours = Hostfile.from_file(path), read_hostfile(path)
    assert [(host.ssh_hostname, tuple(host.ips)) for host in theirs.hosts] == [
        (host.ssh, host.ips) for host in ours.hosts
    ]
    assert theirs.envs == [f"{key}={value}" for key, value in ours.envs.items()]
    assert theirs.backend == (ours.backend or "")


# Anything at all

TEXT = st.text(max_size=8) | st.sampled_from(
    ["a", "10.0.0.1", "10.0.0.2", "ssh://a:1", "ssh://[", "A=1", "ring"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"ssh": TEXT | VALUES, "ips": st.lists(TEXT) | VALUES, "rdma": VALUES}
)
FILES = st.fixed_dictionaries(
    {"hosts": st.lists(ENTRIES | VALUES, max_size=3) | VALUES},
    optional={"backend": TEXT | VALUES, "envs": st.lists(TEXT) | VALUES, "hots": VALUES},
)


@given(content=(VALUES | st.lists(ENTRIES, max_size=3) | FILES).map(json.dumps) | st.text() | st.binary())
def test_anything_is_read_or_refused_in_one_line(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        try:
            found = read_hostfile(path)
        except ConfigError as error:
            assert re.match(f"host file {re.escape(str(path))}", str(error))
            assert "\n" not in str(error)
        else:
            assert found.hosts
            assert all(host.ssh and host.ips for host in found.hosts)
