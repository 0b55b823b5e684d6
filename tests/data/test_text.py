"""Text is turned into tokens once, the same on every host; a mistake names its file and line."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import SUPPORT

from mlx_ring.config.choices import TextData, Tokenizer
from mlx_ring.data import bpe
from mlx_ring.data import text as text_module
from mlx_ring.data.bpe import LONGEST_TOKEN_BYTES, train_bpe
from mlx_ring.data.documents import BLOCK_BYTES, Document, find_documents
from mlx_ring.data.sources import Dataset, open_dataset, prepare
from mlx_ring.errors import ConfigError, DataError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of texts, written by `write`."""
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def write(folder: Path, **texts: str | bytes) -> Path:
    """Writes files by name; __ stands for the / after a folder."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def text_config(path: Path, cache: Path, **changes: Any) -> TextData:
    values: dict[str, Any] = {
        "sequence_length": None, "held_out_fraction": 0.25, "distribute": False, "pattern": "**/*.txt",
        "exclude": [], "tokenizer": Tokenizer["bytes"], "vocabulary_size": 300,
    }  # fmt: skip
    return TextData(name="text", prefetch=4, path=str(path), cache_dir=str(cache), **(values | changes))


def opened(config: TextData, sequence_length: int = 4) -> Dataset:
    return open_dataset(
        config, kind="language", seed=0, sequence_length=sequence_length, files=prepare(config)
    )


def stored(files: dict[str, Path]) -> tuple[dict[str, Any], np.ndarray]:
    side_car = json.loads(files["side_car"].read_text())
    return side_car, np.fromfile(files["tokens"], side_car["dtype"])


def byte_text(config: TextData) -> bytes:
    return stored(prepare(config))[1].tobytes()


# Bytes


def test_bytes_are_the_text_with_a_nul_between_documents(folder: Path, cache: Path) -> None:
    write(folder, b="zweite Größe\r\n", a="first", c__a="third", empty="")
    files = prepare(text_config(folder, cache))
    side_car, tokens = stored(files)
    expected = "first\0zweite Größe\r\n\0third".encode()
    assert tokens.tobytes() == expected
    assert side_car.pop("source") == "3 files of texts"
    assert side_car == {
        "format_version": 1,
        "dtype": "uint8",
        "vocabulary_size": 256,
        "vocabulary_sha256": hashlib.sha256(bytes(range(256))).hexdigest(),
        "tokens": len(expected),
        "sha256": hashlib.sha256(expected).hexdigest(),
        "bytes": len(expected),
        "tokenizer": "bytes",
    }
    dataset = opened(text_config(folder, cache))
    assert dataset.spec.num_classes == 256 and dataset.bytes_per_target == 1.0
    assert dataset.train.batch(np.array([0]))[0].tolist() == [list(b"firs")]


def test_a_text_longer_than_a_block_is_kept_whole(folder: Path, cache: Path) -> None:
    text = "é" + "x" * (BLOCK_BYTES - 4) + "€" * BLOCK_BYTES  # characters lie across the ends of blocks
    assert byte_text(text_config(write(folder, a=text), cache)) == text.encode()


@pytest.mark.parametrize(
    ("pattern", "exclude", "expected"),
    [
        ("**/*.txt", [], "a\0b\0c\0d"),
        ("*.txt", [], "a\0b"),
        ("sub/**/*.txt", [], "c\0d"),
        ("**/*.txt", ["sub/**"], "a\0b"),
        ("**/*.txt", ["**/deep/**", "b.txt"], "a\0c"),
        ("**", ["*.md"], "a\0b\0c\0d"),
    ],
)
def test_files_are_chosen_by_globs(
    folder: Path, cache: Path, pattern: str, exclude: list[str], expected: str
) -> None:
    write(folder, a="a", b="b", sub__c="c", sub__deep__d="d")
    (folder / "notes.md").write_text("not a text")
    config = text_config(folder, cache, pattern=pattern, exclude=exclude)
    assert byte_text(config) == expected.encode()


def test_a_link_to_a_parent_folder_repeats_nothing(folder: Path, cache: Path) -> None:
    write(folder, a="a", sub__b="b")
    (folder / "sub" / "loop").symlink_to(folder)
    assert byte_text(text_config(folder, cache)) == b"a\0b"


def test_one_file_may_have_any_name(folder: Path, cache: Path) -> None:
    (folder / "book.md").write_text("words")
    assert byte_text(text_config(folder / "book.md", cache)) == b"words"


def test_home_is_expanded(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(folder))
    write(folder, a="words")
    files = prepare(text_config(Path("~/a.txt"), Path("~/cache")))
    assert files["tokens"].parent == folder / "cache"


# The cache


def test_a_text_is_prepared_once(folder: Path, cache: Path) -> None:
    config = text_config(write(folder, a="some words"), cache)
    first = prepare(config)
    before = {name: path.stat().st_ino for name, path in first.items()}
    second = prepare(config)
    assert first == second and before == {name: path.stat().st_ino for name, path in second.items()}
    assert not list(cache.glob("*.preparing"))


def test_a_changed_text_never_gives_stale_tokens(folder: Path, cache: Path) -> None:
    config = text_config(write(folder, a="some words"), cache)
    old = opened(config)
    times = (folder / "a.txt").stat()
    write(folder, a="same size!")
    os.utime(folder / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert byte_text(config) == b"same size!" and opened(config).digest != old.digest


def test_equal_text_has_an_equal_digest_wherever_it_lies(tmp_path: Path) -> None:
    for host in ("one", "two"):
        write(tmp_path / host / "texts", a="the first text, " * 5, b="the second text, " * 5)
    digests: list[str] = []
    for tokenizer in Tokenizer:
        here, there = (
            opened(text_config(tmp_path / host / "texts", tmp_path / host / "cache", tokenizer=tokenizer))
            for host in ("one", "two")
        )
        assert here.digest == there.digest
        digests.append(here.digest)
    assert len(set(digests)) == len(digests)


def test_a_cached_file_that_was_damaged_is_made_again(folder: Path, cache: Path) -> None:
    config = text_config(write(folder, a="some words"), cache)
    files = prepare(config)
    for name, damage in (("tokens", b"some"), ("side_car", b"{")):
        files[name].write_bytes(damage)
        assert byte_text(config) == b"some words"
    files["tokens"].with_suffix(".preparing").mkdir()  # as a killed run leaves it
    files["side_car"].unlink()
    assert byte_text(config) == b"some words"


def test_a_failed_preparation_leaves_nothing_behind(folder: Path, cache: Path) -> None:
    with pytest.raises(DataError):
        prepare(text_config(write(folder, a="good", b=b"bad \xff"), cache))
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])


PREPARE = """
import sys
import time
from pathlib import Path
sys.path[:0] = {support!r}
from test_text import Tokenizer, prepare, text_config
print("ready", flush=True)
sys.stdin.readline()
files = prepare(text_config(Path({folder!r}), Path({cache!r}), tokenizer=Tokenizer["bpe"]))
print(files["tokens"].stat().st_ino, files["tokenizer"].stat().st_ino)
"""


def test_processes_that_start_together_prepare_once(folder: Path, cache: Path) -> None:
    write(folder, a="the cat sat on the mat\n" * 2000)
    code = PREPARE.format(
        support=[str(SUPPORT), str(Path(__file__).parent)], folder=str(folder), cache=str(cache)
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    made = {process.communicate()[0] for process in processes}
    assert len(made) == 1 and all(process.returncode == 0 for process in processes)


# BPE


def decoded(files: dict[str, Path]) -> list[str]:
    """The documents, decoded from the tokens with the saved tokenizer."""
    from tokenizers import Tokenizer as BPETokenizer

    tokenizer: Any = BPETokenizer.from_file(str(files["tokenizer"]))
    _, tokens = stored(files)
    separators = np.flatnonzero(tokens == tokenizer.token_to_id("<|end_of_text|>"))
    parts = np.split(tokens, separators)
    ids = [parts[0], *(part[1:] for part in parts[1:])]
    return [tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in ids]


def test_bpe_gives_back_every_document(folder: Path, cache: Path) -> None:
    texts = [
        "the cat sat on the mat, the cat sat\n" * 200,
        "Größe, 猫 and 🎉 with <|end_of_text|> inside\r\n\ttabs  and   spaces ",
        "one line without an end " * (BLOCK_BYTES // 5),
    ]
    config = text_config(write(folder, a=texts[0], b=texts[1], c=texts[2]), cache, tokenizer=Tokenizer["bpe"])
    files = prepare(config)
    assert decoded(files) == texts
    side_car, tokens = stored(files)
    assert side_car["dtype"] == "uint16" and 257 < side_car["vocabulary_size"] <= 300
    assert side_car["vocabulary_sha256"] == hashlib.sha256(files["tokenizer"].read_bytes()).hexdigest()
    assert side_car["bytes"] == sum(len(text.encode()) for text in texts) + 2
    assert len(tokens) < side_car["bytes"] / 2


def test_bytes_per_target_counts_the_held_out_text(folder: Path, cache: Path) -> None:
    """The end of the text has shorter tokens than the rest, so the mean of the whole would be wrong."""
    texts = {"a": "the cat sat on the mat " * 300, "b": "Qj%7 zK!2 wX#9 pV&4 " * 20}
    config = text_config(write(folder, **texts), cache, tokenizer=Tokenizer["bpe"], held_out_fraction=0.1)
    files = prepare(config)
    side_car, tokens = stored(files)
    from tokenizers import Tokenizer as BPETokenizer

    tokenizer: Any = BPETokenizer.from_file(str(files["tokenizer"]))
    targets = tokens[len(tokens) - round(len(tokens) * 0.1) + 1 :].tolist()
    expected = len(tokenizer.decode(targets).encode()) / len(targets)
    dataset = opened(config)
    assert dataset.bytes_per_target == pytest.approx(expected)
    assert abs(expected - side_car["bytes"] / side_car["tokens"]) > 0.1
    counted = dataset.held_out.batch(np.arange(len(dataset.held_out)))[1]
    assert (counted >= 0).sum() == len(targets)


def test_bpe_settings_are_part_of_the_cache_name(folder: Path, cache: Path) -> None:
    write(folder, a="the cat sat on the mat, a cat and a mat\n" * 50)
    names = {
        prepare(text_config(folder, cache, tokenizer=Tokenizer[tokenizer], vocabulary_size=size))["tokens"]
        for tokenizer, size in (("bpe", 260), ("bpe", 270), ("bytes", 260), ("bytes", 270))
    }
    assert len(names) == 3


def test_a_missing_tokenizers_package_names_the_extra(folder: Path, cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    config = text_config(write(folder, a="words"), cache, tokenizer=Tokenizer["bpe"])
    with pytest.raises(ConfigError, match=r"data\.tokenizer=bpe.*mlx-ring\[text\]"):
        prepare(config)


# What a killed preparation has finished

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {support!r}
from test_text import Tokenizer, prepare, text_config
from mlx_ring.data import text as text_module
text_module.JOURNAL_SECONDS = 0
append, left = text_module._Encoded.append, [{blocks}]
def until_killed(self, block):
    append(self, block)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
text_module._Encoded.append = until_killed
prepare(text_config(Path({folder!r}), Path({cache!r}), tokenizer=Tokenizer[{tokenizer!r}]))
"""


@pytest.mark.parametrize(
    ("tokenizer", "damaged", "trains", "goes_on"),
    [
        ("bpe", "", False, True),
        ("bpe", "bin", False, False),
        ("bpe", "tokenizer.json", True, True),
        ("bpe", "journal.json", True, False),
        ("bytes", "", False, True),
    ],
)
def test_a_killed_preparation_is_continued(
    folder: Path, cache: Path, monkeypatch: Any, tokenizer: str, damaged: str, trains: bool, goes_on: bool
) -> None:
    write(folder, a="the cat sat on the mat\n" * 20_000, b="the moon, Größe\n" * 9_000)
    code = KILLED.format(
        support=[str(SUPPORT), str(Path(__file__).parent)],
        blocks=7,
        folder=str(folder),
        cache=str(cache),
        tokenizer=tokenizer,
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = cache.glob("*.preparing")
    if damaged:
        (path,) = left.glob(f"*{damaged}")
        path.write_bytes(b"x" + path.read_bytes()[1:])
    done: dict[str, int] = {"trained": 0, "encoded": 0}
    train, append = text_module.train_bpe, text_module._Encoded.append

    def counted(name: str, act: Any) -> Any:
        def call(*arguments: Any) -> Any:
            done[name] += 1
            return act(*arguments)

        return call

    monkeypatch.setattr(text_module, "train_bpe", counted("trained", train))
    monkeypatch.setattr(text_module._Encoded, "append", counted("encoded", append))
    continued = prepare(text_config(folder, cache, tokenizer=Tokenizer[tokenizer]))
    assert done["trained"] == trains and not left.exists()
    encoded = done["encoded"]
    done["encoded"] = 0
    undisturbed = prepare(text_config(folder, cache / "new", tokenizer=Tokenizer[tokenizer]))
    assert encoded == done["encoded"] - (7 if goes_on else 0)
    for name, path in undisturbed.items():
        assert continued[name].read_bytes() == path.read_bytes(), name


# Long words


def seconds_to_train(folder: Path, name: str, content: bytes) -> float:
    """The processor time of training a tokenizer on this text."""
    path = folder / f"{name}.txt"
    path.write_bytes(content)
    document = Document(path, len(content), hashlib.sha256(content).hexdigest())
    start = time.process_time()
    tokenizer = train_bpe([document], 2000)
    seconds = time.process_time() - start
    assert tokenizer.get_vocab_size() == 2000
    assert max(map(len, tokenizer.get_vocab())) <= LONGEST_TOKEN_BYTES
    return seconds


def test_text_without_spaces_trains_about_as_fast_as_words(folder: Path) -> None:
    random = np.random.default_rng(0)
    size = 600_000
    letters = np.frombuffer(b"ACGT", np.uint8)[random.integers(0, 4, size)].tobytes()
    words = ["".join(map(chr, random.integers(97, 123, 1 + random.poisson(6)))) for _ in range(20_000)]
    text = " ".join(words[index % 20_000] for index in random.zipf(1.2, size // 4)).encode()[:size]
    assert seconds_to_train(folder, "letters", letters) < 8 * seconds_to_train(folder, "words", text)


def test_long_runs_give_no_longer_tokens(folder: Path) -> None:
    seconds_to_train(folder, "rules", b"\n".join(b"%d " % n + b"=" * 5000 for n in range(3000)))


def test_a_limited_amount_of_long_words_is_learnt_from(folder: Path, monkeypatch: Any) -> None:
    write(folder, a="ACGT" * 50_000, b="QWQW" * 50_000 + "\n" + "the cat sat on the mat\n" * 100)
    documents = find_documents(text_config(folder, folder))
    everything = train_bpe(documents, 300).get_vocab()
    monkeypatch.setattr(bpe, "LONG_WORD_CHARACTERS", 100_000)
    limited = train_bpe(documents, 300).get_vocab()
    assert "QW" in everything and "QW" not in limited
    assert {"AC", "at"} <= limited.keys()


# Errors


@pytest.mark.parametrize("tokenizer", list(Tokenizer))
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"good\nline \xff bad", "line 2: byte 0xff"),
        (b"good\n\nthe end is cut \xc3", "line 3: byte 0xc3"),
        (b"a\n" * BLOCK_BYTES + b"\xed\xa0\x80", f"line {BLOCK_BYTES + 1}: byte 0xed"),
        (b"a\nb\nc\0", "line 3: a NUL byte"),
        (b"a\n" * BLOCK_BYTES + b"\0", f"line {BLOCK_BYTES + 1}: a NUL byte"),
    ],
)
def test_what_is_not_text_is_named_by_file_and_line(
    folder: Path, cache: Path, content: bytes, line: str, tokenizer: Tokenizer
) -> None:
    write(folder, a="good", b=content)
    with pytest.raises(DataError, match=rf"b\.txt, {line}"):
        prepare(text_config(folder, cache, tokenizer=tokenizer))


def test_no_text_is_named_by_path_and_pattern(folder: Path, cache: Path) -> None:
    write(folder, empty="")
    with pytest.raises(DataError, match=r"texts holds no text.*data\.pattern=\*\*/\*\.txt"):
        prepare(text_config(folder, cache))
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        prepare(text_config(folder / "empty.txt", cache))
    with pytest.raises(DataError, match=r"data\.path=.*absent does not exist"):
        prepare(text_config(folder / "absent", cache))


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = text_config(write(folder, a="words"), tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*file/cache.*data\.cache_dir"):
        prepare(config)


def test_text_is_for_language_models(folder: Path, cache: Path) -> None:
    config = text_config(write(folder, a="words"), cache)
    with pytest.raises(ConfigError, match=r"data=text .*classifier; choose model=transformer"):
        open_dataset(config, kind="classifier", seed=0, sequence_length=None, files=prepare(config))


# Memory

LARGE_TEXT = """
import resource, sys
from pathlib import Path
sys.path[:0] = {support!r}
from test_text import Tokenizer, prepare, text_config
prepare(text_config(Path({small!r}), Path({cache!r}), tokenizer=Tokenizer[{tokenizer!r}]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(text_config(Path({large!r}), Path({cache!r}), tokenizer=Tokenizer[{tokenizer!r}]))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(growth * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    ("tokenizer", "size_bytes", "most_bytes"),
    [("bytes", 200e6, 30e6), pytest.param("bpe", 20e6, 100e6, marks=pytest.mark.long)],
)
def test_a_large_text_is_prepared_in_little_memory(
    folder: Path, cache: Path, tokenizer: str, size_bytes: float, most_bytes: float
) -> None:
    line = "the cat sat on the mat and looked at the moon\n"
    write(folder, small=line, large=line * round(size_bytes / len(line)))
    small, large = str(folder / "small.txt"), str(folder / "large.txt")
    code = LARGE_TEXT.format(
        support=[str(SUPPORT), str(Path(__file__).parent)],
        small=small,
        large=large,
        cache=str(cache),
        tokenizer=tokenizer,
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) < most_bytes
