"""Float32 by its bits: powers of two that no device rounds, and magnitudes that compare as integers."""

import mlx.core as mx

LEAST_EXPONENT, LARGEST_EXPONENT = -126, 126  # k for which 2^k and 2^-k are normal float32 numbers
NOT_FINITE = 0x7F800000  # the bits of infinity; those of a NaN are above
MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


def power_of_two(exponents: mx.array) -> mx.array:
    """2^exponents for int32 from -126 to 127, float32, from their bits: a device's pow and exp2 may round."""
    return ((exponents + 127) << 23).view(mx.float32)


def magnitude_bits(numbers: mx.array) -> mx.array:
    """The bits of |numbers|, float32, as int32: ordered as the magnitudes are, NaN on top, which a float
    maximum may lose."""
    return numbers.view(mx.int32) & MAGNITUDE


def exponent_above(bits: mx.array) -> mx.array:
    """For bits of finite magnitudes m the int32 e with m < 2^e <= 2 m; -126 for zero and denormal numbers."""
    return (bits >> 23) - 126
