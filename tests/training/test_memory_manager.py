"""Limits, the peak, and recomputed activations."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest
from mlx.utils import tree_flatten

from mlx_ring.config.choices import CNNModel, MLPModel, Size, TransformerModel
from mlx_ring.config.sections import MemorySection
from mlx_ring.errors import ConfigError
from mlx_ring.models import build_model
from mlx_ring.models.losses import build_loss, sum_of_losses
from mlx_ring.training.memory_manager import apply_limits, checkpoint_activations, peak_bytes


def section(**limits: int) -> MemorySection:
    values: dict[str, Any] = {"limit_bytes": None, "cache_limit_bytes": None, "wired_limit_bytes": None}
    return MemorySection(**(values | limits), activation_checkpointing=False, issue_ahead=True)


@pytest.fixture
def restored_limits() -> Iterator[tuple[int, int]]:
    memory, cache = mx.set_memory_limit(2**34), mx.set_cache_limit(2**30)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    yield memory, cache
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


# Limits and peak


def test_limits_reach_mlx_and_null_leaves_them(restored_limits: tuple[int, int]) -> None:
    apply_limits(section())
    assert (mx.set_memory_limit(2**33), mx.set_cache_limit(2**25)) == restored_limits
    apply_limits(section(limit_bytes=2**30, cache_limit_bytes=2**24))
    assert (mx.set_memory_limit(2**33), mx.set_cache_limit(2**25)) == (2**30, 2**24)


@pytest.mark.parametrize("key", ["limit_bytes", "cache_limit_bytes"])
@pytest.mark.parametrize("value", [2**62, 2**70])
def test_more_than_the_machine_has_is_refused(key: str, value: int, restored_limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"memory.{key}={value} is more than the \d+ bytes") as error:
        apply_limits(section(**{key: value}))
    assert "\n" not in str(error.value)
    assert (mx.set_memory_limit(2**33), mx.set_cache_limit(2**25)) == restored_limits


@pytest.mark.skipif(mx.metal.is_available(), reason="macOS has wired limits")
def test_a_wired_limit_without_metal_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory.wired_limit_bytes=4096 works on macOS only"):
        apply_limits(section(wired_limit_bytes=4096))


def test_peak_counts_from_its_reset() -> None:
    array = mx.ones((1000, 1000))
    mx.eval(array)
    assert peak_bytes() >= array.nbytes
    del array
    mx.clear_cache()
    mx.reset_peak_memory()
    assert peak_bytes() < 4_000_000
    mx.eval(mx.ones((500, 1000)))
    assert 2_000_000 <= peak_bytes() < psutil.virtual_memory().total


# Recomputed activations


def transformer(dropout: float, layers: int = 3) -> tuple[nn.Module, mx.array, mx.array]:
    config = TransformerModel(
        name="transformer",
        size=Size["tiny"],
        layers=layers,
        dimensions=32,
        heads=4,
        kv_heads=2,
        hidden_dimensions=48,
        max_sequence_length=None,
        tie_head=True,
        dropout=dropout,
        rope_base=10000.0,
    )
    tokens = mx.random.randint(0, 50, (4, 24), key=mx.random.key(1))
    model = build_model(config, input_shape=(24,), num_classes=50)
    return model, tokens, (tokens + 1) % 50


def classifier(config: Any) -> tuple[nn.Module, mx.array, mx.array]:
    images = mx.random.normal((4, 8, 8, 1), key=mx.random.key(1))
    model = build_model(config, input_shape=(8, 8, 1), num_classes=5)
    return model, images, mx.array([0, 1, 4, -1])


MODELS: dict[str, Any] = {
    "transformer": transformer,
    "mlp": lambda p: classifier(MLPModel(name="mlp", hidden_sizes=[16, 12], dropout=p)),
    "cnn": lambda p: classifier(CNNModel(name="cnn", channels=[4, 6], hidden_size=8, dropout=p)),
}
NUM_BLOCKS = {"transformer": 3, "mlp": 2, "cnn": 3}


def loss_and_gradients(name: str, *, dropout: float, recomputed: bool, compiled: bool, seed: int = 5) -> Any:
    """As the trainer: seeded before the call, compiled with the random state in and out."""
    mx.random.seed(0)
    model, inputs, targets = MODELS[name](dropout)
    mx.eval(model.parameters())
    if recomputed:
        assert checkpoint_activations(model) == NUM_BLOCKS[name]
    loss = build_loss("cross_entropy")

    def step(inputs: mx.array, targets: mx.array) -> Any:
        parameters = model.trainable_parameters()

        def sums(parameters: Any) -> tuple[mx.array, mx.array]:
            model.update(parameters)
            return sum_of_losses(loss, model(inputs), targets)

        result = mx.value_and_grad(sums)(parameters)
        model.update(parameters)
        return result

    if compiled:
        step = mx.compile(step, inputs=[model.state, mx.random.state], outputs=[mx.random.state])
    before = dict(tree_flatten(model.parameters()))
    for number in (seed + 1, seed):  # the second call is the one that a frozen mask would spoil
        mx.random.seed(number)
        (total, count), gradients = step(inputs, targets)
        mx.eval(total, count, gradients)
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[path], before[path]) for path in before)
    return total.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize(("dropout", "compiled"), [(0.0, False), (0.4, False), (0.4, True)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_recomputed(name: str, dropout: float, compiled: bool) -> None:
    plain, plain_gradients = loss_and_gradients(name, dropout=dropout, recomputed=False, compiled=False)
    total, gradients = loss_and_gradients(name, dropout=dropout, recomputed=True, compiled=compiled)
    other, _ = loss_and_gradients(name, dropout=dropout, recomputed=True, compiled=compiled, seed=9)
    assert total == pytest.approx(plain, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for path, gradient in gradients.items():
        assert mx.allclose(gradient, plain_gradients[path], rtol=1e-5, atol=1e-6), path
    assert (other == total) == (dropout == 0)


def test_activations_take_less_memory_recomputed() -> None:
    peaks: list[int] = []
    for recomputed in (False, True):
        mx.random.seed(0)
        model, tokens, targets = transformer(0.0, layers=8)
        if recomputed:
            checkpoint_activations(model)
        mx.eval(model.parameters(), tokens, targets)
        loss = build_loss("cross_entropy")
        step = nn.value_and_grad(model, lambda x, y, m=model, loss=loss: loss(m(x), y).sum())
        mx.clear_cache()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        mx.eval(step(tokens, targets))
        peaks.append(peak_bytes() - active)
    assert peaks[1] < 0.6 * peaks[0]


def test_recomputation_really_happens_once_per_block() -> None:
    calls: list[str] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def __call__(self, x: mx.array, *, twice: bool) -> mx.array:
            calls.append("call")
            return mx.tanh(self.linear(x)) * (2 if twice else 1)

    model = nn.Module()
    model.layers = [Block(), Block()]
    checkpoint_activations(model)

    def value(x: mx.array) -> mx.array:
        for block in model.layers:
            x = block(x, twice=True)
        return x.sum()

    mx.eval(nn.value_and_grad(model, value)(mx.ones((2, 3))))
    assert len(calls) == 4
    assert isinstance(model.layers[0], Block)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_keep_their_paths_and_the_library_its_classes(name: str) -> None:
    mx.random.seed(0)
    model, inputs, _ = MODELS[name](0.3)
    paths, text = dict(tree_flatten(model.parameters())).keys(), repr(model)
    other = MODELS[name](0.3)[0]
    classes = [type(block) for block in other.layers]
    checkpoint_activations(model)
    assert dict(tree_flatten(model.parameters())).keys() == paths
    assert repr(model) == text
    assert [type(block) for block in other.layers] == classes
    assert "call" not in {block.__call__.__name__ for block in other.layers}
    model.eval()
    assert mx.isfinite(model(inputs)).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_forward_pass_leaves_the_weights_in_place(name: str) -> None:
    model, inputs, _ = MODELS[name](0.0)
    before = dict(tree_flatten(model.parameters()))
    mx.eval(before)
    checkpoint_activations(model)
    mx.eval(mx.compile(model, inputs=[model.state])(inputs))
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[path], before[path]) for path in before)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Module()])
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=f"list `layers`; {type(model).__name__} has none") as error:
        checkpoint_activations(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d, nn.Dropout3d])
def test_a_block_that_draws_its_own_mask_is_refused(layer: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), layer(0.1)))
    classes = [type(block) for block in model.layers]
    with pytest.raises(ConfigError, match=r"nn.Dropout at layers.1.layers.1 .*false") as error:
        checkpoint_activations(model)
    assert "\n" not in str(error.value)
    assert [type(block) for block in model.layers] == classes
    model.layers[1].layers[1] = layer(0.0)
    assert checkpoint_activations(model) == 2


def test_a_layer_that_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers.1 is a "):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2), nn.relu))


def test_why_a_layers_own_dropout_is_refused() -> None:
    # Under mx.checkpoint nn.Dropout draws another mask when it is recomputed: the gradient of the inputs then
    # has its zeros elsewhere than the output has.
    layer = nn.Dropout(0.5)
    x = mx.ones((1000,))
    outputs, gradients = mx.vjp(mx.checkpoint(layer.__call__), [x], [mx.ones((1000,))])
    assert not mx.array_equal(outputs[0], gradients[0])
