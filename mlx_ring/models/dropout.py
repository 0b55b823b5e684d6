"""Dropout with explicit keys.

`nn.Dropout` draws from the global random state at the moment it runs. A block that is recomputed in the
backward pass (`memory.activation_checkpointing`) would draw another mask there, and its gradients would be
silently wrong. Here a model draws one key outside its blocks and hands every block its own as an argument.
"""

import mlx.core as mx


def draw_key() -> mx.array:
    """A new key, shape (2,), from mx.random's global state, which it advances."""
    # 24 bits a word: integers are drawn through float32, which holds no more exactly.
    return mx.random.randint(0, 2**24, (2,), dtype=mx.uint32)


def split_key(key: mx.array | None, count: int) -> list[mx.array | None]:
    """`count` independent keys made from one; of no key (evaluation, or no dropout), as many None."""
    if key is None:
        return [None] * count
    return list(mx.random.split(key, count))


def dropout(x: mx.array, probability: float, key: mx.array | None) -> mx.array:
    """`x` with each element zeroed with `probability` and the others scaled up; `x` itself without a key."""
    if key is None:
        return x
    # mx.checkpoint differentiates with respect to all arguments, and random bits have no gradient.
    kept = mx.random.bernoulli(1 - probability, x.shape, mx.stop_gradient(key))
    return mx.where(kept, x * (1 / (1 - probability)), 0)
