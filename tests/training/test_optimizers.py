"""The optimizers: which parameters decay, which Muon takes, and the scaling of the learning rate."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_ring.config.choices import (
    AdafactorOptimizer,
    AdamOptimizer,
    ConstantSchedule,
    DecaySchedule,
    LionOptimizer,
    MuonOptimizer,
    Scaling,
    SGDOptimizer,
)
from mlx_ring.training.optimizers import build_optimizer, current_learning_rate, learning_rate_scale
from mlx_ring.training.schedules import build_schedule

RATE, DECAY = 0.125, 0.5


def common(name: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "learning_rate": RATE,
        "scale_learning_rate": Scaling["none"],
        "reference_batch_size": 128,
        "weight_decay": DECAY,
    }
    return values | changes


CONFIGS: dict[str, Any] = {
    "adamw": lambda **c: AdamOptimizer(**common("adamw", betas=[0.9, 0.95], eps=1e-8) | c),
    "sgd": lambda **c: SGDOptimizer(**common("sgd", momentum=0.9, nesterov=True) | c),
    "lion": lambda **c: LionOptimizer(**common("lion", betas=[0.9, 0.99]) | c),
    "adafactor": lambda **c: AdafactorOptimizer(
        **common("adafactor", decay_rate=-0.8, clip_threshold=1.0) | c
    ),
    "muon": lambda **c: MuonOptimizer(**common("muon", momentum=0.95, adam_learning_rate=0.01) | c),
}

# What plain MLX does with one parameter.
REFERENCES: dict[str, Any] = {
    "adamw": lambda decay: optim.AdamW(RATE, [0.9, 0.95], 1e-8, decay, bias_correction=True),
    "sgd": lambda decay: optim.SGD(RATE, 0.9, decay, nesterov=True),
    "lion": lambda decay: optim.Lion(RATE, [0.9, 0.99], decay),
    "adafactor": lambda decay: optim.Adafactor(
        RATE, weight_decay=decay, scale_parameter=False, relative_step=False
    ),
    "muon": lambda decay: optim.Muon(RATE, 0.95, decay),
}


class Model(nn.Module):
    """A parameter of each kind; `layers.0` holds vectors alone, so that lists with holes occur."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = [nn.RMSNorm(4), nn.Linear(4, 6), nn.Conv2d(2, 3, 3), nn.LayerNorm(6)]
        self.head = nn.Linear(6, 5)


HIDDEN = {"layers.1.weight", "layers.2.weight"}
MATRICES = {"embedding.weight", "head.weight", *HIDDEN}


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def build(name: str, steps: int = 100, **changes: Any) -> optim.MultiOptimizer:
    config = CONFIGS[name](**changes)
    schedule = build_schedule(
        ConstantSchedule(name="constant", warmup_steps=0), peak=config.learning_rate, total_steps=steps
    )
    return build_optimizer(config, schedule=schedule, global_batch_size=512)


def model_and_gradients() -> tuple[Model, list[Any]]:
    mx.random.seed(0)
    model = Model()
    gradients = [tree_map(lambda p: mx.random.normal(p.shape), model.parameters()) for _ in range(3)]
    mx.eval(model.parameters(), gradients)
    return model, gradients


def alone(optimizer: optim.Optimizer, parameter: mx.array, gradients: list[mx.array]) -> mx.array:
    tree = {"parameter": parameter}
    for gradient in gradients:
        tree = optimizer.apply_gradients({"parameter": gradient}, tree)
    return tree["parameter"]


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in CONFIGS), ("adamw", True)])
def test_updates_are_mlxs_own_and_vectors_never_decay(name: str, compiled: bool) -> None:
    model, gradients = model_and_gradients()
    before = dict(flat(model.parameters()))
    optimizer = build(name)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def update(tree: Any) -> None:
        optimizer.update(model, tree)

    step = mx.compile(update, inputs=state, outputs=state) if compiled else update
    for tree in gradients:
        step(tree)
        mx.eval(state)
    after = flat(model.parameters())
    assert after.keys() == before.keys()
    for path, parameter in before.items():
        decay = DECAY if path in MATRICES else 0.0
        reference = REFERENCES[name](decay)
        if name == "muon" and path not in HIDDEN:
            reference = optim.AdamW(0.01, weight_decay=decay, bias_correction=True)
        expected = alone(reference, parameter, [flat(tree)[path] for tree in gradients])
        assert mx.allclose(after[path], expected, rtol=1e-4, atol=1e-5), path
        assert not mx.array_equal(after[path], parameter), path


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("sgd", "muon")])
def test_a_zero_gradient_shrinks_matrices_alone(name: str) -> None:
    model, _ = model_and_gradients()
    before = dict(flat(model.parameters()))
    optimizer = build(name)
    optimizer.update(model, tree_map(mx.zeros_like, model.parameters()))
    for path, after in flat(model.parameters()).items():
        factor = 1 - RATE * DECAY if path in MATRICES else 1.0
        assert mx.allclose(after, factor * before[path], rtol=1e-5), path


@pytest.mark.parametrize("name", CONFIGS)
def test_state_can_be_saved_and_put_back(name: str) -> None:
    model, gradients = model_and_gradients()
    optimizer = build(name)
    optimizer.update(model, gradients[0])
    weights, state = flat(model.parameters()), tree_map(lambda array: array, optimizer.state)
    resumed_model, resumed = Model(), build(name)
    resumed_model.load_weights(list(weights.items()))
    resumed.state = state
    for tree in gradients[1:]:
        optimizer.update(model, tree)
        resumed.update(resumed_model, tree)
    expected, actual = flat(model.parameters()), flat(resumed_model.parameters())
    assert all(mx.array_equal(expected[path], actual[path]) for path in expected)


def test_muon_orthogonalizes_hidden_matrices_alone() -> None:
    model, gradients = model_and_gradients()
    before = dict(flat(model.parameters()))
    build("muon", weight_decay=0.0).update(model, gradients[0])
    after = flat(model.parameters())
    for path in MATRICES:
        change = (after[path] - before[path]).reshape(after[path].shape[0], -1)
        singular = mx.linalg.svd(change, stream=mx.cpu)[1]
        flatness = (singular.min() / singular.max()).item()
        assert (flatness > 0.5) == (path in HIDDEN), (path, flatness)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_is_scaled_by_the_batch(scaling: str, factor: float) -> None:
    config = CONFIGS["sgd"](scale_learning_rate=Scaling[scaling], momentum=0.0, nesterov=False)
    assert learning_rate_scale(config, 512) == factor
    assert learning_rate_scale(config, 128) == 1.0
    optimizer = build(
        "sgd", scale_learning_rate=Scaling[scaling], momentum=0.0, nesterov=False, weight_decay=0.0
    )
    after = optimizer.apply_gradients({"weight": mx.ones((2, 2))}, {"weight": mx.zeros((2, 2))})
    assert after["weight"].tolist() == [[-RATE * factor] * 2] * 2
    assert current_learning_rate(optimizer).item() == RATE * factor


@pytest.mark.parametrize("name", CONFIGS)
def test_current_learning_rate_is_that_of_the_latest_update(name: str) -> None:
    config = CONFIGS[name](scale_learning_rate=Scaling["linear"])
    linear = DecaySchedule(name="linear", warmup_steps=0, final_fraction=0.0)
    schedule = build_schedule(linear, peak=config.learning_rate, total_steps=4)
    optimizer = build_optimizer(config, schedule=schedule, global_batch_size=256)
    model, gradients = model_and_gradients()
    rates: list[float] = []
    for tree in gradients:
        optimizer.update(model, tree)
        rates.append(current_learning_rate(optimizer).item())
    assert rates == pytest.approx([2 * RATE * fraction for fraction in (0.75, 0.5, 0.25)])
    every = [single.learning_rate.item() for single in optimizer.optimizers]
    assert every[1:] == pytest.approx([0.005 if name == "muon" else rates[-1]] * (len(every) - 1))


def test_a_model_of_vectors_alone_is_updated() -> None:
    norm = nn.RMSNorm(3)
    build("adamw").update(norm, {"weight": mx.ones((3,))})
    assert mx.allclose(norm.weight, mx.full((3,), 1 - RATE), atol=1e-4)
