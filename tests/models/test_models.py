"""The models: shapes, sizes, dtypes, dropout, losses, and a user's own."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_ring.config.choices import CNNModel, CustomModel, Kind, MLPModel, Size, TransformerModel
from mlx_ring.errors import ConfigError
from mlx_ring.models import build_model
from mlx_ring.models.dropout import draw_key, dropout, split_key
from mlx_ring.models.losses import build_loss, sum_of_losses
from mlx_ring.models.precision import build_forward
from mlx_ring.models.transformer import Attention


def mlp(hidden_sizes: tuple[int, ...] = (16, 12), dropout: float = 0.0) -> MLPModel:
    return MLPModel(name="mlp", hidden_sizes=list(hidden_sizes), dropout=dropout)


def cnn(channels: tuple[int, ...] = (4, 6), dropout: float = 0.0) -> CNNModel:
    return CNNModel(name="cnn", channels=list(channels), hidden_size=8, dropout=dropout)


def transformer(size: str = "tiny", **changes: Any) -> TransformerModel:
    values: dict[str, Any] = {
        "layers": None,
        "dimensions": None,
        "heads": None,
        "kv_heads": None,
        "hidden_dimensions": None,
        "max_sequence_length": None,
        "tie_head": False,
        "dropout": 0.0,
        "rope_base": 10000.0,
    }
    return TransformerModel(name="transformer", size=Size[size], **(values | changes))


def classifier(config: Any, shape: tuple[int, ...], num_classes: int = 10) -> nn.Module:
    mx.random.seed(0)
    return build_model(config, input_shape=shape, num_classes=num_classes)


def language(config: Any, tokens: int = 16, vocabulary_size: int = 256) -> nn.Module:
    mx.random.seed(0)
    return build_model(config, input_shape=(tokens,), num_classes=vocabulary_size)


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def tokens(batch: int = 2, length: int = 16) -> mx.array:
    return mx.random.randint(0, 256, (batch, length), key=mx.random.key(1))


MODELS: dict[str, Callable[[float], tuple[nn.Module, mx.array]]] = {
    "mlp": lambda p: (classifier(mlp(dropout=p), (8, 8, 1)), mx.random.normal((4, 8, 8, 1))),
    "cnn": lambda p: (classifier(cnn(dropout=p), (8, 8, 1)), mx.random.normal((4, 8, 8, 1))),
    "transformer": lambda p: (language(transformer(dropout=p)), tokens()),
}


# Shapes and sizes


@pytest.mark.parametrize("shape", [(5,), (8, 8), (8, 8, 3)])
def test_perceptron_flattens_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    model = classifier(mlp(), shape)
    assert model(mx.zeros((3, *shape))).shape == (3, 10)
    assert len(model.layers) == 2


def test_perceptron_without_hidden_layers_is_linear() -> None:
    model = classifier(mlp(hidden_sizes=()), (4, 2))
    x = mx.random.normal((3, 4, 2))
    expected = x.reshape(3, 8) @ model.head.weight.T + model.head.bias
    assert mx.allclose(model(x), expected, atol=1e-6)
    assert model.layers == []


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (9, 7, 3)])
def test_cnn_takes_images_of_odd_sides_too(shape: tuple[int, ...]) -> None:
    model = classifier(cnn(), shape)
    assert model(mx.zeros((3, *shape))).shape == (3, 10)
    assert len(model.layers) == 3


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_cnn_refuses_samples_that_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        classifier(cnn(), shape)
    assert str(shape) in str(error.value)
    assert "model=mlp" in str(error.value)


def test_cnn_refuses_more_halvings_than_the_image_has() -> None:
    classifier(cnn(channels=(2, 2, 2)), (8, 8, 1))
    with pytest.raises(ConfigError, match=r"\[2, 2, 2, 2\].*\(8, 8, 1\)"):
        classifier(cnn(channels=(2, 2, 2, 2)), (8, 8, 1))


def test_transformer_gives_logits_of_every_position() -> None:
    model = language(transformer(), vocabulary_size=300)
    assert model(tokens()).shape == (2, 16, 300)
    assert len(model.layers) == 2
    assert model.max_sequence_length == 64


def test_tiny_transformer_has_at_most_300_000_parameters() -> None:
    count = sum(array.size for array in flat(language(transformer()).parameters()).values())
    assert 200_000 < count <= 300_000


def test_gpt2_124m_has_about_124_million_parameters() -> None:
    # Shapes alone: nothing is evaluated, so nothing is allocated.
    model = language(transformer("gpt2_124m", tie_head=True), tokens=1024, vocabulary_size=50_304)
    count = sum(array.size for array in flat(model.parameters()).values())
    assert count == pytest.approx(124e6, rel=0.01)
    assert model.max_sequence_length == 1024


def test_transformer_refuses_sequences_longer_than_its_positions() -> None:
    with pytest.raises(ConfigError, match=r"65 tokens.*max_sequence_length=64.*data.sequence_length=64"):
        language(transformer(), tokens=65)


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_from_the_random_state(name: str) -> None:
    one, two = flat(MODELS[name](0.0)[0].parameters()), flat(MODELS[name](0.0)[0].parameters())
    assert all(mx.array_equal(one[path], two[path]) for path in one)
    for path, array in one.items():
        assert mx.isfinite(array).all(), path


# The transformer's parts


def test_transformer_is_causal() -> None:
    model = language(transformer())
    one = tokens()
    two = mx.concatenate([one[:, :9], (one[:, 9:] + 1) % 256], axis=1)
    difference = mx.abs(model(one) - model(two)).max(axis=(0, 2))
    assert difference[:9].max().item() == 0
    assert difference[9:].min().item() > 0


def test_attention_is_what_the_papers_say() -> None:
    """Written out: rotary positions turn pairs (i, i + width / 2); softmax over positions up to one's own."""
    attention = Attention(dimensions=8, heads=2, kv_heads=1, rope_base=50.0)
    x = 3 * mx.random.normal((1, 5, 8), key=mx.random.key(0))
    angles = mx.arange(5)[:, None] * mx.power(50.0, -mx.arange(2) / 2)
    cosine, sine = mx.cos(angles), mx.sin(angles)

    def turn(heads: mx.array) -> mx.array:
        first, second = heads[:, :2], heads[:, 2:]
        return mx.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=1)

    key, value = turn(attention.key(x)[0]), attention.value(x)[0]
    mixed: list[mx.array] = []
    for query in mx.split(attention.query(x)[0], 2, axis=1):
        scores = turn(query) @ key.T / 2
        causal = mx.where(mx.arange(5)[:, None] >= mx.arange(5)[None], scores, -mx.inf)
        mixed.append(mx.softmax(causal, axis=1) @ value)
    assert mx.allclose(attention(x)[0], attention.output(mx.concatenate(mixed, axis=1)), atol=1e-5)


def test_rope_base_is_the_configured_one() -> None:
    model = language(transformer(rope_base=100.0))
    assert [block.attention.rope.base for block in model.layers] == [100.0, 100.0]


def test_grouped_queries_equal_repeated_key_and_value_heads() -> None:
    grouped, full = language(transformer(kv_heads=2)), language(transformer(kv_heads=4))
    weights = flat(grouped.parameters())

    def repeat(path: str, array: mx.array) -> mx.array:
        source = weights[path]
        if path.endswith(("key.weight", "value.weight")):
            return mx.repeat(source.reshape(2, 24, 96), 2, axis=0).reshape(96, 96)
        return source

    full.update(tree_map_with_path(repeat, full.parameters()))
    assert mx.allclose(grouped(tokens()), full(tokens()), atol=1e-5)


def test_tied_head_is_the_embedding() -> None:
    tied, untied = language(transformer(tie_head=True)), language(transformer())
    assert "head.weight" not in flat(tied.parameters())
    untied.update({**tied.parameters(), "head": {"weight": tied.embedding.weight}})
    assert mx.allclose(tied(tokens()), untied(tokens()), atol=1e-6)


def test_initial_weights_are_those_of_gpt2() -> None:
    model = language(transformer("small"))
    for path, weight in flat(model.layers[0].parameters()).items():
        deviation = 0.02 / math.sqrt(12) if path.endswith(("output.weight", "down.weight")) else 0.02
        if weight.ndim == 2:
            assert mx.std(weight).item() == pytest.approx(deviation, rel=0.05), path
        else:
            assert mx.array_equal(weight, mx.ones_like(weight)), path
    assert mx.std(model.embedding.weight).item() == pytest.approx(0.02, rel=0.05)
    losses = build_loss("cross_entropy")(model(tokens()), tokens())
    assert losses.mean().item() == pytest.approx(math.log(256), rel=0.05)


def test_no_parameter_is_a_bias_and_every_one_gets_a_gradient() -> None:
    model = language(transformer(tie_head=True))
    loss = build_loss("cross_entropy")
    gradients = flat(nn.value_and_grad(model, lambda x, y: loss(model(x), y).sum())(tokens(), tokens())[1])
    assert not [path for path in gradients if "bias" in path]
    assert gradients.keys() == flat(model.parameters()).keys()
    assert all(mx.abs(gradient).max().item() > 0 for gradient in gradients.values())


# Mixed precision


def cast(model: nn.Module) -> None:
    """To bfloat16, as the trainer casts: everything but the weights of embeddings."""
    for _, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            own = {key: value for key, value in module.items() if isinstance(value, mx.array)}
            module.update({key: value.astype(mx.bfloat16) for key, value in own.items()})


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("probability", [0.0, 0.2])
def test_no_activation_of_a_cast_transformer_is_float32(
    tie_head: bool, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language(transformer(tie_head=tie_head, dropout=probability))
    in_float32 = model(tokens())
    cast(model)
    seen: list[tuple[str, Any]] = []
    for kind in {type(module) for module in model.modules()} - {nn.Embedding}:

        def call(module: nn.Module, *arguments: Any, original: Any = kind.__call__) -> Any:
            output = original(module, *arguments)
            seen.extend((type(module).__name__, x.dtype) for x in [*arguments, output] if x is not None)
            return output

        monkeypatch.setattr(kind, "__call__", call)
    logits = model(tokens())
    assert model.embedding.weight.dtype == mx.float32
    assert len(seen) > 50
    keys_and_tokens = {mx.uint32, mx.int32}
    assert {dtype for _, dtype in seen} - keys_and_tokens == {mx.bfloat16}
    assert logits.dtype == mx.bfloat16
    if probability == 0:
        assert mx.allclose(logits.astype(mx.float32), in_float32, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_cast_models_compute_in_bfloat16(name: str) -> None:
    model, inputs = MODELS[name](0.2)
    cast(model)
    inputs = inputs if inputs.dtype == mx.int32 else inputs.astype(mx.bfloat16)
    assert model(inputs).dtype == mx.bfloat16


def test_frozen_layers_are_cast_too() -> None:
    model, inputs = MODELS["mlp"](0.0)
    model.layers[0].freeze()
    masters = model.parameters()
    outputs = build_forward(model, mx.bfloat16)(model.trainable_parameters(), inputs)
    assert outputs.dtype == mx.bfloat16
    assert {array.dtype for array in flat(model.parameters()).values()} == {mx.bfloat16}
    model.update(masters)
    assert {array.dtype for array in flat(model.parameters()).values()} == {mx.float32}


# Dropout


def compiled_forward(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """Compiled the way the trainer compiles its step."""
    return mx.compile(model, inputs=[model.state, mx.random.state], outputs=[mx.random.state])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compiled", [True, False])
def test_masks_follow_the_seed(name: str, compiled: bool) -> None:
    model, inputs = MODELS[name](0.5)
    mx.eval(model.parameters())
    forward = compiled_forward(model) if compiled else model
    outputs: list[mx.array] = []
    for seed in (1, 2, 1):
        mx.random.seed(seed)
        outputs.append(forward(inputs))
        mx.eval(outputs[-1])
    again = forward(inputs)  # not seeded: the state moved on
    assert mx.array_equal(outputs[0], outputs[2])
    assert not mx.array_equal(outputs[0], outputs[1])
    assert not mx.array_equal(outputs[2], again)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compiled", [True, False])
def test_evaluation_drops_nothing_and_leaves_the_random_state(name: str, compiled: bool) -> None:
    model, inputs = MODELS[name](0.5)
    without, _ = MODELS[name](0.0)
    mx.eval(model.parameters())
    forward = compiled_forward(model) if compiled else model
    training = forward(inputs)
    model.eval()
    forward = compiled_forward(model) if compiled else model
    before = mx.array(mx.random.state[0])
    evaluated = forward(inputs)
    assert mx.array_equal(before, mx.random.state[0])
    assert mx.allclose(evaluated, without(inputs), atol=1e-6)
    assert not mx.allclose(evaluated, training, atol=1e-6)
    model.train()
    assert not mx.array_equal(model(inputs), evaluated)


def test_dropout_zeroes_its_fraction_and_keeps_the_mean() -> None:
    x = mx.ones((200, 200), dtype=mx.bfloat16)
    dropped = dropout(x, 0.25, mx.random.key(0))
    assert dropped.dtype == mx.bfloat16
    assert (dropped == 0).astype(mx.float32).mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.astype(mx.float32).mean().item() == pytest.approx(1, abs=0.01)
    assert dropout(x, 0.25, None) is x


def test_keys_are_distinct_and_advance_the_state() -> None:
    mx.random.seed(3)
    keys = [*split_key(draw_key(), 4), *split_key(draw_key(), 4)]
    assert len({tuple(key.tolist()) for key in keys if key is not None}) == 8
    assert split_key(None, 3) == [None, None, None]


# Losses


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_cross_entropy_is_float32_and_skips_minus_one(dtype: mx.Dtype) -> None:
    logits = (3 * mx.random.normal((2, 3, 7), key=mx.random.key(0))).astype(dtype)
    targets = mx.array([[1, -1, 6], [0, 3, -1]])
    losses = build_loss("cross_entropy")(logits, targets)
    total, count = sum_of_losses(build_loss("cross_entropy"), logits, targets)
    exact = logits.astype(mx.float32)
    expected = (
        mx.logsumexp(exact, axis=-1) - mx.take_along_axis(exact, targets[..., None] % 7, axis=-1)[..., 0]
    )
    expected = mx.where(targets == -1, 0, expected)
    assert losses.dtype == total.dtype == mx.float32
    assert losses.shape == targets.shape
    assert mx.allclose(losses, expected, atol=1e-5)
    assert total.item() == pytest.approx(expected.sum().item(), abs=1e-4)
    assert (count.item(), count.dtype) == (4, mx.int32)


def test_what_does_not_count_has_no_gradient() -> None:
    logits = mx.random.normal((4, 7), key=mx.random.key(0))
    gradient = mx.grad(lambda x: build_loss("cross_entropy")(x, mx.array([1, -1, 2, -1])).sum())(logits)
    assert mx.abs(gradient).max(axis=1).tolist()[1::2] == [0, 0]
    assert mx.abs(gradient).max(axis=1)[::2].min().item() > 0


def test_the_largest_unsigned_class_counts() -> None:
    logits = mx.zeros((3, 256))
    total, count = sum_of_losses(build_loss("cross_entropy"), logits, mx.array([0, 255, 255], dtype=mx.uint8))
    assert count.item() == 3
    assert total.item() == pytest.approx(3 * math.log(256), rel=1e-5)


def write_module(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())


def test_loss_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(
        tmp_path,
        "own_losses",
        """
        import mlx.core as mx
        def squared(outputs, targets):
            assert outputs.dtype == mx.float32
            return mx.square(outputs - targets)
        def mean(outputs, targets):
            return mx.square(outputs - targets).mean()
        """,
        monkeypatch,
    )
    loss = build_loss("own_losses:squared")
    outputs = mx.array([1.0, 2.0, 4.0], dtype=mx.bfloat16)
    assert loss(outputs, mx.array([0, -1, 1])).tolist() == [1, 0, 9]
    total, count = sum_of_losses(loss, outputs, mx.array([0.0, -1.0, 1.0]))
    assert (total.item(), count.item()) == (19, 3)
    with pytest.raises(ConfigError, match=r"own_losses:mean returned losses of shape \(\) .*\(3,\)"):
        build_loss("own_losses:mean")(outputs, mx.array([0, 1, 1]))


@pytest.mark.parametrize("name", ["hinge", "", "json:nothing", "json:__name__", "no_such_module:loss"])
def test_unknown_losses_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_loss(name)
    assert "trainer.loss" in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


# A model of the user's own


OWN_MODEL = """
import mlx.nn as nn

class Own(nn.Module):
    def __init__(self, input_shape, num_classes, width=3):
        super().__init__()
        self.layers = [nn.Linear(input_shape[0], width), nn.Linear(width, num_classes)]
    def __call__(self, x):
        return self.layers[1](self.layers[0](x))

def no_model(input_shape, num_classes):
    return "a string"

raised = ValueError
"""


def custom(import_path: str, **arguments: Any) -> CustomModel:
    return CustomModel(name="custom", import_path=import_path, kind=Kind["classifier"], arguments=arguments)


def test_custom_model_is_built_with_the_datas_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "own_model", OWN_MODEL, monkeypatch)
    model = classifier(custom("own_model:Own", width=5), (4,), num_classes=2)
    assert model(mx.zeros((3, 4))).shape == (3, 2)
    assert model.layers[0].weight.shape == (5, 4)


@pytest.mark.parametrize(
    ("import_path", "arguments", "reason"),
    [
        ("own_model:Own", {"depth": 2}, "depth"),
        ("own_model:no_model", {}, "returned a str"),
        ("own_model:Missing", {}, "Missing"),
        ("own_model:nn", {}, "is a module"),
        ("own_model_absent:Own", {}, "No module named 'own_model_absent'"),
        ("own_model_broken:Own", {}, "ZeroDivisionError"),
    ],
)
def test_custom_model_that_cannot_be_built_is_refused_in_one_line(
    import_path: str, arguments: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_model_broken.py").write_text("1 / 0")
    write_module(tmp_path, "own_model", OWN_MODEL, monkeypatch)
    with pytest.raises(ConfigError) as error:
        classifier(custom(import_path, **arguments), (4,))
    assert import_path in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# They learn


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_a_few_samples_by_heart(name: str) -> None:
    model, inputs = MODELS[name](0.0)
    targets = (inputs + 1) % 256 if name == "transformer" else mx.array([1, 2, 3, 4])
    loss, optimizer = build_loss("cross_entropy"), optim.Adam(3e-3)

    def mean(x: mx.array, y: mx.array) -> mx.array:
        total, count = sum_of_losses(loss, model(x), y)
        return total / count

    step = nn.value_and_grad(model, mean)
    first = mean(inputs, targets).item()
    for _ in range(60):
        value, gradients = step(inputs, targets)
        optimizer.update(model, gradients)
        mx.eval(value, model.parameters(), optimizer.state)
    assert mean(inputs, targets).item() < 0.2 * first
