"""Every source of data except text: what it gives, and its message if it is missing, damaged or misused."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ring.config.choices import BundledData, CustomData, FashionMNISTData, SyntheticData, TokensData
from mlx_ring.data.images import IDX_FILES
from mlx_ring.data.sources import Dataset, DataSpec, Split, open_dataset, prepare
from mlx_ring.errors import ConfigError, DataError


def open_config(config: Any, *, kind: str, sequence_length: int | None = None, seed: int = 1) -> Dataset:
    return open_dataset(config, kind=kind, seed=seed, sequence_length=sequence_length, files=prepare(config))


def everything(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.batch(np.arange(len(split)))


# Digits


def test_digits() -> None:
    dataset = open_config(BundledData(name="digits", prefetch=4), kind="classifier")
    assert dataset.spec == DataSpec(kind="classifier", input_shape=(8, 8, 1), num_classes=10)
    assert len(dataset.train) + len(dataset.held_out) == 1797
    for split in (dataset.train, dataset.held_out):
        inputs, targets = everything(split)
        assert inputs.dtype == np.float32 and targets.dtype == np.int32
        assert inputs.shape == (len(split), 8, 8, 1) and inputs.min() == -1 and inputs.max() == 1
    held_out_share = np.bincount(everything(dataset.held_out)[1]) / np.bincount(everything(dataset.train)[1])
    assert np.allclose(held_out_share, 0.25, atol=0.01)


def test_nearest_neighbours_read_the_digits() -> None:
    """Images and labels belong together: the nearest training image has the right label."""
    dataset = open_config(BundledData(name="digits", prefetch=4), kind="classifier")
    (train, train_labels), (held_out, labels) = everything(dataset.train), everything(dataset.held_out)
    train, held_out = train.reshape(len(train), -1), held_out.reshape(len(held_out), -1)
    distances = (train**2).sum(1) - 2 * held_out @ train.T
    assert np.mean(train_labels[distances.argmin(1)] == labels) > 0.97


def test_the_digits_file_is_made_byte_for_byte(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assets = Path(__file__).parents[2] / "mlx_ring" / "data" / "assets"
    script = tmp_path / "make_digits.py"
    script.write_bytes((assets / "make_digits.py").read_bytes())
    subprocess.run([sys.executable, script], check=True)
    made, kept = ((folder / "digits.safetensors").read_bytes() for folder in (tmp_path, assets))
    assert hashlib.sha256(made).digest() == hashlib.sha256(kept).digest()


# Fashion-MNIST


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Twenty training and ten held-out images, the labels plain, the images compressed."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("held_out", 10)):
        images = generator.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{IDX_FILES[f'{split}_images']}.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / IDX_FILES[f"{split}_labels"]).write_bytes(idx_bytes(np.arange(count) % 10))
    return tmp_path


def fashion_mnist(path: Path | None) -> FashionMNISTData:
    return FashionMNISTData(
        name="fashion_mnist", prefetch=4, path=path and str(path), distribute=False, cache_dir="unused"
    )


def test_fashion_mnist(idx_folder: Path) -> None:
    dataset = open_config(fashion_mnist(idx_folder), kind="classifier")
    assert dataset.spec == DataSpec(kind="classifier", input_shape=(28, 28, 1), num_classes=10)
    inputs, targets = dataset.train.batch(np.array([13, 4]))
    stored = np.frombuffer(
        gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())[16:], "u1"
    )
    expected = stored.reshape(20, 28, 28, 1)[[13, 4]] / 255
    assert np.allclose(inputs, (expected - 0.2860) / 0.3530, atol=1e-3)
    assert targets.tolist() == [3, 4] and len(dataset.held_out) == 10


def test_fashion_mnist_files_may_have_any_name(idx_folder: Path) -> None:
    """Files that another host sent have other names."""
    config = fashion_mnist(idx_folder)
    files = prepare(config)
    digest = open_config(config, kind="classifier").digest
    moved = {
        name: path.rename(idx_folder / f"received-{number}")
        for number, (name, path) in enumerate(files.items())
    }
    received = open_dataset(config, kind="classifier", seed=1, sequence_length=None, files=moved)
    assert received.digest == digest


def cut_short(content: bytes) -> bytes:
    return content[:-5]


def with_other_magic(content: bytes) -> bytes:
    return b"\0\0\x0d" + content[3:]


def compressed_and_cut(content: bytes) -> bytes:
    return gzip.compress(content)[:-9]


def compressed_and_damaged(content: bytes) -> bytes:
    compressed = gzip.compress(content)
    return compressed[:20] + bytes([compressed[20] ^ 255]) + compressed[21:]


def with_a_large_label(content: bytes) -> bytes:
    return content[:-1] + b"\x0a"


def with_one_label_less(content: bytes) -> bytes:
    return idx_bytes(np.arange(19) % 10)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "23 bytes.*28"),
        (with_other_magic, "00000d01.*00000801"),
        (compressed_and_cut, "cannot be read"),
        (compressed_and_damaged, "cannot be read"),
        (with_a_large_label, "label 10"),
        (with_one_label_less, r"\(19,\).*\(20, 28, 28\)"),
        (lambda content: b"", "nothing"),
    ],
)
def test_a_damaged_idx_file_is_named(
    idx_folder: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = idx_folder / "train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"train-labels-idx1-ubyte.*{message}"):
        open_config(fashion_mnist(idx_folder), kind="classifier")


def test_absent_fashion_mnist_names_the_folder_and_the_remedies(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(DataError, match=f"not in {tmp_path}.*dataset-fashion-mnist.*data.path"):
        prepare(fashion_mnist(tmp_path))
    monkeypatch.setattr("mlx_ring.data.images.DEBIAN_FOLDER", tmp_path / "debian")
    with pytest.raises(DataError, match=f"not in {tmp_path / 'debian'}"):
        prepare(fashion_mnist(None))


# Token files


def tokens_config(path: Path, held_out_fraction: float = 0.25) -> TokensData:
    return TokensData(
        name="tokens",
        prefetch=4,
        path=str(path),
        sequence_length=None,
        held_out_fraction=held_out_fraction,
        distribute=False,
        cache_dir="unused",
    )


def write_tokens(path: Path, array: np.ndarray, **changes: Any) -> Path:
    path.write_bytes(array.tobytes())
    side_car = {
        "format_version": 1,
        "dtype": array.dtype.name,
        "vocabulary_size": 1000,
        "tokens": len(array),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    } | changes
    kept = {key: value for key, value in side_car.items() if value is not None}
    path.with_suffix(".json").write_text(json.dumps(kept))
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("count", [40, 41, 44, 47])
def test_windows_cover_the_tokens(tmp_path: Path, count: int, dtype: str) -> None:
    path = write_tokens(tmp_path / "a.bin", np.arange(count, dtype=dtype))
    dataset = open_config(tokens_config(path), kind="language", sequence_length=4)
    assert dataset.spec == DataSpec(kind="language", input_shape=(4,), num_classes=1000)
    held_out = round(count / 4)
    inputs, targets = everything(dataset.train)
    assert inputs.dtype == targets.dtype == np.int32
    assert np.array_equal(targets, inputs + 1)
    assert inputs.ravel().tolist() == list(range((count - held_out - 1) // 4 * 4))
    inputs, targets = everything(dataset.held_out)
    counted = targets != -1
    assert targets[counted].tolist() == list(range(count - held_out + 1, count))
    assert np.array_equal(targets[counted], inputs[counted] + 1)
    assert (~counted).sum() < 4


def test_the_digest_is_that_of_content_and_cut(tmp_path: Path) -> None:
    def digest(name: str, *, tokens: int = 100, sequence_length: int = 4, fraction: float = 0.25) -> str:
        path = write_tokens(tmp_path / f"{name}.bin", np.arange(tokens, dtype=np.uint16))
        config = tokens_config(path, fraction)
        return open_config(config, kind="language", sequence_length=sequence_length).digest

    digests = [
        digest("a"),
        digest("c", tokens=101),
        digest("d", sequence_length=5),
        digest("e", fraction=0.3),
    ]
    assert len(set(digests)) == 4
    assert digest("b") == digests[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 50}, r"a\.bin holds 200 bytes.*a\.json.*50 tokens of uint16 \(100 bytes\)"),
        ({"dtype": "uint32"}, r"a\.bin holds 200 bytes.*100 tokens of uint32 \(400 bytes\)"),
        ({"dtype": "float32"}, r"a\.json: dtype must be one of uint8, uint16, uint32; got 'float32'"),
        ({"vocabulary_size": "big"}, r"a\.json: vocabulary_size must be a whole number above 0; got 'big'"),
        ({"vocabulary_size": 0}, r"a\.json: vocabulary_size.*got 0"),
        ({"tokens": -3}, r"a\.json: tokens.*got -3"),
        ({"sha256": None}, r"a\.json: sha256 must be a text; got None"),
        ({"format_version": 2}, r"a\.json has format_version 2, newer than 1"),
    ],
)
def test_a_side_car_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_tokens(tmp_path / "a.bin", np.arange(100, dtype=np.uint16), **changes)
    with pytest.raises(DataError, match=message):
        open_config(tokens_config(path), kind="language", sequence_length=4)


def test_a_missing_or_broken_side_car_is_named(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", np.arange(100, dtype=np.uint16))
    for content, message in (("{", "cannot be read as JSON"), ("[1]", "format_version must be")):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(DataError, match=rf"a\.json.*{message}"):
            prepare(tokens_config(path))
    path.with_suffix(".json").unlink()
    expected = r"a\.json is missing.*format_version, dtype, vocabulary_size, tokens, sha256"
    with pytest.raises(DataError, match=expected):
        prepare(tokens_config(path))
    with pytest.raises(DataError, match=r"absent\.bin is not a file"):
        prepare(tokens_config(tmp_path / "absent.bin"))


def test_too_few_tokens_are_refused_with_counts(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", np.arange(12, dtype=np.uint16))
    with pytest.raises(DataError, match=r"9 tokens to train on \(a window takes 10\) and 3 held out"):
        open_config(tokens_config(path), kind="language", sequence_length=9)
    assert len(open_config(tokens_config(path), kind="language", sequence_length=8).train) == 1
    with pytest.raises(DataError, match=r"11 tokens to train on.* and 1 held out"):
        open_config(tokens_config(path, 0.1), kind="language", sequence_length=4)


def test_a_token_outside_the_vocabulary_is_named_when_it_is_drawn(tmp_path: Path) -> None:
    tokens = np.arange(100, dtype=np.uint32)
    tokens[[9, 99]] = [1000, 2**32 - 1]
    dataset = open_config(
        tokens_config(write_tokens(tmp_path / "a.bin", tokens)), kind="language", sequence_length=4
    )
    dataset.train.batch(np.array([0, 1, 3]))
    with pytest.raises(DataError, match=r"a\.bin holds the token 1000.*1000"):
        dataset.train.batch(np.array([0, 2]))
    with pytest.raises(DataError, match=r"a\.bin holds the token 4294967295"):
        everything(dataset.held_out)


LARGE_FILE = """
import sys
from itertools import islice
from pathlib import Path
import psutil
from mlx_ring.config.choices import TokensData
from mlx_ring.data.loader import Loader
from mlx_ring.data.sources import open_dataset, prepare

config = TokensData(name="tokens", prefetch=4, path=sys.argv[1], sequence_length=None, held_out_fraction=0.05,
                    distribute=False, cache_dir="unused")
before = psutil.Process().memory_info().rss
dataset = open_dataset(config, kind="language", seed=0, sequence_length=1024, files=prepare(config))
sizes = dict(global_batch_size=32, micro_batch_size=32, micro_batches=range(1))
with Loader(dataset.train, seed=0, next_sample=0, prefetch=4, **sizes) as loader:
    tokens = sum(batch.micro_batches[0][1].size for batch in islice(loader, 50))
print(tokens, len(dataset.train), psutil.Process().memory_info().rss - before)
"""


def test_a_ten_gigabyte_file_takes_little_memory(tmp_path: Path) -> None:
    path, size_bytes = tmp_path / "large.bin", 10 * 10**9
    path.touch()
    os.truncate(path, size_bytes)  # sparse: no disk is used
    side_car = {"format_version": 1, "dtype": "uint16", "vocabulary_size": 50257, "sha256": "0" * 64}
    path.with_suffix(".json").write_text(json.dumps(side_car | {"tokens": size_bytes // 2}))
    command = [sys.executable, "-c", LARGE_FILE, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    drawn, windows, growth_bytes = map(int, output.split())
    assert drawn == 50 * 32 * 1024 and windows == (4_750_000_000 - 1) // 1024
    assert growth_bytes < 300e6


# Synthetic data


def synthetic(**changes: Any) -> SyntheticData:
    values: dict[str, Any] = {
        "samples": 1000, "held_out_samples": 100, "features": 16, "classes": 5, "vocabulary_size": 50,
    }  # fmt: skip
    return SyntheticData(name="synthetic", prefetch=4, sequence_length=None, **(values | changes))


def test_synthetic_tokens_follow_a_noisy_rule() -> None:
    dataset = open_config(synthetic(), kind="language", sequence_length=32)
    assert dataset.spec == DataSpec(kind="language", input_shape=(32,), num_classes=50)
    inputs, targets = everything(dataset.train)
    assert inputs.dtype == targets.dtype == np.int32 and inputs.shape == targets.shape == (1000, 32)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert np.bincount(inputs.ravel(), minlength=50).min() > 400
    steps = np.bincount((targets - inputs).ravel() % 50, minlength=50) / inputs.size
    assert 0.88 < steps.max() < 0.92
    held_out_inputs, held_out_targets = everything(dataset.held_out)
    follows = (held_out_targets - held_out_inputs) % 50 == steps.argmax()
    assert 0.85 < follows.mean() < 0.95


def test_synthetic_classes_can_be_told_by_their_centres() -> None:
    dataset = open_config(synthetic(), kind="classifier")
    assert dataset.spec == DataSpec(kind="classifier", input_shape=(16,), num_classes=5)
    (inputs, targets), (held_out, labels) = everything(dataset.train), everything(dataset.held_out)
    assert inputs.dtype == np.float32 and targets.dtype == np.int32 and np.abs(inputs).max() <= 1
    assert np.bincount(targets, minlength=5).min() > 150
    centres = np.stack([inputs[targets == label].mean(0) for label in range(5)])
    nearest = ((held_out[:, np.newaxis] - centres) ** 2).sum(-1).argmin(1)
    assert 0.85 < np.mean(nearest == labels) <= 1
    assert 0.1 < np.std(inputs - centres[targets]) < 0.5


@pytest.mark.parametrize(("kind", "sequence_length"), [("language", 8), ("classifier", None)])
def test_synthetic_samples_depend_on_seed_and_index_alone(kind: str, sequence_length: int | None) -> None:
    def opened(seed: int) -> Dataset:
        return open_config(synthetic(samples=10**9), kind=kind, sequence_length=sequence_length, seed=seed)

    indices = np.array([0, 999_999_999, 7, 0])
    inputs, targets = opened(1).train.batch(indices)
    for row, index in enumerate(indices):
        alone_inputs, alone_targets = opened(1).train.batch(np.array([index]))
        assert np.array_equal(alone_inputs[0], inputs[row]) and np.array_equal(alone_targets[0], targets[row])
    assert not np.array_equal(inputs[0], inputs[2])
    assert not np.array_equal(inputs, opened(2).train.batch(indices)[0])
    assert not np.array_equal(inputs[0], opened(1).held_out.batch(np.array([0]))[0][0])
    assert opened(1).digest == opened(1).digest != opened(2).digest


def test_synthetic_bits_are_fixed() -> None:
    inputs, _ = open_config(synthetic(), kind="language", sequence_length=6).train.batch(np.array([3]))
    features, labels = open_config(synthetic(features=2), kind="classifier").train.batch(np.array([3]))
    assert inputs.tolist() == [[23, 25, 27, 29, 31, 33]]
    assert [value.hex() for value in features[0].tolist()] == [
        "0x1.9269b80000000p-2",
        "-0x1.f9c6d40000000p-2",
    ] and labels.tolist() == [3]


# A user's own data

OWN_DATA = """
import numpy as np
from mlx_ring.data.sources import Dataset, DataSpec

class Zeros:
    def __init__(self, samples, dtype="float32"):
        self.samples, self.dtype = samples, dtype
    def __len__(self):
        return self.samples
    def batch(self, indices):
        return np.zeros((len(indices), 3), self.dtype), np.zeros(len(indices), np.int32)

def build(samples=10, kind="classifier", dtype="float32"):
    spec = DataSpec(kind=kind, input_shape=(3,), num_classes=2)
    return Dataset(spec=spec, digest="d", train=Zeros(samples, dtype), held_out=Zeros(2))

def wrong():
    return [1, 2]

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: Any, request: Any) -> str:
    name = f"own_data_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(OWN_DATA)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return name


def custom(import_path: str, **arguments: Any) -> CustomData:
    return CustomData(name="custom", prefetch=4, import_path=import_path, arguments=arguments)


def test_own_data_is_imported_from_the_current_folder(own_module: str) -> None:
    assert len(open_config(custom(f"{own_module}:build", samples=7), kind="classifier").train) == 7


@pytest.mark.parametrize(
    ("error", "name", "arguments", "message"),
    [
        (ConfigError, "absent", {}, "cannot be imported.*absent"),
        (ConfigError, "number", {}, "is a int; it must be a class or a function"),
        (ConfigError, "wrong", {}, "returned a list"),
        (ConfigError, "build", {"sample": 3}, r"does not take the arguments sample:"),
        (ConfigError, "build", {"kind": "language"}, "is of kind language.*of kind classifier"),
        (DataError, "build", {"samples": 0}, "a split without samples"),
        (DataError, "build", {"dtype": "float64"}, "inputs of shape.*float64.*float32"),
    ],
)
def test_own_data_that_does_not_fit_is_named(
    own_module: str, error: type[Exception], name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=f"data.import_path={own_module}:{name} .*{message}"):
        open_config(custom(f"{own_module}:{name}", **arguments), kind="classifier")


def test_an_absent_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no_such_module\.part:build cannot be imported.*no_such_module"):
        open_config(custom("no_such_module.part:build"), kind="classifier")


# Kinds


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            BundledData(name="digits", prefetch=4),
            "language",
            "data=digits .*classifier.*language; choose model=mlp",
        ),
        (
            tokens_config(Path("a.bin")),
            "classifier",
            "data=tokens .*language.*classifier; choose model=transformer",
        ),
        (synthetic(), "language", "data.sequence_length"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(config: BundledData, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_dataset(config, kind=kind, seed=0, sequence_length=None, files={})
