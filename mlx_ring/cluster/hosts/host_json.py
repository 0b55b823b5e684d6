"""What every form of a host file shares: reading its JSON, and checking the addresses of a ring.

The user writes one form (`host_file`); a launcher gives the other one to its ranks (`rank/environment`).
"""

import ipaddress
import json
from pathlib import Path

from mlx_ring.errors import ConfigError


def read_json(path: str | Path, subject: str) -> object:
    """Returns the JSON value in a file; None if the file is empty.

    Args:
        path: the file.
        subject: what the file is, with its name; an error's message begins with it.

    Raises: ConfigError if the file cannot be read or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        raise ConfigError(f"{subject} cannot be read: {error}") from None
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{subject} is not JSON at {where}: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{subject} is not a list of hosts: {error}") from None
    except RecursionError:
        raise ConfigError(f"{subject} is not a list of hosts: it is nested too deeply") from None


def excerpt(value: object) -> str:
    """Returns the beginning of a value as JSON, at most 80 characters, all printable."""
    try:
        return json.dumps(value)[:80]
    except RecursionError:  # deeper than what can be read
        return "something nested too deeply"


def check_ring_ip(where: str, text: str) -> None:
    """Raises: ConfigError, beginning with `where`, unless the text is the IPv4 address of one host."""
    try:
        ip = ipaddress.ip_address(text.strip("[]"))
        if ip.version == 4 and text != str(ip):  # brackets are for IPv6
            raise ValueError(text)
    except ValueError:
        raise ConfigError(
            f"{where}: {text!r} is not an IP address; the ring takes no host names: give the IPv4 address"
        ) from None
    if ip.version == 6:
        raise ConfigError(
            f"{where}: {text} is IPv6, which the ring does not support; use the host's IPv4 address"
        )
    if ip.is_unspecified:
        raise ConfigError(
            f"{where}: {text} is no address of a host; the ring's traffic is neither encrypted nor signed"
        )
