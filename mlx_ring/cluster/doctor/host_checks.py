"""Judges the facts of hosts: what differs between them, and what is missing for training together.

Asks no host: takes the facts that `host_probe` gave, by host, and returns findings.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_ring.cluster.finding import Check, fail, ok, warn
from mlx_ring.cluster.hosts.probe_link import ByHost, Facts

PYTHONS = ((3, 11), (3, 14))  # the first is supported, the second no longer
LIBRARIES = ("numpy", "hydra-core", "omegaconf", "safetensors")
SYNC = "mlx-ring hosts sync FILE brings every host to what is here"
FULL_BYTES = 64 * 2**20  # less free than this is too little for any checkpoint
SCARCE_BYTES = 2 * 2**30  # less free than this is too little for large checkpoints
SKEW_SECONDS = 2.0  # a clock may differ by this much
LAUNCHER_VARIABLES = (
    "MLX_RANK",
    "MLX_WORLD_SIZE",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
)
PRELOAD = "mlx-ring run --openblas 1 preloads it, or LD_PRELOAD={library} OPENBLAS_NUM_THREADS=1 does"


def judge(found: ByHost, here: Facts) -> Iterator[Check]:
    """Yields the findings about every host.

    Args:
        found: the facts by host.
        here: the facts of this machine; they decide if two values are equally common.
    """
    for host, facts in found.items():
        yield _python(host, facts, here)
        yield _mlx(host, facts, here)
        yield _mlx_ring(host, facts, here)
        if facts["packages"]["mlx-ring"]:
            yield from _sources(host, facts, here)
        yield _kind(host, found, here)
        if facts["system"] == "Linux" and facts["build"] == "mlx-cpu":
            yield _blas(host, facts)
        yield _libmpi(host, found)
        yield _disk(host, facts)
        yield sleep(host, facts)
        yield from variables(host, found, here)


def skew(host: str, seconds: float, uncertain_seconds: float) -> Check:
    """Judges how far a host's clock is ahead of the one here."""
    detail = f"{seconds:+.2f} s from the one here"
    if abs(seconds) < SKEW_SECONDS + uncertain_seconds:
        return ok("clock", host, detail)
    remedy = "set it by the network's time: no run needs it, but times in logs would mislead"
    return warn("clock", host, detail, remedy)


def _most_common(found: ByHost, here: Facts, value: Callable[[Facts], Any]) -> Any:
    """Returns the value that most hosts have; if two are equally common, the one here."""
    counts = Counter(value(facts) for facts in found.values())
    return max(counts, key=lambda each: (counts[each], each == value(here)))


def _hosts_with(found: ByHost, value: Callable[[Facts], Any], wanted: Any) -> str:
    """Returns the names of the hosts that have this value, at most three and the number of the others."""
    names = [host for host, facts in found.items() if value(facts) == wanted]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _difference(
    host: str, found: ByHost, here: Facts, value: Callable[[Facts], Any]
) -> tuple[Any, str] | None:
    """Returns the most common value and the hosts that have it; None if this host has it too."""
    common = _most_common(found, here, value)
    if value(found[host]) == common:
        return None
    return common, _hosts_with(found, value, common)


# What `mlx-ring hosts sync` brings to hosts is compared with what is here, not with the most common value.


def _python(host: str, facts: Facts, here: Facts) -> Check:
    own, ours = (".".join(each["python"].split(".")[:2]) for each in (facts, here))
    detail = f"{facts['python']}, {facts['executable']}"
    number = tuple(int(part) for part in own.split("."))
    low, high = PYTHONS
    remedy = f"give another with --python, the same path on every host; {SYNC}"
    if not low <= number < high:
        supported = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        return fail("python", host, f"{detail}: mlx_ring needs {supported}", remedy)
    if own != ours:
        return fail("python", host, f"{detail}: {here['python']} here", remedy)
    return ok("python", host, detail)


def _mlx(host: str, facts: Facts, here: Facts) -> Check:
    own, ours = facts["packages"]["mlx"], here["packages"]["mlx"]
    detail = f"{own}{', ' if facts['build'] else ''}{facts['build']}"
    if not own:
        return fail("mlx", host, f"not installed in {facts['executable']}", SYNC)
    if facts["mlx_problem"]:
        remedy = "reinstall it there, in a build for that machine"
        if "libmlx" in facts["mlx_problem"]:
            remedy = (
                "install one of the extras cpu, cuda12 and cuda13 there: the package mlx alone has no library"
            )
        return fail("mlx", host, f"{detail} cannot be loaded: {facts['mlx_problem']}", remedy)
    if own != ours:
        return fail("mlx", host, f"{detail}: {ours} here", SYNC)
    return ok("mlx", host, detail)


def _mlx_ring(host: str, facts: Facts, here: Facts) -> Check:
    packages = facts["packages"]
    own = packages["mlx-ring"]
    if not own:
        return fail("mlx_ring", host, f"not installed in {facts['executable']}", SYNC)
    if own != here["packages"]["mlx-ring"]:
        return fail("mlx_ring", host, f"{own}: {here['packages']['mlx-ring']} here", SYNC)
    if facts["mlx_ring_problem"] and not facts["mlx_problem"]:
        return fail("mlx_ring", host, f"{own} cannot be loaded: {facts['mlx_ring_problem']}", SYNC)
    for name in LIBRARIES:
        if packages[name] != here["packages"][name]:
            detail = f"{own}; {name} {packages[name]}: {here['packages'][name]} here"
            return warn("mlx_ring", host, detail, SYNC)
    return ok("mlx_ring", host, own)


def _sources(host: str, facts: Facts, here: Facts) -> Iterator[Check]:
    for name, what in (("source", "mlx_ring's own code"), ("configuration", "conf/")):
        own, ours = facts[name][:8], here[name][:8]
        if own != ours:
            detail = f"{what} has digest {own}: {ours} here"
            yield fail(name, host, detail, f"bring every host to the same commit; {SYNC}")
        else:
            yield ok(name, host, own)
    problems = [
        f"{name} {'differs from the one here' if name in facts['own_code'] else 'is missing'}"
        for name, ours in here["own_code"].items()
        if facts["own_code"].get(name) != ours
    ]
    if problems:
        yield warn("own code", host, "; ".join(problems[:5]), SYNC)


def _kind(host: str, found: ByHost, here: Facts) -> Check:
    def kind(facts: Facts) -> tuple[str, str]:
        return facts["chip"], facts["build"]

    facts = found[host]
    detail = f"{facts['chip']}, {facts['cores']} cores"
    if differs := _difference(host, found, here, kind):
        other = ", ".join(filter(None, differs[0]))
        remedy = (
            "nothing to mend: give trainer.split=measured, and communicator=native if exact is refused; "
            "equal bits need machines of one kind"
        )
        return warn("machine", host, f"{detail}: {differs[1]} is another kind ({other})", remedy)
    return ok("machine", host, detail)


def _blas(host: str, facts: Facts) -> Check:
    if facts["blas"]:
        return ok("blas", host, f"{facts['blas']} is preloaded")
    detail = "the one in MLX's wheel for Linux CPUs, whose matrix products take about ten times as long"
    if facts["openblas"]:
        return warn("blas", host, f"{detail} as OpenBLAS's", PRELOAD.format(library=facts["openblas"]))
    remedy = f"apt-get install libopenblas0-pthread; then {PRELOAD.format(library='libopenblas.so.0')}"
    return warn("blas", host, f"{detail} as OpenBLAS's, which is not installed", remedy)


def _libmpi(host: str, found: ByHost) -> Check:
    own = found[host]["libmpi"]
    if own:
        return ok("libmpi", host, own)
    having = [other for other, facts in found.items() if facts["libmpi"]]
    if having:
        detail = f"none; {', '.join(having[:3])} has one"
        return warn("libmpi", host, detail, "for mpirun, install it everywhere: uv sync --extra mpi")
    return ok("libmpi", host, "none; only mpirun would need it")


def _disk(host: str, facts: Facts) -> Check:
    disk = facts["disk"]
    detail = f"{disk['free_bytes'] / 2**30:.1f} GiB free in {disk['folder']}"
    remedy = "make room there, or give another run.dir: checkpoints and logs go there"
    if disk["error"]:
        return fail("disk", host, f"nothing can be written in {disk['folder']}: {disk['error']}", remedy)
    if disk["free_bytes"] < FULL_BYTES:
        return fail("disk", host, detail, remedy)
    if disk["free_bytes"] < SCARCE_BYTES:
        return warn("disk", host, detail, remedy)
    return ok("disk", host, detail)


def sleep(host: str, facts: Facts) -> Check:
    """Judges whether a host falls asleep by itself."""
    found = facts["sleep"]
    if found["minutes"]:
        detail = f"falls asleep after {found['minutes']} idle minutes"
        remedy = "sudo pmset -a sleep 0; a run keeps it awake, but if it sleeps before, it cannot be reached"
        return warn("sleep", host, detail, remedy)
    if found["battery"]:
        return warn("sleep", host, "a laptop: it sleeps when closed", "leave it open and plugged in")
    return ok("sleep", host, "does not fall asleep by itself")


def variables(host: str, found: ByHost, here: Facts) -> Iterator[Check]:
    """Yields findings about the environment variables that MLX, BLAS and the dynamic loader read.

    Each is compared with the other hosts' and judged by itself.
    """
    own: Mapping[str, str] = found[host]["variables"]
    fine = True
    for name in sorted({name for facts in found.values() for name in facts["variables"]}):
        differs = _difference(host, found, here, lambda facts, name=name: facts["variables"].get(name))
        if name in LAUNCHER_VARIABLES and name in own:
            remedy = "unset it in that host's shell profile: only a launcher must set it"
            yield warn("variables", host, f"{name}={own[name]}", remedy)
        elif differs and name not in LAUNCHER_VARIABLES:
            detail = f"{name} is {own.get(name, 'unset')}: {differs[1]} has {differs[0] or 'it unset'}"
            remedy = f"set {name} alike on every host, in the host file's envs, or nowhere"
            refused = name == "MLX_METAL_FAST_SYNCH"  # the ranks refuse a difference when they meet
            yield (fail if refused else warn)("variables", host, detail, remedy)
        elif name == "MLX_METAL_FAST_SYNCH" and own.get(name, "0") != "0":
            remedy = "leave it unset: it can block the GPU until the machine is restarted"
            yield warn("variables", host, f"{name}={own[name]}", remedy)
        else:
            continue
        fine = False
    if fine:
        shown = ", ".join(f"{name}={own[name]}" for name in sorted(own))
        yield ok("variables", host, shown or "none is set")
