"""Float32 by its bits: powers of two that no device rounds, and magnitudes that compare as integers."""

import mlx.core as mx

LEAST_EXPONENT, LARGEST_EXPONENT = -126, 126  # k for which 2^k and 2^-k are normal float32 numbers
NOT_FINITE = 0x7F800000  # the bits of infinity; those of a NaN are above
MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


def power_of_two(exponents: mx.array) -> mx.array:
    """2^exponents as float32, for int32 exponents from -126 to 127.

    The numbers are made from their bits, because a device's pow and exp2 may round.
    """
    return ((exponents + 127) << 23).view(mx.float32)


def magnitude_bits(numbers: mx.array) -> mx.array:
    """The bits of |numbers|, float32, as int32.

    They are ordered as the magnitudes are, with NaN above all, which a float maximum may lose.
    """
    return numbers.view(mx.int32) & MAGNITUDE


def exponent_above(bits: mx.array) -> mx.array:
    """The int32 e with m < 2^e <= 2 m, for the bits of finite magnitudes m; -126 for zero and denormals."""
    return (bits >> 23) - 126
