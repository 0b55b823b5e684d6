"""Gradients that repeat to the bit: as right as MLX's own, in whatever order their parts are added."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_ring.config.choices import Size, TransformerModel
from mlx_ring.models import build_model
from mlx_ring.models.losses import build_loss, sum_of_losses
from mlx_ring.models.transformer import Attention, fused_attention
from mlx_ring.training.exact.reproducible import attention, embedding_rows, make_reproducible
from mlx_ring.training.memory_manager import checkpoint_activations

Float64 = NDArray[np.float64]
SHAPES = [(2, 4, 4, 17, 8), (1, 6, 2, 33, 16), (2, 3, 1, 1, 4)]  # batch, heads, kv heads, tokens, width


def normal(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def exactly(array: mx.array) -> Float64:
    return np.array(array.astype(mx.float32), dtype=np.float64)


def gradients(
    function: Callable[..., mx.array], inputs: list[mx.array], cotangent: mx.array
) -> list[mx.array]:
    return mx.vjp(function, inputs, [cotangent])[1]


def close(found: mx.array, wanted: Float64, tolerance: float) -> None:
    """Within `tolerance` of the largest number wanted."""
    error = np.abs(exactly(found) - wanted).max()
    assert error <= tolerance * np.abs(wanted).max(), error / np.abs(wanted).max()


# Attention


def attention_in_float64(
    query: Float64, key: Float64, value: Float64, cotangent: Float64, scale: float
) -> list[Float64]:
    """The output and the gradients, a head at a time."""
    output, found = np.zeros_like(query), [np.zeros_like(each) for each in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    causal = np.tri(query.shape[2], dtype=bool)
    for at in np.ndindex(query.shape[:2]):
        of = (at[0], at[1] // group)
        scores = np.where(causal, query[at] @ key[of].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        output[at] = weights @ value[of]
        slope = cotangent[at] @ value[of].T
        slope = weights * (slope - (weights * slope).sum(axis=-1, keepdims=True)) * scale
        found[0][at] = slope @ key[of]
        found[1][of] += slope.T @ query[at]
        found[2][of] += weights.T @ cotangent[at]
    return [output, *found]


def attention_inputs(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> tuple[list[mx.array], mx.array]:
    batch, heads, kv_heads, tokens, width = shape
    shapes = [(batch, count, tokens, width) for count in (heads, kv_heads, kv_heads, heads)]
    *inputs, cotangent = [normal(each, seed, dtype) for seed, each in enumerate(shapes)]
    return inputs, cotangent


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.bfloat16, 2e-2)])
def test_attention_and_its_gradients(shape: tuple[int, ...], dtype: mx.Dtype, tolerance: float) -> None:
    inputs, cotangent = attention_inputs(shape, dtype)
    scale = shape[-1] ** -0.5
    output = attention(*inputs, scale=scale)
    found = gradients(lambda *inputs: attention(*inputs, scale=scale), inputs, cotangent)
    assert mx.array_equal(output, fused_attention(*inputs, scale=scale))
    usual = gradients(lambda *inputs: fused_attention(*inputs, scale=scale), inputs, cotangent)
    wanted = attention_in_float64(*map(exactly, [*inputs, cotangent]), scale)
    if shape[3] == 1:  # a softmax of one score is flat
        wanted[1:3] = [np.zeros_like(each) for each in wanted[1:3]]
        tolerance = max(tolerance, 1e-6)
    for result, own, right in zip([output, *found], [output, *usual], wanted, strict=True):
        assert (result.dtype, result.shape) == (own.dtype, own.shape)
        if right.any():
            close(result, right, tolerance)
            close(result, exactly(own), 2 * tolerance)
        else:
            assert mx.abs(result.astype(mx.float32)).max().item() <= (1e-6 if dtype == mx.float32 else 3e-2)


def test_gradients_are_of_each_inputs_own_dtype() -> None:
    (query, key, value), cotangent = attention_inputs((2, 4, 2, 9, 8))
    inputs = [query.astype(mx.bfloat16), key, value.astype(mx.bfloat16)]
    found = gradients(lambda *inputs: attention(*inputs, scale=0.3), inputs, cotangent)
    assert [each.dtype for each in found] == [mx.bfloat16, mx.float32, mx.bfloat16]


def test_large_scores_and_what_is_not_finite() -> None:
    inputs, cotangent = attention_inputs((1, 2, 2, 12, 8))
    large = [inputs[0] * 300, inputs[1] * 300, inputs[2]]
    found = gradients(lambda *inputs: attention(*inputs, scale=0.35), large, cotangent)
    assert all(mx.isfinite(each).all() for each in found)
    spoiled = mx.where(mx.arange(8) == 3, mx.nan, cotangent)
    found = gradients(lambda *inputs: attention(*inputs, scale=0.35), inputs, spoiled)
    assert all(mx.isnan(each).any() for each in found)


# Embedding rows


def summed_in_float64(rows: mx.array, tokens: mx.array, num_rows: int) -> Float64:
    total = np.zeros((num_rows, rows.shape[-1]))
    np.add.at(total, np.array(tokens).ravel(), exactly(rows).reshape(tokens.size, -1))
    return total


def embedding_gradient(
    tokens: mx.array, rows: mx.array, num_rows: int, dtype: mx.Dtype = mx.float32
) -> mx.array:
    weight = normal((num_rows, rows.shape[-1]), 5, dtype)
    (found,) = gradients(lambda weight: embedding_rows(weight, tokens), [weight], rows)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    return found


@pytest.mark.parametrize("shape", [(1,), (), (4, 50), (3, 2, 7), (5000,)])
@pytest.mark.parametrize("num_rows", [1, 3, 200])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e30, 1e-37])
def test_embedding_rows_and_their_gradient(shape: tuple[int, ...], num_rows: int, scale: float) -> None:
    tokens = mx.random.randint(0, num_rows, shape, key=mx.random.key(1))
    weight, rows = normal((num_rows, 6), 5), normal((*shape, 6), 2) * scale
    assert mx.array_equal(embedding_rows(weight, tokens), weight[tokens])
    found = embedding_gradient(tokens, rows, num_rows)
    # Nearer than what a float32 sum is, one rounding at the end aside.
    close(found, summed_in_float64(rows, tokens, num_rows), 2e-7)
    untouched = np.setdiff1d(np.arange(num_rows), np.array(tokens).ravel())
    assert not exactly(found)[untouched].any()


def test_small_rows_beside_large_ones_keep_their_digits() -> None:
    tokens = mx.arange(4000) % 4
    rows = normal((4000, 3), 2) * mx.array([1.0, 1e-1, 1e-2, 1e-3])[tokens][:, None]
    found = exactly(embedding_gradient(tokens, rows, 4))
    wanted = summed_in_float64(rows, tokens, 4)
    assert np.abs(found / wanted - 1).max() < 1e-5


@pytest.mark.parametrize("tokens", [mx.array([-1, 2, -5]), mx.array([4, 2, 0], dtype=mx.uint16)])
def test_tokens_of_any_integers(tokens: mx.array) -> None:
    rows = normal((3, 2), 0)
    own = gradients(lambda weight: weight[tokens], [mx.zeros((5, 2))], rows)[0]
    assert mx.array_equal(embedding_gradient(tokens, rows, 5), own)  # of one part each: to the bit


def test_bfloat16_sums_are_rounded_once() -> None:
    tokens, rows = mx.zeros((1000,), dtype=mx.int32), normal((1000, 4), 2, mx.bfloat16)
    found = embedding_gradient(tokens, rows, 2, mx.bfloat16)
    assert mx.array_equal(
        found, mx.array(summed_in_float64(rows, tokens, 2).astype(np.float32)).astype(mx.bfloat16)
    )


def test_the_order_of_the_tokens_changes_no_bit() -> None:
    tokens, rows = mx.random.randint(0, 20, (3000,), key=mx.random.key(1)), normal((3000, 8), 2)
    order = mx.random.permutation(3000, key=mx.random.key(3))
    found = embedding_gradient(tokens, rows, 20)
    assert mx.array_equal(found, embedding_gradient(tokens[order], rows[order], 20))
    usual = [
        gradients(lambda weight, of=tokens[at]: weight[of], [mx.zeros((20, 8))], rows[at])[0]
        for at in (mx.arange(3000), order)
    ]
    assert not mx.array_equal(*usual)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    tokens, rows = mx.array([0, 1, 1]), mx.array([[1.0, 2.0], [3.0, value], [4.0, 5.0]])
    assert not mx.isfinite(embedding_gradient(tokens, rows, 4)).any()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-39, 3.4028234e38, -3.4028234e38])
def test_the_least_and_the_largest_floats(value: float) -> None:
    found = embedding_gradient(mx.array([1, 0]), mx.array([[value], [0.0]]), 3)
    assert found[:, 0].tolist() == pytest.approx([0, value, 0], rel=1e-7, abs=2e-38)


def test_a_sum_beyond_float32_is_infinite() -> None:
    rows = mx.full((4, 1), 3e38)
    assert embedding_gradient(mx.array([0, 0, 1, 2]), rows, 3)[:, 0].tolist() == [
        float("inf"),
        pytest.approx(3e38),
        pytest.approx(3e38),
    ]


# In a program


def both(
    weight: mx.array, tokens: mx.array, rows: Callable[..., mx.array], mixed: Callable[..., mx.array]
) -> Any:
    x = rows(weight, tokens)[:, None]
    return (mixed(x, x * 2, x + 1, scale=0.4) ** 2).sum()


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_and_recomputed(checkpointed: bool, compiled: bool) -> None:
    weight, tokens = normal((30, 8), 0), mx.random.randint(0, 30, (2, 15), key=mx.random.key(1))

    def loss(weight: mx.array, tokens: mx.array) -> mx.array:
        return both(weight, tokens, embedding_rows, attention)

    function: Any = mx.value_and_grad(mx.checkpoint(loss) if checkpointed else loss)
    if compiled:
        function = mx.compile(function)
    wanted = mx.grad(lambda weight: both(weight, tokens, lambda w, t: w[t], fused_attention))(weight)
    for _ in range(2):
        value, found = function(weight, tokens)
        assert value.item() == pytest.approx(loss(weight, tokens).item())
        close(found, exactly(wanted), 2e-6)


def test_a_frozen_table_needs_no_gradient() -> None:
    embedding = nn.Embedding(10, 4)
    make_reproducible(embedding)
    embedding.freeze()
    model = nn.Sequential(embedding, nn.Linear(4, 2))
    _, found = nn.value_and_grad(model, lambda tokens: model(tokens).sum())(mx.array([1, 2]))
    assert [path for path, _ in tree_flatten(found)] == ["layers.1.weight", "layers.1.bias"]


# Whole models


def transformer(**changes: Any) -> nn.Module:
    values: dict[str, Any] = {
        "layers": 2,
        "dimensions": 32,
        "heads": 4,
        "kv_heads": 2,
        "hidden_dimensions": 48,
        "max_sequence_length": None,
        "tie_head": True,
        "dropout": 0.2,
        "rope_base": 10000.0,
    }
    config = TransformerModel(name="transformer", size=Size["tiny"], **(values | changes))
    mx.random.seed(0)
    return build_model(config, input_shape=(24,), num_classes=50)


def model_gradients(model: nn.Module) -> dict[str, mx.array]:
    tokens = mx.random.randint(0, 50, (4, 24), key=mx.random.key(1))
    loss = build_loss("cross_entropy")
    mx.random.seed(5)  # of the dropout masks

    def total(parameters: Any) -> mx.array:
        model.update(parameters)
        return sum_of_losses(loss, model(tokens), (tokens + 1) % 50)[0]

    return dict(tree_flatten(mx.grad(total)(model.trainable_parameters())))


@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("tie_head", [True, False])
def test_a_transformer_keeps_its_parameters_and_gradients(tie_head: bool, recomputed: bool) -> None:
    usual, changed = transformer(tie_head=tie_head), transformer(tie_head=tie_head)
    assert make_reproducible(changed) == 3
    assert make_reproducible(changed) == 3  # a second time changes nothing more
    if recomputed:
        checkpoint_activations(changed)
    before, after = (dict(tree_flatten(model.parameters())) for model in (usual, changed))
    assert list(before) == list(after)
    assert all(mx.array_equal(before[path], after[path]) for path in before)
    assert type(changed.embedding).__name__ == "Embedding"
    assert changed.embedding.as_linear(mx.ones((1, 32))).shape == (1, 50)
    wanted, found = model_gradients(usual), model_gradients(changed)
    assert list(found) == list(wanted)
    for path, gradient in found.items():
        close(gradient, exactly(wanted[path]), 1e-5)


def test_the_usual_transformer_is_left_alone() -> None:
    assert all(
        module.attend is fused_attention
        for module in transformer().modules()
        if isinstance(module, Attention)
    )


class Scaled(nn.Embedding):
    """A user's own, that builds on MLX's."""

    def __call__(self, x: mx.array) -> mx.array:
        return 3 * super().__call__(x)


class Alone(nn.Embedding):
    """A user's own, that gathers by itself."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.weight[x] + 1


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled, Alone])
def test_what_a_users_own_embedding_computes_stays(kind: type[nn.Embedding]) -> None:
    shared = kind(9, 4)
    model = nn.Module()
    model.first, model.second = shared, shared
    before = shared(mx.array([3, 8]))
    assert make_reproducible(model) == 1
    assert isinstance(shared, kind) and type(shared).__name__ == kind.__name__
    assert mx.array_equal(shared(mx.array([3, 8])), before)


def test_a_users_own_embedding_repeats_if_it_builds_on_mlxs() -> None:
    tokens, rows = mx.random.randint(0, 5, (999,), key=mx.random.key(1)), normal((999, 4), 2)
    order = mx.random.permutation(999, key=mx.random.key(3))

    def found(at: mx.array) -> mx.array:
        _, gradient = nn.value_and_grad(scaled, lambda: (scaled(tokens[at]) * rows[at]).sum())()
        return gradient["weight"]

    scaled = Scaled(5, 4)
    ahead, behind = found(mx.arange(999)), found(order)
    assert not mx.array_equal(ahead, behind)
    make_reproducible(scaled)
    assert mx.array_equal(found(mx.arange(999)), found(order))
    close(found(order), exactly(ahead), 1e-6)


@pytest.mark.parametrize("mask", ["none", "causal", "additive", "boolean"])
def test_multi_head_attention(mask: str) -> None:
    layer = nn.MultiHeadAttention(16, 4, value_input_dims=12, value_dims=8)
    given: Any = {
        "none": None,
        "causal": "causal",
        "additive": layer.create_additive_causal_mask(10)[:7],
        "boolean": mx.random.bernoulli(0.5, (7, 10), key=mx.random.key(4)) & (mx.arange(7) > 0)[:, None],
    }[mask]
    inputs = [normal((2, 7, 16), 0), normal((2, 10, 16), 1), normal((2, 10, 12), 2)]

    def total(*inputs: mx.array) -> mx.array:
        return (layer(*inputs, mask=given) ** 2).sum()

    _, wanted = nn.value_and_grad(layer, total)(*inputs)
    assert make_reproducible(layer) == 1
    _, found = nn.value_and_grad(layer, total)(*inputs)
    usual = dict(tree_flatten(wanted))
    for path, gradient in tree_flatten(found):
        close(gradient, exactly(usual[path]), 1e-5)
