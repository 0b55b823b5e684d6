"""Reads a host file in the format of mlx.launch: which hosts take part, and by which addresses.

    [{"ssh": NAME, "ips": [IPv4, …]}, …]
    {"backend": "ring", "envs": ["KEY=VALUE", …], "hosts": [{"ssh": NAME, "ips": [IPv4, …]}, …]}

mlx.launch accepts almost anything and fails later, on some host; here a mistake is one line at once.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mlx_ring.cluster.hosts.host_json import check_ring_ip, excerpt, read_json
from mlx_ring.errors import ConfigError

BACKENDS = ("ring", "mpi", "nccl", "jaccl", "jaccl-ring")  # that mlx.launch knows
FORMAT = '{"ssh": NAME, "ips": [IPv4 address]}'


@dataclass(frozen=True, kw_only=True)
class Host:
    """One rank: the name by which ssh knows its host, and IPv4 addresses of that host.

    Two entries with the same `ssh` are two ranks on one host.
    """

    ssh: str
    ips: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class HostFile:
    """The content of a host file.

    Attributes:
        hosts: one entry a rank, in the order of the ranks; at least one.
        envs: environment variables that are set on every host.
        backend: "ring", or None if the file does not say.
    """

    hosts: tuple[Host, ...]
    envs: dict[str, str]
    backend: str | None

    @property
    def names(self) -> list[str]:
        """The machines, as ssh calls them, each once."""
        return list(dict.fromkeys(host.ssh for host in self.hosts))


def read_hostfile(path: Path) -> HostFile:
    """Reads and checks a host file. Ignores keys that mlx.launch would ignore, unless they look mistyped.

    Raises: ConfigError if the file cannot be read, is not a host file, or names hosts that no ring can join.
    """
    subject = f"host file {path}"
    return parse_hostfile(read_json(path, subject), subject)


def parse_hostfile(content: object, subject: str) -> HostFile:
    """Checks the content of a host file. Raises: ConfigError, with a message that begins with `subject`."""
    settings = _keys(subject, content, ("backend", "envs", "hosts")) if isinstance(content, dict) else {}
    entries = settings.get("hosts") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{subject} names no hosts; it must list one or more, each {FORMAT}; got {excerpt(entries)}"
        )
    backend = _backend(subject, settings.get("backend"))
    envs = _envs(subject, settings.get("envs", []))
    hosts = tuple(_host(f"{subject}, entry {number}", entry) for number, entry in enumerate(entries, start=1))
    _check_together(subject, hosts)
    return HostFile(hosts=hosts, envs=envs, backend=backend)


def _keys(where: str, value: object, known: tuple[str, ...]) -> dict[str, object]:
    """Returns a JSON object. Raises: ConfigError for an unknown key that is similar to a known one."""
    found = cast(dict[str, object], value)
    for key in [key for key in found if key not in known]:
        for meant in difflib.get_close_matches(key.lower(), known, n=1):
            raise ConfigError(f"{where}: unknown key {excerpt(key)}; did you mean {meant}?")
    return found


def _backend(subject: str, backend: object) -> str | None:
    """Raises: ConfigError unless it is the ring or not given."""
    if backend in (None, ""):  # mlx.distributed_config leaves it empty if it does not know
        return None
    if backend == "ring":
        return "ring"
    if backend not in BACKENDS:
        raise ConfigError(f"{subject}: unknown backend {excerpt(backend)}; known: {', '.join(BACKENDS)}")
    raise ConfigError(
        f"{subject} is for backend {backend}, but mlx-ring run --hostfile starts rings only; "
        "use mlx.launch --hostfile, or leave the backend out"
    )


def _envs(subject: str, entries: object) -> dict[str, str]:
    """Checks the environment variables. Messages hold their names only, because a value may be a secret."""
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
                f"{where}: must have the form KEY=VALUE, KEY of letters, digits and _; got {excerpt(key)}"
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
    """Returns what kind of JSON value this is, without its content."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), excerpt(value))  # a number, true, false or null is shown itself


def _host(where: str, entry: object) -> Host:
    """Checks one entry. Raises: ConfigError, with a message that begins with `where`."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be {FORMAT}; got {excerpt(entry)}")
    keys = _keys(where, entry, ("ssh", "ips", "rdma"))
    if "ssh" not in keys:
        raise ConfigError(f'{where}: has no "ssh", the name that ssh knows the host by; got {excerpt(entry)}')
    ssh = check_ssh_name(where, keys["ssh"])
    where = f"{where} ({ssh})"
    ips = keys.get("ips", [])
    if not isinstance(ips, list) or not all(isinstance(ip, str) for ip in ips):
        raise ConfigError(f'{where}: ips must be a list of addresses, ["192.168.1.11"]; got {excerpt(ips)}')
    if not ips:
        raise ConfigError(
            f"{where}: has no ips; the ring needs the IPv4 address by which the others reach it"
        )
    for ip in ips:
        _check_ip(where, ip)
    if len(set(ips)) < len(ips):
        raise ConfigError(f"{where}: an address is given twice in {excerpt(ips)}; give each once")
    return Host(ssh=ssh, ips=tuple(ips))


def check_ssh_name(where: str, ssh: object) -> str:
    """Returns the name if ssh takes it for a host, and not for an option or a part of a command.

    Raises: ConfigError, with a message that begins with `where`, for any other name.
    """
    if not isinstance(ssh, str) or not ssh:
        raise ConfigError(f"{where}: ssh must be the name that ssh knows the host by; got {excerpt(ssh)}")
    if ssh.startswith("-"):
        raise ConfigError(
            f"{where}: ssh name {excerpt(ssh)} starts with -, so that ssh would take it for an option"
        )
    if not ssh.isprintable() or re.search(r"""[\s'"`$\\;&<>|(){}]""", ssh):  # what ssh itself refuses
        raise ConfigError(f"{where}: ssh name {excerpt(ssh)} holds a space or a character no host name has")
    if ssh.startswith("ssh://"):
        _check_port(where, ssh.removeprefix("ssh://").rpartition("@")[2].partition("/")[0])
    elif re.fullmatch(r"[^:]*:[^:]*", ssh):
        raise ConfigError(
            f"{where}: ssh name {excerpt(ssh)} holds a port; write ssh://NAME:PORT, or put it in ssh's config"
        )
    return ssh


def _check_port(where: str, host: str) -> None:
    """Checks the port of ssh://NAME:PORT, if there is one."""
    _, colon, port = re.sub(r"^\[.*\]", "", host).partition(":")
    if colon and (re.fullmatch(r"[0-9]{1,5}", port) is None or not 1 <= int(port) <= 65535):
        raise ConfigError(f"{where}: the port of ssh must be between 1 and 65535; got {port!r}")


def _check_ip(where: str, ip: str) -> None:
    """Raises: ConfigError unless it is an IPv4 address without a port."""
    if re.fullmatch(r"[0-9.]+:.*", ip):
        raise ConfigError(
            f"{where}: {ip!r} holds a port; give the address alone, the launcher chooses free ports"
        )
    check_ring_ip(where, ip)


def _check_together(subject: str, hosts: tuple[Host, ...]) -> None:
    """Raises: ConfigError if ranks differ in their number of addresses, or two hosts share an address."""
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
