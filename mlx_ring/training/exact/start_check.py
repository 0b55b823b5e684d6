"""Checks, before the first step, what exact mode relies on.

One micro-batch's gradient must have the same bits on every rank, every time. That holds among machines of one
kind (chip, MLX, BLAS and its threads) and for reproducible operations. Both are tried with the real model and
data.
"""

import os

import numpy as np

from mlx_ring.communication.agreement import checksums, first_outlier, sha256_of
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import describe_machine
from mlx_ring.data.dataset import Split
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import ClusterError, agreed
from mlx_ring.training.gradient import MicroBatchGradient


def first_gradient(
    gradient: MicroBatchGradient, split: Split, *, seed: int, micro_batch_size: int
) -> tuple[str, bool]:
    """Computes the gradient of the run's first micro-batch twice, with the weights as they are.

    Returns: the first result's digest (SHA-256, hex), and whether the second result has the same bits.
    """
    samples = split.batch(sample_order(seed, np.arange(micro_batch_size), len(split)))
    digests: list[str] = []
    for _ in range(2):
        loss, targets, gradients = gradient(0, 0, *samples)
        digests.append(sha256_of(checksums({**gradients, "loss": loss, "targets": targets})))
    return digests[0], digests[0] == digests[1]


def compare(communicator: Communicator, digest: str, repeats: bool) -> None:
    """Refuses ranks that compute other bits than the others. Collective: every rank must call.

    Args:
        digest, repeats: what `first_gradient` returned on this rank.

    Raises:
        ClusterError: on every rank, naming the rank, its host and both kinds of machine.
    """
    own = {"machine": describe_machine(), "digest": digest, "repeats": repeats}
    table = communicator.gather_objects(own)
    hosts = communicator.hosts
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
