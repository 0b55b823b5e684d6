"""A training step of the 124M GPT on one GPU: tokens a second, MFU, memory, and where the time goes.

MFU is the model's floating-point operations over those that the GPU can do: 6 · N_matmul + 12 · L · D · T a
token (torchtitan's formula: forward and backward, attention counted whole, no discount for the causal mask),
N_matmul without the embedding but with the tied head, over the peak that a large bf16 matrix product reaches
in this run. The parts are timed by themselves, forward and backward together, at the shapes of the step.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from page import Curves

from mlx_ring.communicator import Communicator
from mlx_ring.composition import compose_run
from mlx_ring.coordinator import Coordinator
from mlx_ring.models.transformer import Attention, SwiGLU
from mlx_ring.rank_environment import RankEnvironment

BATCH, LENGTH, VOCABULARY = 16, 1024, 50304
LAYERS, DIMENSIONS, HEADS = 12, 768, 12
IN_A_ROW = 8
RUN = (
    "data=synthetic", f"data.vocabulary_size={VOCABULARY}", f"data.sequence_length={LENGTH}",
    "model=transformer", "model.size=gpt2_124m", "model.tie_head=true", f"trainer.global_batch_size={BATCH}",
    f"trainer.micro_batch_size={BATCH}", "trainer.compute_dtype=bfloat16", "trainer.steps=1000000",
    "evaluation.every_steps=null", "checkpoint.every_steps=null", "checkpoint.every_seconds=null",
    "metrics.console=false", "schedule=constant", "communicator=native",
)  # fmt: skip


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


def whole_step(repeats: int) -> dict[str, float]:
    """The coordinator's own loop, in blocks."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_run(*RUN, f"run.dir={folder}")
        communicator = Communicator(RankEnvironment(rank=0, world_size=1, backend="single"))
        coordinator = Coordinator(config, communicator, Path(folder))
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
    return {
        "step_seconds": statistics.median(times),
        "tokens_per_second": BATCH * LENGTH / statistics.median(times),
        "peak_memory_bytes": peak,
        "parameters": float(sum(array.size for array in weights.values())),
        "matmul_parameters": float(sum(array.size for array in weights.values() if array.ndim == 2)),
    }


def both_ways(module: nn.Module, *inputs: mx.array) -> Callable[[], Any]:
    """Forward and backward of a module, with gradients of its weights and of its first input, compiled."""
    module.set_dtype(mx.bfloat16)
    mx.eval(module.parameters())

    def scalar(weights: Any, first: mx.array) -> mx.array:
        module.update(weights)
        return module(first, *inputs[1:]).astype(mx.float32).sum()

    compiled = mx.compile(mx.value_and_grad(scalar, argnums=(0, 1)))
    weights = module.trainable_parameters()
    return lambda: compiled(weights, inputs[0])


def parts(repeats: int) -> dict[str, float]:
    """Seconds of each part, for all layers of a step."""
    x = mx.random.normal((BATCH, LENGTH, DIMENSIONS)).astype(mx.bfloat16)
    tokens = mx.random.randint(0, VOCABULARY, (BATCH, LENGTH))
    table = mx.random.normal((VOCABULARY, DIMENSIONS)) * 0.02
    mx.eval(x, tokens, table)
    hidden = 2048  # of gpt2_124m's SwiGLU

    def rows(weight: mx.array) -> mx.array:
        return weight[tokens].astype(mx.bfloat16).astype(mx.float32).sum()

    def logits_and_loss(weight: mx.array, last: mx.array) -> mx.array:
        return mx.fast.cross_entropy(last @ weight.astype(mx.bfloat16).T, tokens).mean()

    attention = Attention(DIMENSIONS, HEADS, HEADS, 10000.0)
    query = mx.random.normal((BATCH, HEADS, LENGTH, DIMENSIONS // HEADS)).astype(mx.bfloat16)
    fused = mx.compile(
        mx.value_and_grad(
            lambda q, k, v: (
                mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
                .astype(mx.float32)
                .sum()
            ),
            argnums=(0, 1, 2),
        )
    )
    embedding = mx.compile(mx.value_and_grad(rows))
    loss = mx.compile(mx.value_and_grad(logits_and_loss, argnums=(0, 1)))
    seconds = {
        "attention": LAYERS * median_seconds(both_ways(attention, x), repeats),
        "attention_kernel_alone": LAYERS * median_seconds(lambda: fused(query, query, query), repeats),
        "feed_forward": LAYERS * median_seconds(both_ways(SwiGLU(DIMENSIONS, hidden), x), repeats),
        "norms": (2 * LAYERS + 1) * median_seconds(both_ways(nn.RMSNorm(DIMENSIONS), x), repeats),
        "embedding": median_seconds(lambda: embedding(table), repeats),
        "head_and_loss": median_seconds(lambda: loss(table, x), repeats),
    }
    return {f"part_{name}_seconds": value for name, value in seconds.items()}


def optimizer_seconds(repeats: int) -> float:
    """AdamW over the model's weights, in float32, with clipping by the norm."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_run(*RUN, f"run.dir={folder}")
    from mlx_ring.models import build_model

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


def measure(quick: bool) -> tuple[dict[str, float], list[Curves]]:
    if mx.default_device() != mx.gpu:
        raise SystemExit("gpt2_124m.py needs a GPU: a step would take minutes here")
    repeats = 5 if quick else 20
    figures = whole_step(repeats)
    mx.clear_cache()
    figures["peak_flops_per_second"] = peak_flops(repeats)
    per_token = 6 * figures["matmul_parameters"] + 12 * LAYERS * DIMENSIONS * LENGTH
    figures["mfu"] = figures["tokens_per_second"] * per_token / figures["peak_flops_per_second"]
    figures |= parts(repeats)
    figures["part_optimizer_seconds"] = optimizer_seconds(repeats)
    counted = ("attention", "feed_forward", "norms", "embedding", "head_and_loss", "optimizer")
    figures["parts_together_seconds"] = sum(figures[f"part_{name}_seconds"] for name in counted)
    return figures, []


if __name__ == "__main__":
    harness.run("gpt2_124m", measure, {})
