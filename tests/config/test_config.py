"""The composed configuration: what is accepted, refused and saved, and what a resumed run may change."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from ranks import train

from mlx_ring.config import parser as config_parser
from mlx_ring.config.choices import CHOICES
from mlx_ring.config.compose import CONF, compose_run, register_look_ups, usual_codec
from mlx_ring.config.parser import nearest_key
from mlx_ring.config.redaction import redact, to_yaml
from mlx_ring.config.resume_rules import refuse_changes
from mlx_ring.config.run_config import SECTIONS, RunConfig
from mlx_ring.errors import ConfigError


def composed(*overrides: str) -> DictConfig:
    register_look_ups()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["run.dir=run", *overrides])


def parse(*overrides: str) -> RunConfig:
    return config_parser.parse(composed(*overrides))


# Accepted


def test_the_default_run() -> None:
    config = parse()
    assert (config.model.name, config.data.name, config.optimizer.name) == ("mlp", "digits", "adamw")
    assert (config.schedule.name, config.strategy.name, config.communicator.name) == (
        "cosine",
        "all_reduce",
        usual_codec(),
    )
    assert config.trainer.steps == 600 and config.trainer.num_micro_batches == 8
    assert config.checkpoint.resume == "auto" and config.trainer.split.name == "even"
    assert config.kind.name == "classifier" and config.cluster.ranks is None


@pytest.mark.parametrize("group", ["model", "data", "optimizer", "schedule", "strategy", "communicator"])
def test_every_choice_has_a_file_and_every_file_a_choice(group: str) -> None:
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(CHOICES[group])


def test_an_experiment_fills_in_whole_groups() -> None:
    config = compose_run("experiment=text_small", "run.dir=run")
    assert config.model.name == "transformer" and config.model.size.name == "small" and config.model.tie_head
    assert config.trainer.compute_dtype.name == "bfloat16" and config.kind.name == "language"
    assert Path(config.data.path, "os.py").is_file()


@pytest.mark.parametrize(
    ("size", "overrides", "expected"),
    [
        ("tiny", [], (2, 96, 4, 2, 256, 64)),
        ("small", [], (6, 384, 6, 6, 1024, 256)),
        ("gpt2_124m", [], (12, 768, 12, 12, 2048, 1024)),
        ("tiny", ["model.layers=3", "model.max_sequence_length=32"], (3, 96, 4, 2, 256, 32)),
    ],
)
def test_a_size_fills_only_what_is_left_open(
    size: str, overrides: list[str], expected: tuple[int, ...]
) -> None:
    model = parse("model=transformer", "data=synthetic", f"model.size={size}", *overrides).model
    names = ("layers", "dimensions", "heads", "kv_heads", "hidden_dimensions", "max_sequence_length")
    assert tuple(getattr(model, name) for name in names) == expected


def test_values_may_refer_to_one_another() -> None:
    assert parse("trainer.micro_batch_size=${trainer.global_batch_size}").trainer.num_micro_batches == 1
    assert parse("checkpoint.every_steps=${trainer.steps}").checkpoint.every_steps == 600


# Refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=-1"], r"seed must be an integer in \[0, 2\*\*32\); got -1"),
        (["seed=true"], "seed must be an integer .* got True"),
        (["trainer.max_skipped_batches=0"], "trainer.max_skipped_batches must be at least 1; got 0"),
        (
            ["trainer.clip_gradient_norm=inf"],
            "trainer.clip_gradient_norm must be a finite number above 0; got inf",
        ),
        (["trainer.split=random"], "trainer.split: Invalid value 'random', expected one of"),
        (["communicator.verify_every_steps=0"], "communicator.verify_every_steps must be null or at least 1"),
        (
            ["communicator=exact", "trainer.global_batch_size=8194", "trainer.micro_batch_size=2"],
            "trainer.global_batch_size must be at most 4096 micro-batches .*; got 4097",
        ),
        (["model.hidden_sizes=[8,0]"], r"model.hidden_sizes must be positive; got \[8, 0\]"),
        (["model.dropout=1"], r"model.dropout must be in \[0, 1\); got 1"),
        (["model=cnn", "model.channels=[]"], "model.channels must be one or more positive numbers"),
        (
            ["model=transformer", "model.heads=5"],
            "model.dimensions must be an even multiple of model.heads=5; got 96",
        ),
        (["model=transformer", "model.kv_heads=3"], "model.kv_heads must be a divisor of heads=4; got 3"),
        (["model=transformer", "model.layers=0"], "model.layers must be at least 1; got 0"),
        (
            ["model=custom", "model.import_path=a.b"],
            "model.import_path must be of the form package.module:name",
        ),
        (
            ["data=custom", "data.import_path=a b:c"],
            "data.import_path must be of the form package.module:name",
        ),
        (["data=synthetic", "data.classes=1"], "data.classes must be at least 2; got 1"),
        (
            ["data=text", "data.path=t", "data.vocabulary_size=256"],
            "data.vocabulary_size must be at least 257",
        ),
        (
            ["data=tokens", "data.path=t", "data.held_out_fraction=0"],
            r"data.held_out_fraction must be in \(0, 1\)",
        ),
        (["data.prefetch=0"], "data.prefetch must be at least 1; got 0"),
        (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers"),
        (["optimizer.eps=0"], "optimizer.eps must be a finite number above 0"),
        (
            ["optimizer.weight_decay=-1"],
            "optimizer.weight_decay must be a finite number of at least 0; got -1",
        ),
        (
            ["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"],
            "optimizer.nesterov=true needs",
        ),
        (["optimizer=muon", "optimizer.adam_learning_rate=nan"], "optimizer.adam_learning_rate .* got nan"),
        (["schedule.warmup_steps=-1"], "schedule.warmup_steps must be at least 0; got -1"),
        (["schedule.final_fraction=2"], r"schedule.final_fraction must be in \[0, 1\]; got 2"),
        (["schedule=wsd", "schedule.decay_steps=0"], "schedule.decay_steps must be null or at least 1"),
        (["communicator.bucket_bytes=1"], "communicator.bucket_bytes must be between 4096 and"),
        (["memory.limit_bytes=-1"], "memory.limit_bytes must be null or at least 0 bytes; got -1"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps must be null or above 0; got 0"),
        (["checkpoint.keep_best=-1"], "checkpoint.keep_best must be at least 0; got -1"),
        (["checkpoint.max_failures=0"], "checkpoint.max_failures must be at least 1; got 0"),
        (["checkpoint.copies=every_rank"], "checkpoint.copies: Invalid value 'every_rank'"),
        (["evaluation.micro_batch_size=0"], "evaluation.micro_batch_size must be null or at least 1; got 0"),
        (["metrics.log_every_steps=0"], "metrics.log_every_steps must be at least 1; got 0"),
        (["cluster.ranks=0"], "cluster.ranks must be null or at least 1; got 0"),
        (["trainer.steps=???"], "trainer.steps has no value; give it on the command line: trainer.steps=…"),
        (
            ["trainer.steps=${trainer.stepz}"],
            "trainer.steps refers to a key that does not exist: .*trainer.stepz",
        ),
        (
            ["trainer.steps=${seed}", "seed=${trainer.steps}"],
            "trainer.steps cannot be resolved: Recursive|seed cannot",
        ),
        (["+model._target_=os.system"], "model._target_ is refused"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_out_of_range_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse(*overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a\0b", "", "n" * 201])
def test_a_run_directory_has_a_name(name: str) -> None:
    whole = composed()
    whole.run.dir = name
    with pytest.raises(ConfigError, match=r"run\.dir must be a path whose last part has 1 to 200 characters"):
        config_parser.parse(whole)


@settings(deadline=None, max_examples=40)
@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@example("${")
def test_any_value_of_any_section_is_taken_or_refused_in_one_line(value: Any) -> None:
    whole = BASE.copy()
    OmegaConf.set_struct(whole, False)
    for section in ("trainer", "model", "run"):
        try:
            whole[section] = value
        except GrammarParseError:  # such as `${`: OmegaConf itself refuses the value
            return
        try:
            config_parser.parse(whole)
        except ConfigError as refused:
            assert "\n" not in str(refused).strip()


BASE = composed()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trainer.step", "did you mean trainer.steps?"),
        ("trainer.batch_size", "did you mean trainer.micro_batch_size?"),
        ("modle.dropout", "did you mean model.dropout?"),
        ("steps", "did you mean trainer.steps?"),
        ("optimizer.momentum", "known: optimizer.betas, optimizer.eps"),
        ("communicator.backends", "did you mean communicator.backend?"),
        ("trainre", "did you mean trainer?"),
        ("zzz", "known: checkpoint, cluster, communicator, data,"),
        ("zzz.yyy", "known: checkpoint, cluster, communicator, data,"),
    ],
)
def test_the_nearest_key_is_told(key: str, hint: str) -> None:
    assert nearest_key(key, BASE).startswith(hint)


# Saved


SECRETS = [
    "api_key",
    "apiKey",
    "password",
    "db_passwd",
    "passphrase",
    "HF_TOKEN",
    "client_secret",
    "credentials",
    "key",
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_nowhere_in_the_record(name: str) -> None:
    config = parse(
        "data=custom",
        "data.import_path=a:b",
        f"+data.arguments={{{name}: hunter2, list: [{{{name}: hunter2}}]}}",
    )
    assert config.data.arguments[name] == "hunter2"
    assert "hunter2" not in to_yaml(config.redacted) and "<redacted>" in to_yaml(config.redacted)


@pytest.mark.parametrize("argument", ["max_tokens: 5", "key_gain: 1.5", "author: null"])
def test_a_number_is_no_key_and_no_token(argument: str) -> None:
    config = parse("data=custom", "data.import_path=a:b", f"+data.arguments={{{argument}}}")
    assert argument in to_yaml(config.redacted)
    assert f"data.arguments.{argument.split(':')[0]}" in config.flat()


def test_a_number_may_be_a_password() -> None:
    config = parse("data=custom", "data.import_path=a:b", "+data.arguments={password: 271828}")
    assert "271828" not in to_yaml(config.redacted) and 271828 not in config.flat().values()


@pytest.mark.parametrize("name", ["tokens", "tokenizer", "tokenization", "monkeys"])
def test_what_only_looks_like_a_secret_is_recorded(name: str) -> None:
    config = parse("data=custom", "data.import_path=a:b", f"+data.arguments={{{name}: hunter2}}")
    assert "hunter2" in to_yaml(config.redacted) and "hunter2" in config.flat().values()


def test_secrets_are_not_compared_between_ranks() -> None:
    config = parse("data=custom", "data.import_path=a:b", "+data.arguments={api_key: hunter2, size: 3}")
    assert config.flat()["data.arguments.size"] == 3
    assert "hunter2" not in str(config.flat())


def test_an_environment_look_up_stays_one_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RING_TEST_VALUE", "hunter2")
    config = parse(
        "data=custom", "data.import_path=a:b", "+data.arguments={where: '${oc.env:MLX_RING_TEST_VALUE}'}"
    )
    assert config.data.arguments == {"where": "hunter2"}
    text = to_yaml(config.redacted)
    assert "hunter2" not in text and "${oc.env:MLX_RING_TEST_VALUE}" in text


def test_the_record_can_be_read_back() -> None:
    config = parse("model=transformer", "data=synthetic")
    again = OmegaConf.create(to_yaml(config.redacted))
    assert isinstance(again, DictConfig) and redact(again) == config.redacted
    assert config_parser.parse(again).flat() == config.flat()


def test_what_may_differ_between_hosts_is_not_compared() -> None:
    here, there = (
        parse("data=fashion_mnist", f"data.path={path}", f"data.cache_dir={path}") for path in "ab"
    )
    assert here.flat() == there.flat()
    assert parse("seed=1").flat() != here.flat()


# A resumed run


MAY_CHANGE = [
    "trainer.steps=9", "trainer.split=even", "run.dir=elsewhere", "cluster=mpi", "cluster.ranks=2",
    "metrics.log_every_steps=1", "metrics.console=false", "checkpoint.every_steps=7",
    "checkpoint.keep_last=9",
    "checkpoint.resume=run", "evaluation.every_steps=7", "evaluation.only=true", "memory.limit_bytes=1000000",
    "memory.activation_checkpointing=true", "communicator.backend=ring", "communicator.overlap=true",
    "communicator.bucket_bytes=4096",
]  # fmt: skip
MAY_NOT_CHANGE = {
    "seed=1": "seed is 1 now and was 0",
    "trainer.global_batch_size=256": "trainer.global_batch_size is 256 now and was 128",
    "trainer.micro_batch_size=8": "trainer.micro_batch_size is 8 now and was 16",
    "trainer.clip_gradient_norm=null": "trainer.clip_gradient_norm is None now and was 1.0",
    "trainer.compute_dtype=bfloat16": "trainer.compute_dtype is bfloat16 now and was float32",
    "trainer.loss=a:b": "trainer.loss is a:b now and was cross_entropy",
    "model=cnn": "model.name is cnn now and was mlp",
    "model.hidden_sizes=[1]": r"model.hidden_sizes is \[1\] now and was \[256, 128\]",
    "data=synthetic": "data.name is synthetic now and was digits",
    "optimizer=sgd": "optimizer.name is sgd now and was adamw",
    "optimizer.learning_rate=1": "optimizer.learning_rate is 1 now and was 0.001",
    "schedule.warmup_steps=3": "schedule.warmup_steps is 3 now and was 0",
    "communicator=bf16": f"communicator.name is bf16 now and was {usual_codec()}",
}


@pytest.mark.parametrize("override", MAY_CHANGE)
def test_a_resumed_run_may_change(override: str) -> None:
    refuse_changes(parse().redacted, parse(override).redacted)


def test_the_list_of_what_a_resumed_run_may_change_is_whole() -> None:
    """MAY_CHANGE tries every section and every key that a resumed run may change, and nothing else."""
    tried = {re.split("[.=]", override)[0] for override in MAY_CHANGE}
    assert tried == set(SECTIONS) | {"communicator"}
    both = {
        override.partition("=")[0]
        for override in MAY_CHANGE
        if override.startswith(("trainer", "communicator"))
    }
    assert both == {f"trainer.{key}" for key in ("steps", "split")} | {
        f"communicator.{key}" for key in ("backend", "overlap", "bucket_bytes")
    }


@pytest.mark.parametrize("override", MAY_NOT_CHANGE)
def test_a_resumed_run_may_not_change(override: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{MAY_NOT_CHANGE[override]} when the checkpoint was saved; .*initialize_from"
    ):
        refuse_changes(parse().redacted, parse(override).redacted)


def test_data_may_move() -> None:
    before, after = (parse("data=tokens", f"data.path={path}").redacted for path in "ab")
    refuse_changes(before, after)


def test_a_field_of_a_later_version_ends_no_run() -> None:
    before, after = parse().redacted, copy.deepcopy(parse().redacted)
    after["trainer"]["later"] = 3
    refuse_changes(before, after)


@pytest.mark.parametrize("arguments", ["{}", "{size: 3}"])
def test_a_new_argument_of_ones_own_part_is_a_change(arguments: str) -> None:
    own = ("data=custom", "data.import_path=a:b")
    before = parse(*own, f"+data.arguments={arguments}").redacted
    after = parse(*own, "+data.arguments={size: 3, width: 5}").redacted
    with pytest.raises(ConfigError, match=r"data\.arguments\S* is .* now and was"):
        refuse_changes(before, after)


# A secret in a real run


OWN_DATA = "from mlx_ring.data.images import open_digits\n\ndef build(api_key):\n    return open_digits()\n"


@pytest.mark.ranks
@pytest.mark.parametrize("arguments", ["{api_key: hunter2}", "{api_key: hunter2, more: 1}"])
def test_a_secret_is_in_no_file_of_a_run(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "own.py").write_text(OWN_DATA)
    own = ["data=custom", "data.import_path=own:build", f"data.arguments={arguments}"]
    ranks = train(tmp_path, *own, "metrics.tensorboard=true", "metrics.log_every_steps=1")
    assert ranks.statuses == ([2] if "more" in arguments else [0]), ranks.report()
    assert "hunter2" not in ranks.report()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"hunter2" in path.read_bytes()]
