"""The files of a text: which they are, a hash of each, and reading them in blocks."""

import codecs
import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_ring.cluster.rank.progress import advance, working
from mlx_ring.config.choices import TextData
from mlx_ring.config.rules import expand_home
from mlx_ring.errors import DataError

BLOCK_BYTES = 1 << 16  # text that is read at once
HASHED_BYTES = 1 << 20  # a file is hashed in blocks of this size


@dataclass(frozen=True)
class Document:
    """A file of text, with the size and the SHA-256 (hex) that it had when it was found."""

    path: Path
    size_bytes: int
    sha256: str


def find_documents(config: TextData) -> list[Document]:
    """Returns the files of text, ordered by their paths below `data.path`, without empty and hidden files.

    Raises: DataError, with the path and the pattern, if there are none or one cannot be read.
    """
    root = expand_home("data.path", config.path)
    if root.is_dir():
        excluded = {path for pattern in config.exclude for path in _matches(root, pattern)}
        names = sorted(_matches(root, config.pattern) - excluded, key=lambda name: Path(name).parts)
        # A link to a parent folder gives every file many names; each file counts once, by its first name.
        first_names = {(root / name).resolve(): root / name for name in reversed(names)}
        paths = list(reversed(first_names.values()))
    elif root.is_file():
        paths = [root]
    else:
        raise DataError(f"data.path={root} does not exist; give a text file or a folder of them")
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    with working("hashing text", total=sum(sizes.values())):
        documents = [Document(path, size, _sha256(path)) for path, size in sizes.items() if size]
    if not documents:
        what = f"no text in files that match data.pattern={config.pattern}" if root.is_dir() else "no text"
        raise DataError(f"data.path={root} holds {what}; give a text file, or a folder and a fitting pattern")
    return documents


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASHED_BYTES):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def joined(documents: list[Document], read: Callable[[Document], Iterator[str]]) -> Iterator[str | None]:
    """Yields the blocks of all documents, as `read` gives them, and None between two documents."""
    for index, document in enumerate(documents):
        if index:
            yield None
        yield from read(document)


def read_text(document: Document) -> Iterator[str]:
    """Yields the document's text in blocks of about 64 KiB.

    Raises: DataError, with the file and the line, for a byte that is NUL or not UTF-8; DataError, with the
    file, if it changed after it was found.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    sha256 = hashlib.sha256()
    line = 1
    with document.path.open("rb") as file:
        more = True
        while more:
            block = file.read(BLOCK_BYTES)
            sha256.update(block)
            advance(len(block))
            more = bool(block)
            try:
                text = decoder.decode(block, final=not more)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                byte = error.object[error.start]
                raise DataError(
                    f"{document.path}, line {line}: byte 0x{byte:02x} is not UTF-8 ({error.reason}); "
                    "convert the file, or leave it out with data.exclude"
                ) from error
            if (nul := text.find("\0")) >= 0:
                line += text.count("\n", 0, nul)
                raise DataError(
                    f"{document.path}, line {line}: a NUL byte, so not a text; leave it out with data.exclude"
                )
            line += text.count("\n")
            yield text
    if sha256.hexdigest() != document.sha256:
        raise DataError(f"{document.path} changed while it was read; start again when it is complete")


def read_lines(document: Document) -> Iterator[str]:
    """Yields the document's text in blocks that end at a line end, if there is one: few words are cut."""
    rest = ""
    for text in read_text(document):
        rest += text
        cut = rest.rfind("\n") + 1 or (len(rest) if len(rest) > BLOCK_BYTES else 0)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _matches(root: Path, pattern: str) -> set[str]:
    # Not Path.glob: before Python 3.13 it finds only folders for a pattern that ends in **.
    return set(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
