"""Buckets: which arrays travel together in one message, and how a message is cut apart again."""

import math
from collections.abc import Hashable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

Buckets = tuple[tuple[str, ...], ...]  # names, by bucket
# How many bytes of gradients are still to be computed when a large first array is sent, over its own. On two
# H100 154 MB travel for 0.64 ms, and a quarter of as many take about 1 ms to compute. What they are made of,
# activations and their gradients, stays in memory until then: 1.4 GB there, beside 21.
SENT_AFTER_THE_FIRST = 0.25


@lru_cache(maxsize=8)  # every step sends the same arrays
def plan_buckets(arrays: tuple[tuple[str, Hashable, int], ...], bucket_bytes: int) -> Buckets:
    """Group arrays, given as (name, dtype, bytes) in the model's order, into buckets, in the order to send.

    Last layer first, one dtype a bucket. A bucket is sent once it holds `bucket_bytes` or more; what has as
    many by itself travels alone, and is not copied if it is row-major. The model's first array is ready last:
    if it is such a one, an embedding, it goes before the last buckets, which are computed while it travels.
    """
    buckets: list[tuple[list[str], int]] = []
    waiting: dict[Hashable, tuple[list[str], int]] = {}
    first = arrays[:1] if arrays and arrays[0][2] >= bucket_bytes else ()
    for name, dtype, size in reversed(arrays[len(first) :]):
        names, total = ([], 0) if size >= bucket_bytes else waiting.pop(dtype, ([], 0))
        names.append(name)
        if total + size >= bucket_bytes:
            buckets.append((names, total + size))
        else:
            waiting[dtype] = (names, total + size)
    buckets += waiting.values()
    for name, _, size in first:
        place, bytes_after = len(buckets), 0
        while place > 0 and bytes_after < size * SENT_AFTER_THE_FIRST:
            place -= 1
            bytes_after += buckets[place][1]
        buckets.insert(place, ([name], size))
    return tuple(tuple(names) for names, _ in buckets)


def join(arrays: list[mx.array]) -> mx.array:
    """A bucket's content, flat. A single row-major array is not copied: on a fast wire that would show."""
    flat = [array.flatten() for array in arrays]
    return mx.concatenate(flat) if len(flat) > 1 else flat[0]


def cut(bucket: mx.array, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """The successive pieces of a flat array, in these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces: Any = [bucket]
    if len(sizes) > 1:
        pieces = mx.split(bucket, list(accumulate(sizes))[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
