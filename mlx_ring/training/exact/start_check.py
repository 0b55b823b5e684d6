"""What exact mode stands on: one micro-batch's gradient has the same bits on every rank, every time.

That holds among machines of one kind (chip, MLX, BLAS and its threads) for reproducible operations. Both are
tried before the first step, with the real model and data.
"""

import os

import numpy as np

from mlx_ring.communication.agreement import checksums, first_outlier, sha256_of
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import machine
from mlx_ring.data.dataset import Split
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import ClusterError, agreed
from mlx_ring.training.gradient import MicroBatchGradient


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
    if pair := first_outlier(digests):
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
