"""What exact mode stands on: one micro-batch's gradient has the same bits on every rank, every time.

That holds among machines of one kind (chip, MLX, BLAS and its threads) for reproducible operations. Both are
tried before the first step, with the real model and data.
"""

import os
import sys
from functools import cache

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_info

from mlx_ring.communicator import Communicator
from mlx_ring.data.dataset import Split
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import ClusterError, agreed
from mlx_ring.gradient import MicroBatchGradient
from mlx_ring.mlx_version import MLX_VERSION
from mlx_ring.parameter_authority import checksums, odd_one_out, sha256_of


def device() -> str:
    """What computes, such as `gpu NVIDIA H200`."""
    found = mx.default_device()
    name = mx.device_info(found).get("device_name", "")
    return f"{'gpu' if found == mx.gpu else 'cpu'} {name}".strip()


@cache  # every checkpoint names it
def machine() -> str:
    """What decides how this process rounds, in words: chip, BLAS, MLX."""
    return f"{device()}, {_blas()}, MLX {MLX_VERSION}"


def _blas() -> str:
    """The BLAS behind MLX's matrix products on a CPU; NumPy's own is another."""
    if mx.default_device() == mx.gpu:
        return "its own kernels"
    if sys.platform == "darwin":
        return "Accelerate"
    found = [library for library in threadpool_info() if "numpy.libs" not in library["filepath"]]
    for library in found:
        if library["user_api"] == "blas":
            name, version = library["internal_api"], library["version"]
            kernels, threads = library.get("architecture", "one kernel"), library["num_threads"]
            return f"{name} {version} ({kernels}, {threads} thread{'s' if threads > 1 else ''})"
    return "the BLAS of MLX's wheel"


def first_gradient(
    gradient: MicroBatchGradient, split: Split, *, seed: int, micro_batch_size: int
) -> tuple[str, bool]:
    """A digest (SHA-256, hex) of the gradient of the run's first micro-batch, with the weights as they are;
    and whether computing it a second time gave the same."""
    samples = split.batch(sample_order(seed, np.arange(micro_batch_size), len(split)))
    digests: list[str] = []
    for _ in range(2):
        loss, targets, gradients = gradient(0, 0, *samples)
        digests.append(sha256_of(checksums({**gradients, "loss": loss, "targets": targets})))
    return digests[0], digests[0] == digests[1]


def compare(communicator: Communicator, digest: str, repeats: bool) -> None:
    """Refuse ranks that do not compute what the others do. Collective: every rank must call.

    Raises: ClusterError on every rank, naming the rank, its host and both kinds of machine.
    """
    own = {"machine": machine(), "digest": digest, "repeats": repeats}
    table, hosts = communicator.gather_objects(own), communicator.hosts
    rest = "or give up equal bits: communicator=native"
    for rank, found in enumerate(table):
        if not found["repeats"]:
            raise agreed(
                ClusterError(
                    f"communicator=exact: rank {rank} on {hosts[rank]} ({found['machine']}) computed one "
                    "micro-batch's gradient twice and got different bits: an operation of the model is not "
                    f"reproducible there; `mlx-ring doctor --exact` lists those known; replace it, {rest}"
                )
            )
    digests = [found["digest"] for found in table]
    if pair := odd_one_out(digests):
        two = [
            f"{digests[rank][:12]} on rank {rank} ({hosts[rank]}: {table[rank]['machine']})" for rank in pair
        ]
        raise agreed(
            ClusterError(
                f"communicator=exact: the gradient of one and the same micro-batch is {two[0]} and {two[1]}; "
                "use machines of one kind: equal chips, MLX, BLAS and BLAS threads (OPENBLAS_NUM_THREADS="
                f"{os.environ.get('OPENBLAS_NUM_THREADS', 'unset')} here), {rest}"
            )
        )
