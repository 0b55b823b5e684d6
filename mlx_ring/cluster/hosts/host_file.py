"""A host file in mlx.launch's own format: which hosts take part, and by which addresses the ring joins them.

    [{"ssh": NAME, "ips": [IPv4, …]}, …]
    {"backend": "ring", "envs": ["KEY=VALUE", …], "hosts": [{"ssh": NAME, "ips": [IPv4, …]}, …]}

mlx.launch takes what it can and fails later, on some host; here a mistake is one line at once. No mlx here.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mlx_ring.cluster.hosts.host_json import check_ring_ip, read_json, shown
from mlx_ring.errors import ConfigError

BACKENDS = ("ring", "mpi", "nccl", "jaccl", "jaccl-ring")  # mlx.launch's
FORMAT = '{"ssh": NAME, "ips": [IPv4 address]}'


@dataclass(frozen=True, kw_only=True)
class Host:
    """One rank: the host that ssh calls `ssh`, and its IPv4 addresses. The same `ssh` twice: two ranks."""

    ssh: str
    ips: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class HostFile:
    """`hosts` by rank, at least one; `envs` is set on every host; `backend` is ring, or None where unsaid."""

    hosts: tuple[Host, ...]
    envs: dict[str, str]
    backend: str | None

    @property
    def names(self) -> list[str]:
        """The machines, as ssh calls them, each once."""
        return list(dict.fromkeys(host.ssh for host in self.hosts))


def read_hostfile(path: Path) -> HostFile:
    """Read and check a host file. Keys that mlx.launch would ignore are ignored, unless they look mistyped.

    Raises: ConfigError for a file that cannot be read, is no host file, or names hosts that no ring can join.
    """
    subject = f"host file {path}"
    return parse_hostfile(read_json(path, subject), subject)


def parse_hostfile(content: object, subject: str) -> HostFile:
    """Of a host file's content. Raises: ConfigError, beginning with `subject`."""
    settings = _keys(subject, content, ("backend", "envs", "hosts")) if isinstance(content, dict) else {}
    entries = settings.get("hosts") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{subject} names no hosts; it must list one or more, each {FORMAT}; got {shown(entries)}"
        )
    backend = _backend(subject, settings.get("backend"))
    envs = _envs(subject, settings.get("envs", []))
    hosts = tuple(_host(f"{subject}, entry {number}", entry) for number, entry in enumerate(entries, start=1))
    _check_together(subject, hosts)
    return HostFile(hosts=hosts, envs=envs, backend=backend)


def _keys(where: str, value: object, known: tuple[str, ...]) -> dict[str, object]:
    """A JSON object, each of whose unknown keys is far from the known ones."""
    found = cast(dict[str, object], value)
    for key in [key for key in found if key not in known]:
        for meant in difflib.get_close_matches(key.lower(), known, n=1):
            raise ConfigError(f"{where}: unknown key {shown(key)}; did you mean {meant}?")
    return found


def _backend(subject: str, backend: object) -> str | None:
    if backend in (None, ""):  # mlx.distributed_config leaves it empty where it does not know
        return None
    if backend == "ring":
        return "ring"
    if backend not in BACKENDS:
        raise ConfigError(f"{subject}: unknown backend {shown(backend)}; known: {', '.join(BACKENDS)}")
    raise ConfigError(
        f"{subject} is for backend {backend}, but mlx-ring run --hostfile starts rings only; "
        "use mlx.launch --hostfile, or leave the backend out"
    )


def _envs(subject: str, entries: object) -> dict[str, str]:
    """Messages hold names only: a value may be a secret."""
    if not isinstance(entries, list):
        raise ConfigError(f'{subject}: envs must be a list of "KEY=VALUE"; got {_kind(entries)}')
    envs: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{subject}, envs entry {number}"
        if not isinstance(entry, str):
            raise ConfigError(f"{where}: must be text of the form KEY=VALUE; got {_kind(entry)}")
        key, equals, value = entry.partition("=")
        if not equals or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) is None:
            raise ConfigError(
                f"{where}: must have the form KEY=VALUE, KEY of letters, digits and _; got {shown(key)}"
            )
        if not value.isprintable():
            raise ConfigError(
                f"{where}: the value of {key} holds a control character, which no shell would pass on"
            )
        if key in envs:
            raise ConfigError(f"{where}: {key} is set a second time; keep one of the two")
        envs[key] = value
    return envs


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), shown(value))  # a number, true, false, null


def _host(where: str, entry: object) -> Host:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be {FORMAT}; got {shown(entry)}")
    keys = _keys(where, entry, ("ssh", "ips", "rdma"))
    if "ssh" not in keys:
        raise ConfigError(f'{where}: has no "ssh", the name that ssh knows the host by; got {shown(entry)}')
    ssh = check_ssh_name(where, keys["ssh"])
    where, ips = f"{where} ({ssh})", keys.get("ips", [])
    if not isinstance(ips, list) or not all(isinstance(ip, str) for ip in ips):
        raise ConfigError(f'{where}: ips must be a list of addresses, ["192.168.1.11"]; got {shown(ips)}')
    if not ips:
        raise ConfigError(
            f"{where}: has no ips; the ring needs the IPv4 address by which the others reach it"
        )
    for ip in ips:
        _check_ip(where, ip)
    if len(set(ips)) < len(ips):
        raise ConfigError(f"{where}: an address is given twice in {shown(ips)}; give each once")
    return Host(ssh=ssh, ips=tuple(ips))


def check_ssh_name(where: str, ssh: object) -> str:
    """A name that ssh takes for a host, not for an option or a piece of a command. Raises: ConfigError,
    beginning with `where`, for any other."""
    if not isinstance(ssh, str) or not ssh:
        raise ConfigError(f"{where}: ssh must be the name that ssh knows the host by; got {shown(ssh)}")
    if ssh.startswith("-"):
        raise ConfigError(
            f"{where}: ssh name {shown(ssh)} starts with -, so that ssh would take it for an option"
        )
    if not ssh.isprintable() or re.search(r"""[\s'"`$\\;&<>|(){}]""", ssh):  # what ssh itself refuses
        raise ConfigError(f"{where}: ssh name {shown(ssh)} holds a space or a character no host name has")
    if ssh.startswith("ssh://"):
        _check_port(where, ssh.removeprefix("ssh://").rpartition("@")[2].partition("/")[0])
    elif re.fullmatch(r"[^:]*:[^:]*", ssh):
        raise ConfigError(
            f"{where}: ssh name {shown(ssh)} holds a port; write ssh://NAME:PORT, or put it in ssh's config"
        )
    return ssh


def _check_port(where: str, host: str) -> None:
    _, colon, port = re.sub(r"^\[.*\]", "", host).partition(":")
    if colon and (re.fullmatch(r"[0-9]{1,5}", port) is None or not 1 <= int(port) <= 65535):
        raise ConfigError(f"{where}: the port of ssh must be between 1 and 65535; got {port!r}")


def _check_ip(where: str, ip: str) -> None:
    if re.fullmatch(r"[0-9.]+:.*", ip):
        raise ConfigError(
            f"{where}: {ip!r} holds a port; give the address alone, the launcher chooses free ports"
        )
    check_ring_ip(where, ip)


def _check_together(subject: str, hosts: tuple[Host, ...]) -> None:
    """Every rank has as many addresses, and no address belongs to two hosts."""
    if len({len(host.ips) for host in hosts}) > 1:
        counts = ", ".join(
            f"entry {number} ({host.ssh}): {len(host.ips)}" for number, host in enumerate(hosts, start=1)
        )
        raise ConfigError(f"{subject}: every entry needs as many ips as the others; got {counts}")
    owner: dict[str, tuple[int, str]] = {}
    for number, host in enumerate(hosts, start=1):
        for ip in host.ips:
            first, ssh = owner.setdefault(ip, (number, host.ssh))
            if ssh != host.ssh:
                raise ConfigError(
                    f"{subject}: entries {first} ({ssh}) and {number} ({host.ssh}) both have the address "
                    f"{ip}; give each host its own, or ranks of one host the same ssh name"
                )
