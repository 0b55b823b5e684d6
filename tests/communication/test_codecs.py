"""The integer codec: whoever adds, in whatever order, comes to the same bits, close to the true sum."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ring.communication.codecs.base import Total
from mlx_ring.communication.codecs.exact import HEADROOM_BITS, PRECISION_BITS, ExactCodec
from mlx_ring.communication.codecs.fixed_point import LARGEST_EXPONENT, LEAST_EXPONENT

Gradients = dict[str, mx.array]


def gradients(number: int, scale: float = 1.0) -> Gradients:
    draw = np.random.default_rng(number)
    return {
        "wide": mx.array(draw.normal(size=(7, 5)).astype(np.float32) * np.float32(scale)),
        "narrow": mx.array(draw.normal(size=(3,)).astype(np.float32) * np.float32(scale * 1e-5)),
    }


def total(codec: ExactCodec, parts: list[Gradients]) -> tuple[Gradients, Gradients]:
    """The sums of the codes, and the maxima."""
    found: Total | None = None
    for part in parts:
        found = codec.add(found, part)
    assert found is not None
    (_, maxima), _ = codec.encode(found)
    return found[0], maxima


def together(totals: list[Total]) -> tuple[Gradients, Gradients]:
    """What the wire makes of several ranks' totals."""
    sums, maxima = totals[0]
    for more_sums, more_maxima in totals[1:]:
        sums = {name: sums[name] + array for name, array in more_sums.items()}
        maxima = {name: mx.maximum(maxima[name], array) for name, array in more_maxima.items()}
    return sums, maxima


def fitted(parts: list[Gradients]) -> ExactCodec:
    """A codec that has seen these gradients."""
    codec = ExactCodec(2, len(parts))
    codec.state.update(codec.next_state(total(codec, parts)[1]))
    return codec


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True), order=st.permutations(range(12)))
def test_no_split_and_no_order_changes_a_bit(cuts: list[int], order: list[int]) -> None:
    parts = [gradients(number, 10.0 ** (number - 6)) for number in range(12)]
    codec = fitted(parts)
    expected = codec.decode(total(codec, parts)[0])
    shuffled = [parts[index] for index in order]
    bounds = [0, *sorted(cuts), 12]
    ranks = [total(codec, shuffled[a:b]) for a, b in pairwise(bounds)]
    sums, maxima = together(ranks)
    for name, array in codec.decode(sums).items():
        assert mx.array_equal(array, expected[name]), name
    assert mx.array_equal(maxima["magnitudes"], total(codec, parts)[1]["magnitudes"])


@pytest.mark.parametrize("micro_batches", [1, 8, 256])
def test_the_sum_is_close_to_the_true_one(micro_batches: int) -> None:
    parts = [gradients(number) for number in range(micro_batches)]
    codec = fitted(parts)
    decoded = codec.decode(total(codec, parts)[0])
    for name in parts[0]:
        true = sum(np.asarray(part[name], dtype=np.float64) for part in parts)
        largest = max(float(mx.abs(part[name]).max()) for part in parts)
        # A code is off by half a unit, and the largest magnitude has at least so many units.
        unit = largest / 2 ** (30 - math.ceil(math.log2(micro_batches)) - HEADROOM_BITS - 2)
        np.testing.assert_allclose(np.asarray(decoded[name]), true, rtol=1e-6, atol=unit * micro_batches / 2)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 7, 255, 256, 4096])
def test_codes_of_the_largest_gradients_never_overflow_together(micro_batches: int) -> None:
    """Just below the next power of two, after growing by all of the headroom."""
    largest = float(np.nextafter(np.float32(2.0), np.float32(0)))
    codec = fitted([{"a": mx.array([1.0, -1.0]), "b": mx.array([0.0])}] * micro_batches)
    grown = {"a": mx.array([largest, -largest]) * 2**HEADROOM_BITS, "b": mx.array([0.0])}
    codes, maxima = total(codec, [grown])
    assert bool(codec.fits(maxima))
    assert micro_batches * abs(codes["a"].tolist()[0]) <= 2**31 - 1
    sums, _ = together([(codes, maxima)] * micro_batches)
    true = micro_batches * largest * 2**HEADROOM_BITS
    assert codec.decode(sums)["a"].tolist() == pytest.approx([true, -true], rel=1e-5)
    assert not codec.fits(total(codec, [{**grown, "a": grown["a"] * 1.01}])[1])


def test_a_first_gradient_fits_at_the_second_attempt() -> None:
    codec = ExactCodec(2, 4)
    assert codec.state["exponents"].tolist() == [LEAST_EXPONENT, LEAST_EXPONENT]
    _, maxima = total(codec, [gradients(0)])
    assert not codec.fits(maxima)
    codec.state.update(codec.next_state(maxima))
    assert codec.fits(total(codec, [gradients(0)])[1])


@pytest.mark.parametrize(
    ("factor", "fits"),
    [(1.0, True), (2.0**HEADROOM_BITS, True), (2.0 ** (HEADROOM_BITS + 1), False),
     (2.0**-PRECISION_BITS, True), (2.0 ** (-PRECISION_BITS - 1), False)],
)  # fmt: skip
def test_what_outgrows_the_headroom_or_shrinks_is_made_again(factor: float, fits: bool) -> None:
    parts = [gradients(number) for number in range(4)]
    codec = fitted(parts)
    changed = [{name: array * factor for name, array in part.items()} for part in parts]
    found = total(codec, changed)
    assert bool(codec.fits(found[1])) is fits
    codec.state.update(codec.next_state(found[1]))
    again = total(codec, changed)
    assert codec.fits(again[1])
    # Powers of two change no digit: what was made again is as precise as what fitted at once.
    expected = fitted(parts).decode(total(fitted(parts), parts)[0])
    for name, array in codec.decode(again[0]).items():
        assert mx.array_equal(array, expected[name] * factor), name


def test_extremes_stay_within_normal_numbers() -> None:
    for value in (1e-45, 1e-38, 3e38):
        parts = [{"a": mx.array([value, 0.0]), "b": mx.array([-value])}]
        codec = fitted(parts)
        assert LEAST_EXPONENT <= min(codec.state["exponents"].tolist()) <= LARGEST_EXPONENT
        codes, maxima = total(codec, parts)
        assert codec.fits(maxima)  # so that it is not made again for ever
        if value > 1e-30:
            assert codec.decode(codes)["b"].tolist() == pytest.approx([-value])


def test_a_tensor_of_zeros_keeps_its_exponent() -> None:
    codec = fitted([gradients(0)])
    before = codec.state["exponents"].tolist()
    _, maxima = total(codec, [{"wide": mx.zeros((7, 5)), "narrow": gradients(1)["narrow"]}])
    assert codec.fits(maxima)
    assert codec.next_state(maxima)["exponents"].tolist()[0] == before[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_no_infinity_or_nan_is_lost(value: float, place: int) -> None:
    """In any micro-batch, among larger and negative numbers; no other exponent would help."""
    parts = [gradients(number) for number in range(4)]
    codec = fitted(parts)
    spoilt = np.asarray(parts[place]["wide"]).copy()
    spoilt[1, 2] = value
    parts[place]["wide"] = mx.array(spoilt)
    _, maxima = total(codec, parts)
    assert not codec.is_finite(maxima) and codec.fits(maxima)


def test_a_scalar_stays_one() -> None:
    parts = [{"a": mx.array(0.25), "b": mx.array([[3.0]])}]
    codec = fitted(parts)
    (codes, _), new_state = codec.encode(codec.add(None, parts[0]))
    decoded = codec.decode(codes)
    assert new_state == {}
    assert (decoded["a"].shape, decoded["b"].shape) == ((), (1, 1))
    assert (decoded["a"].item(), decoded["b"].item()) == (0.25, 3.0)


def test_halves_are_rounded_to_even() -> None:
    codec = ExactCodec(1, 1)
    codec.state["exponents"] = mx.array([0], dtype=mx.int32)
    codes, _ = codec.add(None, {"a": mx.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 2**23 + 1.0])})
    assert codes["a"].tolist() == [0, 2, 2, 0, -2, -2, 2**23 + 1]


def test_compiled_codes_are_the_same() -> None:
    parts = [gradients(number) for number in range(3)]
    codec = fitted(parts)
    compiled = mx.compile(codec.add, inputs=[codec.state])
    found: Total | None = None
    for part in parts:
        found = compiled(found, part)
    assert found is not None
    codes, maxima = total(codec, parts)
    assert all(mx.array_equal(found[0][name], codes[name]) for name in codes)
    (_, again), _ = codec.encode(found)
    assert mx.array_equal(again["magnitudes"], maxima["magnitudes"])
    codec.state["exponents"] = codec.state["exponents"] - 4  # the state is an input, not a constant
    assert not mx.array_equal(compiled(None, parts[0])[0]["wide"], codec.add(None, parts[0])[0]["wide"] * 16)
    assert mx.array_equal(compiled(None, parts[0])[0]["wide"], codec.add(None, parts[0])[0]["wide"])
