"""Buckets: which arrays travel together in one message, and how a message is cut apart again."""

import math
from collections.abc import Hashable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

Buckets = tuple[tuple[str, ...], ...]  # names, by bucket


@lru_cache(maxsize=8)  # every step sends the same arrays
def plan_buckets(arrays: tuple[tuple[str, Hashable, int], ...], bucket_bytes: int) -> Buckets:
    """Group arrays, given as (name, dtype, bytes) in the model's order, into buckets.

    Last layer first, one dtype a bucket; a bucket is closed once it holds `bucket_bytes` or more.
    """
    open_buckets: dict[Hashable, tuple[list[str], int]] = {}
    buckets: list[list[str]] = []
    for name, dtype, size in reversed(arrays):
        names, total = open_buckets.get(dtype, ([], 0))
        if not names:
            buckets.append(names)
        names.append(name)
        open_buckets[dtype] = (names, total + size) if total + size < bucket_bytes else ([], 0)
    return tuple(map(tuple, buckets))


def join(arrays: list[mx.array]) -> mx.array:
    """A bucket's content, flat. A single array is not copied: on a fast wire that would show."""
    flat = [array.flatten() for array in arrays]
    return mx.concatenate(flat) if len(flat) > 1 else flat[0]


def cut(bucket: mx.array, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """The successive pieces of a flat array, in these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces: Any = [bucket]
    if len(sizes) > 1:
        pieces = mx.split(bucket, list(accumulate(sizes))[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
