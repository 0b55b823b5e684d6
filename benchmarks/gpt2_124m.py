"""Measures a training step of the 124M GPT on a GPU: tokens a second, MFU, memory, and where the time goes.

MFU is the share of the GPU's floating-point operations that the model uses. A token takes 6 · N_matmul + 12 ·
L · D · T operations (torchtitan's formula: forward and backward, attention counted whole, no discount for the
causal mask); N_matmul counts the tied head but not the embedding. Two peaks are compared with: that of the
data sheet, if the GPU is known, and what a large matrix product of the step's dtype reaches in this run. Each
part is timed by itself at the shapes of the step, forward, and forward with backward. With several ranks
(`mlx.launch --backend nccl -n 2 -- python benchmarks/gpt2_124m.py`) the gradient's all-reduce is timed too.

On a CPU a tiny model takes the place of the GPT: it shows that the program works, and its figures mean
nothing.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from page import Bars

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.models import build_model
from mlx_ring.models.transformer import Attention, SwiGLU
from mlx_ring.run.coordinator import Coordinator


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, and the batch of one rank."""

    batch: int
    length: int  # tokens of a sequence
    vocabulary: int
    layers: int
    dimensions: int
    heads: int
    hidden: int  # width of the feed-forward layers
    dtype: mx.Dtype  # that it computes in
    square: int  # rows and columns of the matrices whose product gives the measured peak
    overrides: tuple[str, ...]  # those of a run that trains this model


GPT2_124M = Shape(
    batch=16, length=1024, vocabulary=50304, layers=12, dimensions=768, heads=12, hidden=2048,
    dtype=mx.bfloat16, square=8192, overrides=harness.GPT2_124M,
)  # fmt: skip
TINY = Shape(
    batch=2, length=32, vocabulary=256, layers=2, dimensions=32, heads=2, hidden=64,
    dtype=mx.float32, square=256,
    overrides=(
        "data=synthetic", "data.vocabulary_size=256", "data.sequence_length=32", "model=transformer",
        "model.layers=2", "model.dimensions=32", "model.heads=2", "model.kv_heads=2",
        "model.hidden_dimensions=64", "model.max_sequence_length=32", "model.tie_head=true",
    ),
)  # fmt: skip
SHAPE = GPT2_124M if mx.default_device() == mx.gpu else TINY
TINY_NOTE = (
    "A tiny model on a CPU in place of the GPT on a GPU: the program works, and the figures mean nothing."
)
RUN = (
    *harness.QUIET, *SHAPE.overrides, f"trainer.micro_batch_size={SHAPE.batch}", "communicator=native",
)  # fmt: skip
IN_A_ROW = 8  # computations that are issued before the device is waited for
STEPS_IN_A_BLOCK = 10
DATA_SHEET_FLOPS = {"H100": 989e12, "H200": 989e12}  # operations a second of bf16 matrix products, dense, SXM


def median_seconds(compute: Callable[[], Any], repeats: int) -> float:
    """Returns the seconds of one computation out of several in a row.

    The device need not wait for Python between them.
    """
    times: list[float] = []
    for repeat in range(repeats + 2):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            mx.async_eval(compute())
        mx.synchronize()
        if repeat >= 2:
            times.append((time.perf_counter() - start) / IN_A_ROW)
    return statistics.median(times)


def whole_step(communicator: Communicator, repeats: int) -> tuple[dict[str, float], Arrays]:
    """Runs the coordinator's own loop in blocks of steps. Returns figures of a step, and the weights.

    Collective: every rank must call.
    """
    with tempfile.TemporaryDirectory() as folder:
        batch = SHAPE.batch * communicator.world_size
        config = compose_run(*RUN, f"trainer.global_batch_size={batch}", f"run.dir={folder}/run")
        directory = Path(communicator.broadcast_object(f"{folder}/run"))
        directory.mkdir(exist_ok=True)
        coordinator = Coordinator(config, communicator, directory)
        run = coordinator.prepare()
        assert run is not None
        weights = dict(tree_flatten(run.model.parameters()))
        results = run.trainer.steps()
        times = list[float]()
        for block in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(STEPS_IN_A_BLOCK):
                coordinator.follow(run, next(results))
            if block:
                times.append((time.perf_counter() - start) / STEPS_IN_A_BLOCK)
            else:
                mx.reset_peak_memory()
        peak = mx.get_peak_memory()
        run.trainer.close()
        coordinator.fail("the benchmark ended")
        communicator.barrier()
    return {
        "step_seconds": statistics.median(times),
        "tokens_per_second": batch * SHAPE.length / statistics.median(times),
        "peak_memory_bytes": peak,
        "parameters": float(sum(array.size for array in weights.values())),
        "matmul_parameters": float(sum(array.size for array in weights.values() if array.ndim == 2)),
    }, weights


def both_ways(scalar: Callable[..., mx.array], inputs: tuple[Any, ...], repeats: int) -> tuple[float, float]:
    """Returns the seconds of a scalar function's forward pass, and of its backward pass to all inputs.

    The latter are the seconds of both together minus those of the forward pass alone.
    """
    forward = mx.compile(scalar)
    both = mx.compile(mx.value_and_grad(scalar, argnums=tuple(range(len(inputs)))))
    first = median_seconds(lambda: forward(*inputs), repeats)
    return first, median_seconds(lambda: both(*inputs), repeats) - first


def module_both_ways(module: nn.Module, x: mx.array, repeats: int) -> tuple[float, float]:
    """Returns a module's forward and backward seconds, with its weights cast to the input's dtype."""
    module.set_dtype(x.dtype)

    def scalar(weights: Any, x: mx.array) -> mx.array:
        module.update(weights)
        return module(x).astype(mx.float32).sum()

    weights = module.trainable_parameters()
    mx.eval(weights)
    return both_ways(scalar, (weights, x), repeats)


def parts(repeats: int) -> dict[str, tuple[float, float]]:
    """Returns each part's forward and backward seconds, added up over the layers of a step."""
    batch, length, dimensions, dtype = SHAPE.batch, SHAPE.length, SHAPE.dimensions, SHAPE.dtype
    width = dimensions // SHAPE.heads
    tokens = mx.random.randint(0, SHAPE.vocabulary, (batch, length))
    x = mx.random.normal((batch, length, dimensions)).astype(dtype)
    table = mx.random.normal((SHAPE.vocabulary, dimensions)) * 0.02
    query = mx.random.normal((batch, SHAPE.heads, length, width)).astype(dtype)
    logits = mx.random.normal((batch, length, SHAPE.vocabulary)).astype(dtype)
    mx.eval(tokens, x, table, query, logits)

    def fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask="causal")
        return mixed.astype(mx.float32).sum()

    def embedding(weight: mx.array) -> mx.array:
        return weight[tokens].astype(dtype).astype(mx.float32).sum()

    def head(weight: mx.array, last: mx.array) -> mx.array:
        return (last @ weight.astype(dtype).T).astype(mx.float32).sum()

    def loss(logits: mx.array) -> mx.array:
        return mx.fast.cross_entropy(logits, tokens).mean()

    of_module = partial(module_both_ways, x=x, repeats=repeats)
    kernel = both_ways(fused_attention, (query, query, query), repeats)
    attention = of_module(Attention(dimensions, SHAPE.heads, SHAPE.heads, 10000.0))
    norm = of_module(nn.RMSNorm(dimensions))
    norms = 2 + 1 / SHAPE.layers  # in a layer, with the last one's share
    per_layer = {
        "attention_kernel": kernel,
        "attention_rest": (attention[0] - kernel[0], attention[1] - kernel[1]),
        "feed_forward": of_module(SwiGLU(dimensions, SHAPE.hidden)),
        "norms": (norms * norm[0], norms * norm[1]),
    }
    layers = SHAPE.layers
    return {
        "embedding": both_ways(embedding, (table,), repeats),
        **{name: (layers * forward, layers * backward) for name, (forward, backward) in per_layer.items()},
        "head": both_ways(head, (table, x), repeats),
        "loss": both_ways(loss, (logits,), repeats),
    }


def optimizer_seconds(repeats: int) -> float:
    """Returns the seconds of an AdamW update of the model in float32, with clipping by the norm."""
    config = compose_run(*RUN, "run.dir=unused")
    model = build_model(config.model, input_shape=(SHAPE.length,), num_classes=SHAPE.vocabulary)
    optimizer = optim.AdamW(1e-4, weight_decay=0.1, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    state = [model.state, optimizer.state]

    def update(gradients: Any) -> mx.array:
        clipped, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, clipped)
        return norm

    compiled = mx.compile(update, inputs=state, outputs=state)
    return median_seconds(lambda: (compiled(gradients), state), repeats)


def peak_flops(repeats: int) -> float:
    """Returns the operations a second of a product of two large square matrices."""
    size = SHAPE.square
    a, b = (mx.random.normal((size, size)).astype(SHAPE.dtype) for _ in range(2))
    mx.eval(a, b)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)


def measure(quick: bool) -> tuple[dict[str, float], list[Bars]]:
    """Collective: every rank must call."""
    communicator = Communicator.join(RankEnvironment.read())
    repeats = 5 if quick else 20
    figures, weights = whole_step(communicator, repeats)
    mx.clear_cache()
    figures["peak_flops_per_second"] = communicator.world_size * peak_flops(repeats)
    per_token = 6 * figures["matmul_parameters"] + 12 * SHAPE.layers * SHAPE.dimensions * SHAPE.length
    flops = figures["tokens_per_second"] * per_token
    figures["mfu_of_measured_peak"] = flops / figures["peak_flops_per_second"]
    name = str(mx.device_info(mx.default_device()).get("device_name"))
    if peak := next((peak for known, peak in DATA_SHEET_FLOPS.items() if known in name), None):
        figures["mfu"] = flops / peak / communicator.world_size
    found = parts(repeats)
    for name, (forward, backward) in found.items():
        figures[f"{name}_forward_seconds"] = forward
        figures[f"{name}_backward_seconds"] = backward
    found["optimizer"] = (optimizer_seconds(repeats), 0.0)
    figures["optimizer_seconds"] = found["optimizer"][0]
    figures["parts_together_seconds"] = sum(sum(seconds) for seconds in found.values())
    if (
        communicator.world_size > 1
    ):  # in a step this runs beside the backward pass, so it is no part of the sum
        gradient = {name: mx.ones_like(array) for name, array in weights.items()}
        mx.eval(gradient)
        seconds = median_seconds(lambda: communicator.all_reduce(dict(gradient)).arrays, repeats)
        found["all-reduce"] = (seconds, 0.0)
        figures["all_reduce_seconds"] = seconds
    series = {
        way: [1000 * seconds[number] for seconds in found.values()]
        for number, way in enumerate(("forward, or alone", "backward"))
    }
    communicator.close()
    title = "Where the time of a step goes: each part timed by itself"
    return figures, [Bars(title=title, y_label="milliseconds", places=list(found), series=series)]


if __name__ == "__main__":
    harness.run(
        harness.parse("gpt2_124m"),
        measure,
        {},
        leads=RankEnvironment.read().rank == 0,
        notes=[TINY_NOTE] if SHAPE is TINY else [],
    )
