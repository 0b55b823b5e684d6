"""Buckets: which arrays travel together in one message, and how a message is cut apart again."""

import math
from collections.abc import Hashable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

Buckets = tuple[tuple[str, ...], ...]  # names, by bucket
# A large first array is sent while this share of its own bytes in gradients is still to be computed. On two
# H100, 154 MB travel for 0.64 ms, and a quarter as many bytes of gradients take about 1 ms to compute. Until
# then the activations that they are computed from stay in memory: 1.4 GB there, beside 21 GB.
SENT_AFTER_THE_FIRST = 0.25


@lru_cache(maxsize=8)  # every step sends the same arrays
def plan_buckets(arrays: tuple[tuple[str, Hashable, int], ...], bucket_bytes: int) -> Buckets:
    """Groups arrays into buckets, in the order in which they are sent: the last layer first.

    A bucket holds arrays of one dtype, and is closed once it holds `bucket_bytes` or more. An array that has
    as many bytes by itself travels alone, and is not copied if it is row-major. The gradient of the model's
    first array is ready last. If that array is as large (an embedding), it is sent before the last buckets,
    which are computed while it travels.

    Args:
        arrays: (name, dtype, bytes) of each, in the model's order.
        bucket_bytes: the size at which a bucket is full.

    Returns: the names in each bucket. Every name is in exactly one.
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
    """A bucket's content: arrays of one dtype, one after another, as a flat array.

    A single row-major array is not copied, because on a fast wire the copy would cost visible time.
    """
    flat = [array.flatten() for array in arrays]
    return mx.concatenate(flat) if len(flat) > 1 else flat[0]


def cut(bucket: mx.array, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """Cuts what `join` made into its arrays again, in these shapes and in that order."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces: Any = [bucket]
    if len(sizes) > 1:
        pieces = mx.split(bucket, list(accumulate(sizes))[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
