"""A table of the operations that exact mode uses, to check that each gives the same bits every time.

On a GPU the sizes are those of a language model of 124 million parameters; on a CPU they are small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.config.choices import CNNModel, MLPModel, Size, TransformerModel
from mlx_ring.models import ModelConfig, build_model
from mlx_ring.models.dropout import dropout
from mlx_ring.models.losses import build_loss
from mlx_ring.models.precision import build_forward
from mlx_ring.models.transformer import fused_attention
from mlx_ring.training.exact.reproducible import attention, embedding_rows, make_reproducible
from mlx_ring.training.gradient import MicroBatchGradient

Compute = Callable[[], Any]  # computes a tree of arrays again at every call
Function = Callable[..., mx.array]

HALVES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e6 + 0.5, 2.0**22 + 1.5]
EVEN = [-2, -2, 0, 0, 2, 2, 1_000_000, 2**22 + 2]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One row of the table."""

    name: str
    prepare: Callable[[], Compute]  # draws inputs, always the same; returns what to repeat
    instead: str = ""  # why exact mode is safe although this may not repeat; empty if exact mode uses it
    remedy: str = ""  # what to do in your own code if it does not repeat
    expected: list[int] | None = None  # the right result, if it is known


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes and sizes of the inputs."""

    attention: tuple[int, int, int, int]  # batch, heads, positions, width
    kv_heads: int
    tokens: int
    used_rows: int  # of the embedding: fewer than tokens, so several tokens add to one row
    vocabulary: int
    width: int
    hidden: int
    image: tuple[int, int, int, int]
    channels: int


ON_A_GPU = Sizes(
    attention=(4, 12, 1024, 64),
    kv_heads=4,
    tokens=4096,
    used_rows=2000,
    vocabulary=50_304,
    width=768,
    hidden=3072,
    image=(32, 28, 28, 16),
    channels=32,
)
ON_A_CPU = Sizes(
    attention=(2, 4, 64, 32),
    kv_heads=2,
    tokens=256,
    used_rows=100,
    vocabulary=1000,
    width=128,
    hidden=256,
    image=(8, 14, 14, 8),
    channels=16,
)


def operations(*, gpu: bool) -> list[Operation]:
    """Returns the table: every row in float32; on a GPU, all but the integer rows in bfloat16 too."""
    sizes = ON_A_GPU if gpu else ON_A_CPU
    rows = _integers(sizes)
    for dtype in [mx.float32, mx.bfloat16] if gpu else [mx.float32]:
        rows += _layers(sizes, dtype) + _replaced(sizes, dtype) + _models(dtype)
    return rows


def _name(what: str, dtype: mx.Dtype) -> str:
    return f"{what}, {str(dtype).rpartition('.')[2]}"


def _draw(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _integers(sizes: Sizes) -> list[Operation]:
    """Returns the operations on exact mode's integer codes, and random numbers."""
    shape = (sizes.tokens, sizes.width)

    def sums() -> Compute:
        low, high = -(2**30), 2**30  # a sum of more than two wraps around, the same way in every order
        values = mx.random.randint(low, high, (2, *shape), key=mx.random.key(0))
        return lambda: [values[0] + values[1], values.sum(), values.sum(axis=1)]

    def rounded() -> Compute:
        values = mx.array(HALVES)
        return lambda: mx.round(values).astype(mx.int32)

    def codes() -> Compute:
        values = _draw(shape, mx.float32, 0)
        compiled: Any = mx.compile(lambda: mx.round(values * 2.0**20).astype(mx.int32))
        return compiled

    def random() -> Compute:
        key, ones = mx.random.key(7), mx.ones(shape)
        return lambda: [
            mx.random.normal(shape, key=key),
            mx.random.split(key, 4),
            dropout(ones, 0.1, key),
        ]

    return [
        Operation(name="sums of int32", prepare=sums),
        Operation(name="halves rounded to even int32", prepare=rounded, expected=EVEN),
        Operation(name="float32 to int32 codes", prepare=codes),
        Operation(name="random numbers, dropout", prepare=random),
    ]


def _layers(sizes: Sizes, dtype: mx.Dtype) -> list[Operation]:
    """Returns layers and losses, computed as the models of this package compute them."""
    tokens, width = sizes.tokens, sizes.width
    rows, hidden, logits = (tokens, width), (sizes.hidden, width), (tokens, sizes.vocabulary)
    batch, heads, positions, _ = sizes.attention
    kernel = (sizes.channels, 3, 3, sizes.image[-1])
    targets = mx.random.randint(0, sizes.vocabulary, (tokens,), key=mx.random.key(9))
    loss = build_loss("cross_entropy")
    rope: Any = partial(mx.fast.rope, traditional=False, base=10_000.0, scale=1.0, offset=0)

    def norms(x: mx.array) -> list[mx.array]:
        return [x.sum(), x.sum(axis=0), x.mean(axis=-1), x.square().sum(), mx.linalg.norm(x), x.max()]

    def summed() -> Compute:
        x = _draw((sizes.vocabulary, width), dtype, 0)
        return mx.compile(lambda: norms(x))

    def row(what: str, function: Function, *shapes: tuple[int, ...]) -> Operation:
        return Operation(name=_name(what, dtype), prepare=lambda: _gradients(function, dtype, *shapes))

    return [
        row("linear", lambda x, w, b: mx.addmm(b, x, w.T), rows, hidden, (sizes.hidden,)),
        row("layer norm", partial(mx.fast.layer_norm, eps=1e-5), rows, (width,), (width,)),
        row("RMS norm", partial(mx.fast.rms_norm, eps=1e-5), rows, (width,)),
        row("softmax", partial(mx.softmax, axis=-1, precise=True), (batch * heads, positions, positions)),
        row("cross entropy", lambda x: loss(x, targets), logits),
        row("rotary positions", lambda x: rope(x, x.shape[-1]), sizes.attention),
        row("conv2d", lambda x, w: mx.conv2d(x, w, padding=1), sizes.image, kernel),
        row("max-pool", nn.MaxPool2d(2), sizes.image),
        Operation(
            name=_name("max-pool, windows overlap", dtype),
            prepare=lambda: _gradients(nn.MaxPool2d(3, 2), dtype, sizes.image),
            instead="no model of mlx_ring uses it",
            remedy="in a model of your own give max-pooling a stride as wide as its window",
        ),
        Operation(name=_name("sums and norms", dtype), prepare=summed),
    ]


def _replaced(sizes: Sizes, dtype: mx.Dtype) -> list[Operation]:
    """Returns attention and embedding rows, each beside its reproducible form.

    The difference of the two times is the price of the reproducible form.
    """
    batch, _, length, width = sizes.attention
    few = (batch, sizes.kv_heads, length, width)
    tokens = mx.random.randint(0, sizes.used_rows, (sizes.tokens,), key=mx.random.key(8))
    scale, table = width**-0.5, (sizes.vocabulary, sizes.width)

    def forward() -> Compute:
        inputs = [_draw(sizes.attention, dtype, seed) for seed in range(3)]
        return lambda: fused_attention(*inputs, scale=scale)

    def row(what: str, function: Function, *shapes: tuple[int, ...], form: str = "") -> Operation:
        return Operation(
            name=_name(what, dtype),
            prepare=lambda: _gradients(function, dtype, *shapes),
            instead="exact mode uses its reproducible form" if form else "",
            remedy=f"in a model of your own use mlx_ring.training.exact.reproducible.{form}" if form else "",
        )

    fused, written = partial(fused_attention, scale=scale), partial(attention, scale=scale)
    alike, grouped = [sizes.attention] * 3, [sizes.attention, few, few]
    return [
        Operation(name=_name("attention, forward", dtype), prepare=forward),
        row("attention", fused, *alike, form="attention"),
        row("attention, reproducible", written, *alike),
        row("attention, grouped heads", fused, *grouped, form="attention"),
        row("attention, grouped heads, reproducible", written, *grouped),
        row("embedding rows", lambda weight: weight[tokens], table, form="embedding_rows"),
        row("embedding rows, reproducible", lambda weight: embedding_rows(weight, tokens), table),
    ]


def _models(dtype: mx.Dtype) -> list[Operation]:
    """Returns whole gradients of models, as the trainer computes them in exact mode."""
    images, classes, tokens = (16, 16, 1), 10, 64
    empty: dict[str, Any] = dict.fromkeys(
        ["layers", "dimensions", "heads", "kv_heads", "hidden_dimensions", "max_sequence_length"]
    )
    configs: list[tuple[ModelConfig, tuple[int, ...], int]] = [
        (MLPModel(name="mlp", hidden_sizes=[64, 32], dropout=0.2), images, classes),
        (CNNModel(name="cnn", channels=[8, 16], hidden_size=32, dropout=0.2), images, classes),
        (
            TransformerModel(
                name="transformer", size=Size.tiny, **empty, tie_head=False, dropout=0.1, rope_base=10_000.0
            ),
            (tokens,),
            256,
        ),
    ]
    return [
        Operation(
            name=_name(f"a whole {config.name}", dtype),
            prepare=partial(_whole, config, shape, outputs, dtype),
        )
        for config, shape, outputs in configs
    ]


def _gradients(function: Function, dtype: mx.Dtype, *shapes: tuple[int, ...]) -> Compute:
    """Computes the output, and all inputs' gradients for a random cotangent; compiled, as in the trainer."""
    inputs = [_draw(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    output = function(*inputs)
    cotangent = _draw(output.shape, output.dtype, len(inputs))

    def both(*primals: mx.array) -> Any:
        return mx.vjp(function, list(primals), [cotangent])

    compiled: Any = mx.compile(both)
    return lambda: compiled(*inputs)


def _whole(config: ModelConfig, shape: tuple[int, ...], num_classes: int, dtype: mx.Dtype) -> Compute:
    """Computes the gradients of a model with dropout, for four samples."""
    mx.random.seed(0)
    model = build_model(config, input_shape=shape, num_classes=num_classes)
    make_reproducible(model)
    is_language = len(shape) == 1
    targets = mx.random.randint(0, num_classes, (4, *shape) if is_language else (4,))
    inputs = targets if is_language else mx.random.normal((4, *shape))
    forward, loss = build_forward(model, dtype), build_loss("cross_entropy")
    gradient = MicroBatchGradient(model, forward=forward, loss=loss, seed=0, compile=True)
    samples = np.array(inputs), np.array(targets)
    return lambda: gradient(0, 0, *samples)
