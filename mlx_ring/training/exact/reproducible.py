"""Gradients whose bits are the same every time, also on a GPU.

If several threads add to one float, the sum depends on the order in which they happen to add. On CUDA, MLX
computes two gradients this way (measured; its Metal kernels add in the same way): the gradient of the queries
in fused attention, and the gradient of an embedding's rows. This file computes both in another form: the
first with matrix products, the second with sums of integers, which are the same in any order. On a CPU every
gradient repeats anyway.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ring.communication.codecs.fixed_point import (
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    NOT_FINITE,
    exponent_above,
    magnitude_bits,
    power_of_two,
)
from mlx_ring.models.transformer import Attention, fused_attention

Inputs = tuple[mx.array, ...]


def make_reproducible(model: nn.Module) -> int:
    """Makes every embedding and every attention of `model` use the forms below.

    Parameters keep their paths and values. Each `nn.Embedding` and `nn.MultiHeadAttention`, also one of the
    user's own subclass, gets a subclass of its class that only changes what `super().__call__` does.
    Call this before `checkpoint_activations`. It cannot change `weight[tokens]` or an `mx.fast` call in a
    user's own code.

    Returns: the number of modules changed.
    """
    changed = 0
    for module in {id(each): each for each in model.modules()}.values():
        if isinstance(module, Attention):
            module.attend = attention
        elif isinstance(module, nn.Embedding):
            _extend(module, Embedding)
        elif isinstance(module, nn.MultiHeadAttention):
            _extend(module, MultiHeadAttention)
        else:
            continue
        changed += 1
    return changed


class Embedding(nn.Embedding):
    """An embedding that looks its rows up with `embedding_rows`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens, integers of any shape → (*shape, D), in the dtype of the weight."""
        return embedding_rows(self.weight, x)


class MultiHeadAttention(nn.MultiHeadAttention):
    """Attention as plain matrix products and a softmax; takes every mask that the fused attention takes."""

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None = None
    ) -> mx.array:
        """Queries (B, T, …), keys (B, S, …) and values (B, S, …) → (B, T, D)."""

        def heads(x: mx.array) -> mx.array:
            return mx.unflatten(x, -1, (self.num_heads, -1)).transpose(0, 2, 1, 3)

        query, key = heads(self.query_proj(queries)), heads(self.key_proj(keys))
        value = heads(self.value_proj(values))
        scores = (query * query.shape[-1] ** -0.5) @ key.swapaxes(-1, -2)
        if isinstance(mask, str):
            assert mask == "causal"
            mask = mx.tri(*scores.shape[-2:], k=key.shape[-2] - query.shape[-2]).astype(mx.bool_)
        if mask is not None:
            # As in MLX: a row whose mask hides every position gives all positions the same weight.
            least = mx.finfo(scores.dtype).min
            is_kept = mask.dtype == mx.bool_
            scores = mx.where(mask, scores, least) if is_kept else scores + mask.astype(scores.dtype)
        mixed = mx.softmax(scores, axis=-1, precise=True) @ value
        return self.out_proj(mixed.transpose(0, 2, 1, 3).flatten(2))


def _extend(module: nn.Module, reproducible: type[nn.Module]) -> None:
    own_class = type(module)
    if not isinstance(module, reproducible):
        mlx_own = own_class is reproducible.__base__
        module.__class__ = reproducible if mlx_own else _between(own_class, reproducible)


@cache
def _between(own_class: type[nn.Module], reproducible: type[nn.Module]) -> type[nn.Module]:
    """Returns `own_class` with `reproducible` put between it and the MLX class that both extend."""
    return type(own_class.__name__, (own_class, reproducible), {})


# Attention


def attention(query: mx.array, key: mx.array, value: mx.array, *, scale: float) -> mx.array:
    """Computes causal attention: fused forward; its backward pass uses float32 and memory that grows with T².

    Args:
        query: floating-point, (B, heads, T, width).
        key, value: (B, kv_heads, T, width); each key and value head serves heads / kv_heads query heads.
        scale: multiplies the scores.

    Returns: (B, heads, T, width), in the dtype of the inputs.
    """
    return _attention(query, key, value, scale=scale)


def _attention_gradients(primals: Inputs, cotangent: mx.array, output: mx.array, *, scale: float) -> Inputs:
    query, key, value = primals
    batch, _, length, width = query.shape

    # The query heads that share a key head are neighbours. As rows of one matrix, one product sums over them.
    def rows(x: mx.array) -> mx.array:
        return x.reshape(batch, key.shape[1], -1, width)

    query, output, cotangent = rows(query), rows(output), rows(cotangent)
    position = mx.arange(query.shape[2])[:, None] % length
    scores = _float(query) @ _float(key).swapaxes(-1, -2) * scale
    weights = mx.softmax(mx.where(position >= mx.arange(length), scores, -mx.inf), axis=-1)
    weight_gradient = _float(cotangent) @ _float(value).swapaxes(-1, -2)
    mean = (_float(cotangent) * _float(output)).sum(axis=-1, keepdims=True)
    score_gradient = (weights * (weight_gradient - mean) * scale).astype(query.dtype)
    return (
        (score_gradient @ key).reshape(primals[0].shape).astype(query.dtype),
        (score_gradient.swapaxes(-1, -2) @ query).astype(key.dtype),
        (weights.astype(cotangent.dtype).swapaxes(-1, -2) @ cotangent).astype(value.dtype),
    )


def _float(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


_attention: Any = mx.custom_function(fused_attention)
_attention.vjp(_attention_gradients)


# Embedding rows


def embedding_rows(weight: mx.array, tokens: mx.array) -> mx.array:
    """Computes `weight[tokens]`, with a gradient that does not depend on the order in which tokens are added.

    Relative to the largest number of the cotangent, the gradient is as precise as a float32 sum up to
    N = 2^18 tokens; above that, it loses two bits with each doubling of N.

    Args:
        weight: floating-point, (num_rows, D).
        tokens: N integers, of any shape.

    Returns: (*tokens.shape, D), in the dtype of `weight`.
    """
    return _embedding_rows(weight, tokens)


def _embedding_gradients(primals: Inputs, cotangent: mx.array, _: Any) -> Inputs:
    weight, tokens = primals
    # mx.checkpoint asks for a gradient of every argument, so the tokens get zeros.
    return _row_sums(cotangent, tokens, weight.shape).astype(weight.dtype), mx.zeros_like(tokens)


def _row_sums(cotangent: mx.array, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Sums the cotangent's rows by token and returns float32 of `shape`.

    Each number becomes two fixed-point words. The second word holds what rounding cut off from the first, and
    the sums of both always fit into int32. A single number that is not finite makes the whole result NaN.
    """
    rows = cotangent.astype(mx.float32).reshape(tokens.size, shape[-1])
    bits = ((2**31 - 1) // tokens.size).bit_length() - 1  # `size` codes of at most 2^bits fit
    largest = magnitude_bits(rows).max()
    exponent = mx.clip(bits - exponent_above(largest), LEAST_EXPONENT, LARGEST_EXPONENT)
    codes = rows * power_of_two(exponent)
    first = mx.round(codes)
    second = mx.round((codes - first) * 2.0 ** (bits + 1))

    def total(words: mx.array) -> mx.array:
        return mx.zeros(shape, dtype=mx.int32).at[tokens.reshape(-1)].add(words.astype(mx.int32))

    unit = mx.where(largest < NOT_FINITE, power_of_two(-exponent), mx.nan)
    return (_float(total(first)) + _float(total(second)) * 2.0 ** -(bits + 1)) * unit


_embedding_rows: Any = mx.custom_function(lambda weight, tokens: weight[tokens])
_embedding_rows.vjp(_embedding_gradients)
