"""A training step of the 124M GPT on a GPU: tokens a second, MFU, memory, and where the time goes.

MFU is the model's floating-point operations over those that the GPU can do: 6 · N_matmul + 12 · L · D · T a
token (torchtitan's formula: forward and backward, attention counted whole, no discount for the causal mask),
N_matmul without the embedding but with the tied head: over the data sheet's peak, where the GPU is known, and
over what a large bf16 matrix product reaches in this run. Each part is timed by itself at the shapes of the
step, forward, and forward with backward; with several ranks (`mlx.launch --backend nccl -n 2 -- python
benchmarks/gpt2_124m.py`) also the gradient's all-reduce.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
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
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.models import build_model
from mlx_ring.models.transformer import Attention, SwiGLU
from mlx_ring.run.coordinator import Coordinator

BATCH, LENGTH, VOCABULARY = 16, 1024, 50304  # of a rank
LAYERS, DIMENSIONS, HEADS, HIDDEN = 12, 768, 12, 2048
IN_A_ROW = 8
RUN = (
    *harness.QUIET, *harness.GPT2_124M, f"trainer.micro_batch_size={BATCH}", "communicator=native",
)  # fmt: skip
DATA_SHEET_FLOPS = {"H100": 989e12, "H200": 989e12}  # bf16 matrix products a second, dense, SXM
Arrays = dict[str, mx.array]


def median_seconds(compute: Callable[[], Any], repeats: int) -> float:
    """Of a computation, of several in a row: the device does not wait for Python between them."""
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
    """The coordinator's own loop, in blocks; and the weights. Collective: every rank must call."""
    with tempfile.TemporaryDirectory() as folder:
        batch = BATCH * communicator.world_size
        config = compose_run(*RUN, f"trainer.global_batch_size={batch}", f"run.dir={folder}/run")
        directory = Path(communicator.broadcast_object(f"{folder}/run"))
        directory.mkdir(exist_ok=True)
        coordinator = Coordinator(config, communicator, directory)
        run = coordinator.prepare()
        assert run is not None
        weights = dict(tree_flatten(run.model.parameters()))
        results, times = run.trainer.steps(), list[float]()
        for block in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(10):
                coordinator.follow(run, next(results))
            if block:
                times.append((time.perf_counter() - start) / 10)
            else:
                mx.reset_peak_memory()
        peak = mx.get_peak_memory()
        run.trainer.close()
        coordinator.fail("the benchmark ended")
        communicator.barrier()
    return {
        "step_seconds": statistics.median(times),
        "tokens_per_second": batch * LENGTH / statistics.median(times),
        "peak_memory_bytes": peak,
        "parameters": float(sum(array.size for array in weights.values())),
        "matmul_parameters": float(sum(array.size for array in weights.values() if array.ndim == 2)),
    }, weights


def both_ways(scalar: Callable[..., mx.array], inputs: tuple[Any, ...], repeats: int) -> tuple[float, float]:
    """Seconds of a function to a scalar: forward, and backward to all inputs, which is what both take, less
    the forward."""
    forward = mx.compile(scalar)
    both = mx.compile(mx.value_and_grad(scalar, argnums=tuple(range(len(inputs)))))
    first = median_seconds(lambda: forward(*inputs), repeats)
    return first, median_seconds(lambda: both(*inputs), repeats) - first


def module_both_ways(module: nn.Module, x: mx.array, repeats: int) -> tuple[float, float]:
    """Of a module whose weights are cast to the input's dtype."""
    module.set_dtype(x.dtype)

    def scalar(weights: Any, x: mx.array) -> mx.array:
        module.update(weights)
        return module(x).astype(mx.float32).sum()

    weights = module.trainable_parameters()
    mx.eval(weights)
    return both_ways(scalar, (weights, x), repeats)


def parts(repeats: int) -> dict[str, tuple[float, float]]:
    """Forward and backward seconds of each part, for all layers of a step."""
    tokens = mx.random.randint(0, VOCABULARY, (BATCH, LENGTH))
    x = mx.random.normal((BATCH, LENGTH, DIMENSIONS)).astype(mx.bfloat16)
    table = mx.random.normal((VOCABULARY, DIMENSIONS)) * 0.02
    query = mx.random.normal((BATCH, HEADS, LENGTH, DIMENSIONS // HEADS)).astype(mx.bfloat16)
    logits = mx.random.normal((BATCH, LENGTH, VOCABULARY)).astype(mx.bfloat16)
    mx.eval(tokens, x, table, query, logits)

    def fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
        return mixed.astype(mx.float32).sum()

    def embedding(weight: mx.array) -> mx.array:
        return weight[tokens].astype(mx.bfloat16).astype(mx.float32).sum()

    def head(weight: mx.array, last: mx.array) -> mx.array:
        return (last @ weight.astype(mx.bfloat16).T).astype(mx.float32).sum()

    def loss(logits: mx.array) -> mx.array:
        return mx.fast.cross_entropy(logits, tokens).mean()

    of_module = partial(module_both_ways, x=x, repeats=repeats)
    kernel = both_ways(fused_attention, (query, query, query), repeats)
    attention = of_module(Attention(DIMENSIONS, HEADS, HEADS, 10000.0))
    per_layer = {
        "attention_kernel": kernel,
        "attention_rest": (attention[0] - kernel[0], attention[1] - kernel[1]),
        "feed_forward": of_module(SwiGLU(DIMENSIONS, HIDDEN)),
        "norms": tuple((2 + 1 / LAYERS) * seconds for seconds in of_module(nn.RMSNorm(DIMENSIONS))),
    }
    return {
        "embedding": both_ways(embedding, (table,), repeats),
        **{name: (LAYERS * forward, LAYERS * backward) for name, (forward, backward) in per_layer.items()},
        "head": both_ways(head, (table, x), repeats),
        "loss": both_ways(loss, (logits,), repeats),
    }


def optimizer_seconds(weights: Arrays, repeats: int) -> float:
    """AdamW over weights of these shapes, in float32, with clipping by the norm."""
    config = compose_run(*RUN, "run.dir=unused")
    model = build_model(config.model, input_shape=(LENGTH,), num_classes=VOCABULARY)
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
    """Of an 8192³ product of bf16 matrices, operations a second."""
    size = 8192
    a, b = (mx.random.normal((size, size)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a, b)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)


def measure(quick: bool) -> tuple[dict[str, float], list[Bars]]:
    """Collective: every rank must call."""
    if mx.default_device() != mx.gpu:
        raise harness.Failed("gpt2_124m.py needs a GPU: a step would take minutes here")
    communicator = Communicator.join(RankEnvironment.read())
    repeats = 5 if quick else 20
    figures, weights = whole_step(communicator, repeats)
    mx.clear_cache()
    figures["peak_flops_per_second"] = communicator.world_size * peak_flops(repeats)
    per_token = 6 * figures["matmul_parameters"] + 12 * LAYERS * DIMENSIONS * LENGTH
    flops = figures["tokens_per_second"] * per_token
    figures["mfu_of_measured_peak"] = flops / figures["peak_flops_per_second"]
    name = str(mx.device_info(mx.gpu).get("device_name"))
    if peak := next((peak for known, peak in DATA_SHEET_FLOPS.items() if known in name), None):
        figures["mfu"] = flops / peak / communicator.world_size
    found = parts(repeats)
    for name, (forward, backward) in found.items():
        figures[f"{name}_forward_seconds"], figures[f"{name}_backward_seconds"] = forward, backward
    found["optimizer"] = (optimizer_seconds(weights, repeats), 0.0)
    figures["optimizer_seconds"] = found["optimizer"][0]
    figures["parts_together_seconds"] = sum(sum(seconds) for seconds in found.values())
    if communicator.world_size > 1:  # beside the backward pass, if all goes well
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
    title = "Where a step's time goes: each part by itself"
    return figures, [Bars(title=title, y_label="milliseconds", places=list(found), series=series)]


if __name__ == "__main__":
    harness.run(harness.parse("gpt2_124m"), measure, {}, leads=RankEnvironment.read().rank == 0)
