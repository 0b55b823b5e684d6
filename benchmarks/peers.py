"""Compares mlx_ring with what people would use instead, on the same model, data and batch.

Each peer is a group of processes of its own. The peers take turns, a block of steps each, so that a slow
moment of the machine meets all of them. All start from the same weights and train on the same batches (the
loops by hand repeat the first eight; mlx_ring reads on), and their first losses are compared, to be sure that
it is the same model. Figures are medians of the rounds' ratios. On a CPU the very same loop is up to a fifth
faster or slower each time it is launched, for as long as it lives: so a full run launches all of them several
times there.

    mlx_ring_alone        as many independent runs of one rank, at the same time: shows what the wire costs.
                          With several ranks, the speed over it is the weak efficiency
    mlx_by_hand           a compiled MLX step with nn.average_gradients, waited for at every step
    mlx_by_hand_unwaited  the same without waiting
    mlx_lm                the trainer of mlx-lm, on this model and these batches
    torch_ddp[_compiled]  PyTorch's DDP: gloo on a CPU, NCCL on a GPU, there also with torch.compile; plain
                          PyTorch if there is one rank
    torch_fsdp2           PyTorch's fully_shard

A peer that is not installed is left out, and a line says so. What the peers lack: the loops by hand have no
record, no checks and no resume, and give all ranks the same weight even if they have fewer targets; so does
mlx-lm, which does not clip either; PyTorch's bits change with the number of ranks.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
from page import Curves

from mlx_ring.cluster.finding import FOUND

PROGRAM = str(Path(__file__).with_name("peers_ranks.py"))
CPU = (
    "model=transformer", "data=synthetic", "data.sequence_length=64", "trainer.micro_batch_size=8",
)  # fmt: skip
GPU = (*harness.GPT2_124M, "trainer.micro_batch_size=16")
BATCH = {True: 16, False: 8}  # samples of a rank; on a GPU, on a CPU
# Launches, rounds in a launch, steps in a round; by whether there is a GPU and whether it is a quick run.
LAUNCHES = {
    (True, True): (1, 6, 5),
    (True, False): (1, 20, 10),
    (False, True): (1, 4, 4),
    (False, False): (7, 4, 8),
}
ALONE = "mlx_ring_alone"
SAME_LOSS = 0.02  # relative difference of the first losses that rounding may explain


@dataclass
class Peer:
    """The ranks of one peer, which wait for orders."""

    name: str
    ranks: list[subprocess.Popen]

    def answers(self) -> list[str]:
        """Waits for an answer of every rank. Raises: Failed if a rank has ended."""
        found: list[str] = []
        for rank in self.ranks:
            assert rank.stdout is not None
            line = next((line for line in rank.stdout if line.startswith(FOUND)), None)
            if line is None:
                statuses = [each.wait() for each in self.ranks]
                raise harness.Failed(f"{self.name}: ranks ended with statuses {statuses}")
            found.append(line.partition(FOUND)[2])
        return found

    def steps(self, count: int) -> dict[str, float]:
        """Orders this many steps. Returns the slowest rank's seconds, mean loss and largest memory."""
        for rank in self.ranks:
            assert rank.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `answers` reports a rank that has ended
                rank.stdin.write(f"{count}\n")
                rank.stdin.flush()
        told = [json.loads(line) for line in self.answers()]
        loss = statistics.mean(each["loss"] for each in told)
        return {"loss": loss} | {key: max(each[key] for each in told) for key in ("seconds", "peak_bytes")}

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
            with contextlib.suppress(BrokenPipeError), rank:  # closing flushes an order that it never read
                pass


def start(name: str, ranks: int, gpu: bool, overrides: tuple[str, ...], folder: Path) -> Peer:
    """Starts the ranks of one peer, on free ports and each on a GPU of its own. Returns at once."""
    variables: list[dict[str, str]] = [{}]
    if name == ALONE:
        variables = [local_ranks.gpu(rank) if gpu else {} for rank in range(ranks)]
    elif name.startswith("torch"):
        (port,) = local_ranks.free_ports(1)
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables = [common | {"RANK": str(rank)} for rank in range(ranks)]
    elif ranks > 1 and gpu:
        variables = local_ranks.nccl_variables(ranks)
    elif ranks > 1:
        variables = local_ranks.ring_variables(ranks, folder / f"{name}.json")
    batch = f"trainer.global_batch_size={BATCH[gpu] * (1 if name == ALONE else ranks)}"
    command = [sys.executable, PROGRAM, name, *overrides, batch]
    return Peer(
        name, local_ranks.start_ranks(command, variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )


def candidates(gpu: bool, ranks: int) -> list[str]:
    names = ["mlx_ring", *([ALONE] if ranks > 1 else []), "mlx_by_hand", "mlx_by_hand_unwaited"]
    for module, package, title, peers in (
        ("mlx_lm", "mlx-lm", "mlx-lm", ["mlx_lm"]),
        ("torch", "torch", "PyTorch", ["torch_ddp", *(["torch_ddp_compiled"] if gpu else []), "torch_fsdp2"]),
    ):
        if importlib.util.find_spec(module) is not None:
            names += peers
            continue
        remedy = f"uv run --with {package} python benchmarks/peers.py"
        print(f"{title} is left out because it is not installed: {remedy}", file=sys.stderr)
    return names


def compare(
    names: list[str],
    ranks: int,
    gpu: bool,
    overrides: tuple[str, ...],
    launches: int,
    rounds: int,
    steps: int,
) -> tuple[dict[str, float], list[Curves]]:
    """Returns each peer's seconds of a step, mlx_ring's speed over each peer's, and a plot of the rounds."""
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(launches):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            peers: dict[str, Peer] = {}
            for name in names:  # one after the other, so that they do not slow each other's start
                peers[name] = start(name, ranks, gpu, overrides, Path(folder))
                stack.callback(peers[name].end)
                peers[name].answers()
            first = {name: peer.steps(1)["loss"] for name, peer in peers.items()}
            for loss in first.values():
                if abs(loss / first["mlx_ring"] - 1) > SAME_LOSS:
                    raise harness.Failed(f"not the same model: first losses {first}")
            for peer in peers.values():
                peer.steps(3)
            for turn in range(rounds):
                for name in names if turn % 2 else reversed(names):
                    seen = peers[name].steps(steps)
                    times[name].append(seen["seconds"] / steps)
                    peaks[name] = seen["peak_bytes"]
    curves = Curves(
        title=f"A step of each peer, {ranks} rank(s)",
        x_label="round",
        y_label="seconds",
        x=list(range(launches * rounds)),
        series=times,
        logarithmic=False,
    )
    return figures_of(times, peaks, rounds), [curves]


def figures_of(times: dict[str, list[float]], peaks: dict[str, float], rounds: int) -> dict[str, float]:
    """Returns the figures, given each peer's seconds of a step by round and its peak memory in bytes.

    `rounds` is the number in a launch. If there were several launches, their lowest and highest medians are
    among the figures.
    """
    figures: dict[str, float] = {}
    for name, seconds in times.items():
        figures[f"{name}_step_seconds"] = statistics.median(seconds)
        figures[f"{name}_peak_bytes"] = peaks[name]
        if name == "mlx_ring":
            continue
        ratios = [other / own for other, own in zip(seconds, times["mlx_ring"], strict=True)]
        figures[f"speed_over_{name}"] = statistics.median(ratios)
        if len(ratios) > rounds:
            launches = [ratios[start : start + rounds] for start in range(0, len(ratios), rounds)]
            medians = [statistics.median(launch) for launch in launches]
            figures[f"speed_over_{name}_lowest"] = min(medians)
            figures[f"speed_over_{name}_highest"] = max(medians)
    return figures


def main() -> None:
    gpu = mx.default_device() == mx.gpu
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ranks", type=harness.at_least(1), default=1 if gpu else min(2, os.cpu_count() or 1))
    own.add_argument("--peers", default="", help="only these beside mlx_ring, such as mlx_by_hand,mlx_lm")
    own.add_argument(
        "--override", action="append", default=[], help="of train.py; may be given several times"
    )
    options = harness.parse("peers", own)
    if any(override.startswith("trainer.global_batch_size=") for override in options.override):
        sys.exit("error: peers.py sets the global batch itself, so --override cannot set it")
    overrides = (*(GPU if gpu else CPU), *options.override)

    def measure(quick: bool) -> tuple[dict[str, float], list[Curves]]:
        launches, rounds, steps = LAUNCHES[gpu, quick]
        names = candidates(gpu, options.ranks)
        if options.peers:
            wanted = ["mlx_ring", *(name for name in options.peers.split(",") if name != "mlx_ring")]
            if unknown := set(wanted) - set(names):
                raise harness.Failed(
                    f"there is no peer {', '.join(sorted(unknown))} on this machine;"
                    f" --peers takes {', '.join(names)}"
                )
            names = wanted
        return compare(names, options.ranks, gpu, overrides, launches, rounds, steps)

    by_hand = "speed_over_mlx_by_hand"
    alone = f"speed_over_{ALONE}"
    goals: harness.Goals = {by_hand: (">=", 0.99), alone: (">=", 0.99)}
    if not gpu:
        goals = {by_hand: (">=", 0.98), alone: (">=", 0.9)}
    quick_goals: harness.Goals = {by_hand: (">=", 0.9), alone: (">=", 0.8)}
    if not gpu:  # one launch, which may be a fifth slower than the next
        quick_goals = {by_hand: (">=", 0.8), alone: (">=", 0.7)}
    harness.run(options, measure, goals, quick_goals, quick_attempts=3)


if __name__ == "__main__":
    main()
