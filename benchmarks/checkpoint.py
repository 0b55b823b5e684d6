"""Measures how long checkpoints of 100 MB and 1 GB stall the training loop, and how long the write takes.

The loop goes on while a thread writes the files. The stall is what `CheckpointManager.save` takes; the thread
does all the rest: digest, write, sync, reading back for the manifest, rename. The thread shares the cores and
the memory with the steps that run meanwhile, and what it costs them is measured too. A quick run saves 100 MB
only.
"""

import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import harness
import mlx.core as mx
import numpy as np

from mlx_ring.checkpoint.manager import CheckpointManager
from mlx_ring.checkpoint.saved_state import SavedArrays


def digest(weights: dict[str, mx.array]) -> str:
    """Returns the SHA-256 of the weights, computed in this thread, to check that of the writer."""
    total = hashlib.sha256()
    for path in sorted(weights):
        total.update(path.encode() + b"\0" + np.array(weights[path]).tobytes())
    return total.hexdigest()


def save_state(size_bytes: int, repeats: int) -> dict[str, float]:
    """Saves weights and two moments, `size_bytes` in all, several times.

    Returns: the median seconds of the stall and of the write, and the time of a step while the thread writes
    over that of a step at rest.
    """
    tensors = 24
    length = size_bytes // (3 * tensors * 4)
    names = [f"layers.{index}.weight" for index in range(tensors)]

    def draw() -> dict[str, mx.array]:
        return {name: mx.random.normal((length,)) for name in names}

    matrix = mx.random.normal((400, 400))
    stalls: list[float] = []
    writes: list[float] = []
    at_rest: list[float] = []
    beside: list[float] = []

    def step_seconds() -> float:
        start = time.perf_counter()
        mx.eval(matrix @ matrix)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        manager = CheckpointManager(Path(folder), keep_last=1, keep_best=0)
        files = {
            "model": draw(),
            "optimizer": {f"{part}.{name}": x for part in "mv" for name, x in draw().items()},
        }
        mx.eval(files)
        for step in range(repeats):
            files["model"] = {name: weight * 0.999 for name, weight in files["model"].items()}
            mx.eval(files)
            at_rest += [step_seconds() for _ in range(20)]
            state = SavedArrays(files, files["model"])
            manager.save(step, state, {"progress": {"step": step}}, since=time.perf_counter())
            while not (ended := manager.poll()):
                beside.append(step_seconds())
            (saved,) = ended
            assert saved.error is None, saved.error
            assert saved.parameters_sha256 == digest(files["model"]), "what was written is not what was held"
            stalls.append(saved.stall_seconds)
            writes.append(saved.write_seconds)
        manager.close()
    return {
        "stall_seconds": statistics.median(stalls),
        "write_seconds": statistics.median(writes),
        "steps_while_writing_over_at_rest": statistics.median(beside) / statistics.median(at_rest),
    }


def measure(quick: bool) -> dict[str, float]:
    figures: dict[str, float] = {}
    sizes = {"100_mb": 10**8} if quick else {"100_mb": 10**8, "1_gb": 10**9}
    for name, size_bytes in sizes.items():
        found = save_state(size_bytes, repeats=3 if quick else 7)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        figures[f"{name}_stall_over_write"] = found["stall_seconds"] / found["write_seconds"]
    return figures


if __name__ == "__main__":
    goals = {f"{size}_stall_over_write": ("<=", 0.10) for size in ("100_mb", "1_gb")}
    harness.run(harness.parse("checkpoint"), measure, goals)
