"""Learning rates over a run."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_ring.config.choices import ConstantSchedule, DecaySchedule, WSDSchedule
from mlx_ring.errors import ConfigError
from mlx_ring.training.schedules import build_schedule


def constant(warmup_steps: int = 0) -> ConstantSchedule:
    return ConstantSchedule(name="constant", warmup_steps=warmup_steps)


def decay(name: str, warmup_steps: int = 0, final_fraction: float = 0.1) -> DecaySchedule:
    return DecaySchedule(name=name, warmup_steps=warmup_steps, final_fraction=final_fraction)


def wsd(warmup_steps: int = 0, decay_steps: int | None = 4, final_fraction: float = 0.0) -> WSDSchedule:
    return WSDSchedule(
        name="wsd", warmup_steps=warmup_steps, decay_steps=decay_steps, final_fraction=final_fraction
    )


def cosine(fraction: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * fraction)) / 2


# Ten updates with peak 2; the n-th uses the n-th value.
RATES: dict[str, tuple[Any, list[float]]] = {
    "constant": (constant(), [2.0] * 10),
    "constant, warm-up": (constant(4), [0.5, 1.0, 1.5] + [2.0] * 7),
    "linear": (decay("linear"), [2 - 0.18 * n for n in range(1, 11)]),
    "linear, warm-up": (decay("linear", 2), [1.0] + [2 - 1.8 * n / 8 for n in range(9)]),
    "cosine": (decay("cosine"), [2 * cosine(n / 10, 0.1) for n in range(1, 11)]),
    "cosine, warm-up": (decay("cosine", 2, 0.0), [1.0] + [2 * cosine(n / 8, 0.0) for n in range(9)]),
    "wsd": (wsd(), [2.0] * 6 + [1.5, 1.0, 0.5, 0.0]),
    "wsd, warm-up": (wsd(2, 4, 0.5), [1.0] + [2.0] * 5 + [1.75, 1.5, 1.25, 1.0]),
    "wsd, a fifth by default": (wsd(decay_steps=None), [2.0] * 8 + [1.0, 0.0]),
    "wsd, no stable part": (wsd(6, 4), [n / 3 for n in range(1, 7)] + [1.5, 1.0, 0.5, 0.0]),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("compiled", [True, False])
def test_rate_of_every_update(name: str, compiled: bool) -> None:
    config, expected = RATES[name]
    schedule = build_schedule(config, peak=2.0, total_steps=10)
    rate = mx.compile(schedule) if compiled else schedule
    rates = [rate(mx.array(step, dtype=mx.uint64)) for step in range(10)]
    assert all(value.dtype == mx.float32 and value.shape == () for value in rates)
    assert [value.item() for value in rates] == pytest.approx(expected, abs=1e-6)


def test_a_rate_stays_at_its_end_beyond_the_run() -> None:
    for config in (decay("linear"), decay("cosine"), wsd(final_fraction=0.1)):
        schedule = build_schedule(config, peak=1.0, total_steps=10)
        assert schedule(mx.array(50, dtype=mx.uint64)).item() == pytest.approx(0.1)


def test_optimizer_follows_the_schedule_inside_compile() -> None:
    optimizer = optim.SGD(build_schedule(decay("linear", 2), peak=2.0, total_steps=10))
    model = nn.Linear(1, 1, bias=False)
    model.weight = mx.zeros((1, 1))
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def update() -> mx.array:
        optimizer.update(model, {"weight": mx.ones((1, 1))})
        return optimizer.learning_rate

    step = mx.compile(update, inputs=state, outputs=state)
    expected = RATES["linear, warm-up"][1]
    for number, rate in enumerate(expected, start=1):
        assert step().item() == pytest.approx(rate, abs=1e-6)
        assert model.weight.item() == pytest.approx(-sum(expected[:number]), abs=1e-5)


@pytest.mark.parametrize("config", [wsd(warmup_steps=7), wsd(decay_steps=11), decay("cosine", 10)])
def test_warmup_and_decay_longer_than_the_run_are_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=rf"warmup_steps={config.warmup_steps} .*trainer.steps=10") as error:
        build_schedule(config, peak=1.0, total_steps=10)
    assert "\n" not in str(error.value)
