"""One rank of one peer of `peers.py`: trains the common model on the common batches when it gets an order.

Each line on stdin orders a number of steps. The answer tells how many seconds they took, the last loss and
the memory.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import harness
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_ring.cluster.finding import FOUND
from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.config.run_config import RunConfig
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import MlxRingError
from mlx_ring.models import build_model
from mlx_ring.run.builder import open_data
from mlx_ring.run.coordinator import Coordinator

PLAIN = (*harness.QUIET, "communicator=native", "optimizer.weight_decay=0")
STARTED: list[float] = []  # the time of the last order
BATCHES = 8  # that the loops by hand repeat
Steps = Callable[[int], float]  # trains this many steps; returns the last loss


def mlx_ring(config: RunConfig, folder: str) -> Steps:
    Path(folder).mkdir()
    coordinator = Coordinator(config, Communicator.join(RankEnvironment.read()), Path(folder))
    run = coordinator.prepare()
    assert run is not None
    results = run.trainer.steps()

    def steps(count: int) -> float:
        loss = 0.0
        for _ in range(count):
            result = next(results)
            coordinator.follow(run, result)
            loss = result.loss
        # Waits for the step that is issued ahead: this block began with one that the last block had issued.
        mx.synchronize()
        return loss

    return steps


def own_batches(config: RunConfig, rank: int, ranks: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws the run's first global batches in advance, and repeats this rank's part of each for ever."""
    alone = Communicator.alone()
    split = open_data(config, alone).dataset.train
    size = config.trainer.global_batch_size
    order = sample_order(config.seed, np.arange(BATCHES * size), len(split)).reshape(BATCHES, ranks, -1)
    return cycle([split.batch(rows[rank]) for rows in order])


def first_model(config: RunConfig) -> tuple[nn.Module, Any]:
    """Returns the model with the first weights of the run, and the specification of its data."""
    alone = Communicator.alone()
    spec = open_data(config, alone).dataset.spec
    mx.random.seed(config.seed)
    return build_model(config.model, input_shape=spec.input_shape, num_classes=spec.num_classes), spec


def by_hand(config: RunConfig, waits: bool) -> Steps:
    """Returns a loop as the documents of MLX show it: a compiled step with `average_gradients`."""
    environment = RankEnvironment.read()
    rank, ranks = environment.rank, environment.world_size
    group = mx.distributed.init(strict=True, backend=environment.backend) if ranks > 1 else None
    model, _ = first_model(config)
    optimizer = optim.AdamW(config.optimizer.learning_rate, weight_decay=0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    dtype = getattr(mx, config.trainer.compute_dtype.name)
    state = [model.state, optimizer.state]

    def loss_of(parameters: dict, inputs: mx.array, targets: mx.array) -> mx.array:
        if dtype != mx.float32:
            parameters = tree_map_with_path(
                lambda path, weight: weight if "embedding" in path else weight.astype(dtype), parameters
            )
        model.update(parameters)
        logits = model(inputs)
        if mx.default_device() != mx.gpu:
            logits = logits.astype(mx.float32)
        return mx.fast.cross_entropy(logits, targets).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        parameters = model.trainable_parameters()
        loss, gradients = mx.value_and_grad(loss_of)(parameters, inputs, targets)
        model.update(parameters)
        gradients = nn.average_gradients(gradients, group)
        gradients, _ = optim.clip_grad_norm(gradients, config.trainer.clip_gradient_norm)
        optimizer.update(model, gradients)
        return loss

    batches = own_batches(config, rank, ranks)

    def steps(count: int) -> float:
        loss = mx.array(0.0)
        for _ in range(count):
            inputs, targets = next(batches)
            loss = step(mx.array(inputs), mx.array(targets))
            (mx.eval if waits else mx.async_eval)(state, loss)
        mx.eval(state, loss)
        return float(loss.item())

    return steps


def by_torch(config: RunConfig, *, shard: bool, compiled: bool) -> Steps:
    """Returns a loop of PyTorch's DDP or FSDP2: float32 weights, with autocast if the run is in bfloat16."""
    import torch
    import torch.distributed as distributed

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    distributed.init_process_group("nccl" if gpu else "gloo")
    torch.set_float32_matmul_precision("high")
    model = torch_model(config, device, shard=shard)
    low = config.trainer.compute_dtype.name == "bfloat16"

    def loss_of(inputs: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    # The loss is compiled too, so that no logits are kept.
    forward = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.learning_rate, weight_decay=0.0, fused=gpu
    )
    drawn = own_batches(config, rank, ranks)
    tensors = [tuple(torch.from_numpy(each.astype(np.int64)) for each in next(drawn)) for _ in range(BATCHES)]
    if gpu:  # pinned memory, or every copy would wait for the step before
        tensors = [tuple(each.pin_memory() for each in pair) for pair in tensors]
    batches = cycle(tensors)

    def steps(count: int) -> float:
        loss = torch.zeros(())
        for _ in range(count):
            inputs, targets = (each.to(device, non_blocking=True) for each in next(batches))
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = forward(inputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.clip_gradient_norm)
            optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return loss.item()

    return steps


def torch_model(config: RunConfig, device: Any, *, shard: bool) -> Any:
    """Returns the run's model in PyTorch, with its first weights.

    It is sharded, or wrapped in DDP if there are several ranks. The process group must be open.
    """
    import torch
    from peers_torch import Transformer

    weights, spec = first_model(config)
    model: Any = Transformer(config.model, spec.num_classes, *spec.input_shape)
    model.take({name: np.array(array) for name, array in tree_flatten(weights.parameters())})
    model.to(device)
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        low = config.trainer.compute_dtype.name == "bfloat16"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
        for layer in (*model.layers, model):
            fully_shard(layer, mp_policy=policy)
    elif torch.distributed.get_world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return model


def by_mlx_lm(config: RunConfig) -> None:
    """Runs the trainer of mlx-lm, which asks for batches until this process ends.

    If the run computes in bfloat16, so are the weights: this trainer keeps no float32 weights beside them.
    """
    from mlx_lm.tuner.trainer import TrainingArgs, train

    environment = RankEnvironment.read()
    model, _ = first_model(config)
    if config.trainer.compute_dtype.name == "bfloat16":
        model.set_dtype(mx.bfloat16)
    optimizer = optim.AdamW(config.optimizer.learning_rate, weight_decay=0.0, bias_correction=True)
    own = own_batches(config, environment.rank, environment.world_size)
    last = [0.0]

    def loss_of(model: nn.Module, inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return mx.fast.cross_entropy(model(inputs).astype(mx.float32), targets).mean(), mx.array(targets.size)

    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        """When the trainer asks for a batch, it has finished with the one before."""
        for count in orders():
            for _ in range(count):
                inputs, targets = map(mx.array, next(own))
                if not last[0]:
                    last[0] = float(loss_of(model, inputs, targets)[0].item())
                yield inputs, targets
            answer("mlx_lm", last[0])  # the first loss: the trainer only prints its losses

    arguments = TrainingArgs(
        batch_size=config.trainer.global_batch_size, iters=10**9, steps_per_report=10**9, steps_per_save=10**9
    )
    with contextlib.redirect_stdout(sys.stderr):
        train(model, optimizer, [], None, arguments, loss=loss_of, iterate_batches=batches)


def peak_bytes(name: str) -> int:
    """Returns the most memory of the device that was in use; on a CPU, of the process."""
    if name.startswith("torch"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif mx.default_device() == mx.gpu:
        return mx.get_peak_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def orders() -> Iterator[int]:
    """Says that this rank is ready; then yields the number of steps of each order and starts the clock."""
    send("ready")
    for line in sys.stdin:
        STARTED[:] = [time.perf_counter()]
        yield int(line)


def answer(name: str, loss: float) -> None:
    """Answers an order whose steps are done."""
    seconds = time.perf_counter() - STARTED[0]
    send(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes(name)}))


def send(words: str) -> None:
    """Prints a line for `peers.py`, on the stdout that others may have redirected."""
    print(FOUND + words, file=sys.__stdout__, flush=True)


def main() -> None:
    name = sys.argv[1]
    overrides = sys.argv[2:]
    status = 0
    try:
        follow_orders(name, overrides)
    except MlxRingError as error:  # such as a mistake in the overrides or in the data that they name
        print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        status = 1
    os._exit(status)  # without waiting for threads of loaders and of process groups


def follow_orders(name: str, overrides: list[str]) -> None:
    """Builds what this peer trains, then follows orders until stdin ends."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_run(*PLAIN, *overrides, f"run.dir={folder}/run")
        match name:
            case "mlx_ring" | "mlx_ring_alone":
                steps = mlx_ring(config, f"{folder}/run")
            case "mlx_by_hand" | "mlx_by_hand_unwaited":
                steps = by_hand(config, waits=name == "mlx_by_hand")
            case "mlx_lm":
                by_mlx_lm(config)
                return
            case "torch_ddp" | "torch_ddp_compiled":
                steps = by_torch(config, shard=False, compiled=name.endswith("compiled"))
            case "torch_fsdp2":
                steps = by_torch(config, shard=True, compiled=False)
            case _:
                raise SystemExit(f"unknown peer {name}")
        for count in orders():
            answer(name, steps(count))


if __name__ == "__main__":
    main()
