"""Dropout with explicit keys.

`nn.Dropout` draws from the global random state each time it runs. If a block is recomputed in the backward
pass (`memory.activation_checkpointing`), it would draw another mask there, and its gradients would be
silently wrong. So a model draws one key outside its blocks, splits it, and passes each block a key of its own
as an argument.
"""

import mlx.core as mx


def draw_key() -> mx.array:
    """Draws a new key, uint32 (2,), from mx.random's global state, and advances that state."""
    # 24 bits per word: MLX draws integers through float32, which holds no more bits exactly.
    return mx.random.randint(0, 2**24, (2,), dtype=mx.uint32)


def split_key(key: mx.array | None, count: int) -> list[mx.array | None]:
    """Makes `count` independent keys, uint32 (2,) each, from one. If `key` is None, every result is None."""
    if key is None:
        return [None] * count
    return list(mx.random.split(key, count))


def dropout(x: mx.array, probability: float, key: mx.array | None) -> mx.array:
    """Sets each element of `x` to zero with a given probability; scales the others so that the mean stays.

    Args:
        x: floating-point, of any shape.
        probability: of setting an element to zero; at least 0 and below 1.
        key: decides the mask; uint32 (2,). If it is None, as in evaluation, `x` itself is returned.

    Returns: an array of the shape and dtype of `x`.
    """
    if key is None:
        return x
    # mx.checkpoint differentiates with respect to all arguments, but random bits have no gradient.
    kept = mx.random.bernoulli(1 - probability, x.shape, mx.stop_gradient(key))
    return mx.where(kept, x * (1 / (1 - probability)), 0)
