"""The data of one rank: found or made on its host, or received from rank 0, then opened and loaded."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

from mlx_ring.cluster.rank.progress import advance, working
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.rules import expand_home
from mlx_ring.data.loader import Loader
from mlx_ring.data.sources import Dataset, open_dataset, prepare
from mlx_ring.errors import ConfigError, DataError, MlxRingError, agreed
from mlx_ring.run_directory.whole_file import whole_file

CHUNK_BYTES = 32 * 2**20  # of a file that rank 0 sends


class DataManager:
    """Holds the data set that `open` opened on this rank, and builds the loader of this rank's part."""

    def __init__(self, dataset: Dataset, *, seed: int, prefetch: int) -> None:
        """Stores an open data set.

        Args:
            dataset: the same on every rank.
            seed: decides the order of samples.
            prefetch: global batches that a loader prepares ahead.
        """
        self.dataset = dataset
        self._seed = seed
        self._prefetch = prefetch

    @classmethod
    def open(
        cls,
        config: Any,
        communicator: Communicator,
        *,
        kind: str,
        seed: int,
        model_maximum: int | None,
        targets_are_classes: bool,
    ) -> Self:
        """Opens the same data set on every rank. Collective: every rank must call.

        With `data.distribute=true`, ranks that have other data, or none, first receive rank 0's files.

        Args:
            config: the `data` group.
            communicator: joins the ranks.
            kind: "classifier" or "language", as in `DataSpec`.
            seed: of generated data, of the split and of the order.
            model_maximum: the most tokens that a sample may have; None if the model sets no limit.
            targets_are_classes: whether to refuse, when it is drawn, a target that is no class.

        Raises:
            ConfigError, DataError: the data is absent or damaged, or does not fit; the same on every rank.
        """
        opener = _Opener(config, communicator, kind=kind, seed=seed)
        with working(f"opening the data ({getattr(config, 'import_path', config.name)})"):
            dataset, error = opener.attempt(lambda: opener.prepare_files(model_maximum))
        if getattr(config, "distribute", False) and communicator.world_size > 1:
            communicator.agree_on_error(error if communicator.rank == 0 else None)
            dataset, error = opener.receive_missing(dataset)
        communicator.agree_on_error(error)
        assert dataset is not None
        dataset = dataset.checked() if targets_are_classes else dataset
        return cls(dataset, seed=seed, prefetch=config.prefetch)

    def loader(
        self, *, global_batch_size: int, micro_batch_size: int, micro_batches: range, next_sample: int
    ) -> Loader:
        """A loader of this rank's micro-batches of every global batch.

        Args:
            global_batch_size: samples of a global batch, over all ranks.
            micro_batch_size: samples of a micro-batch.
            micro_batches: the indices of this rank's micro-batches within a global batch.
            next_sample: the global position of the first sample to draw.

        Raises:
            DataError: there are fewer samples than a global batch has; the same on every rank.
        """
        try:
            return Loader(
                self.dataset.train,
                seed=self._seed,
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                micro_batches=micro_batches,
                next_sample=next_sample,
                prefetch=self._prefetch,
            )
        except DataError as error:
            raise agreed(error) from None


class _Opener:
    """Finds, makes or receives the files of a data set, and opens it."""

    def __init__(self, config: Any, communicator: Communicator, *, kind: str, seed: int) -> None:
        self._config = config
        self._communicator = communicator
        self._kind = kind
        self._seed = seed
        self._sequence_length: int | None = None
        self._files: dict[str, Path] = {}

    def prepare_files(self, model_maximum: int | None) -> dict[str, Path]:
        """This host's own files, made if they are not there yet."""
        self._sequence_length = _sequence_length(self._config, model_maximum)
        self._files = prepare(self._config)
        return self._files

    def attempt(self, find: Callable[[], dict[str, Path]]) -> tuple[Dataset | None, MlxRingError | None]:
        """Opens the data in the files that `find` gives. Returns it, or what is wrong with them."""
        try:
            files = find()
            return open_dataset(
                self._config,
                kind=self._kind,
                seed=self._seed,
                sequence_length=self._sequence_length,
                files=files,
            ), None
        except (ConfigError, DataError) as error:
            return None, error
        except OSError as error:
            return None, DataError(f"the data cannot be read: {error}; mend the file or its permissions")

    def _cache(self) -> tuple[Path, ConfigError | None]:
        """Returns the folder for files that are received; the error if its home folder is not known."""
        try:
            return expand_home("data.cache_dir", self._config.cache_dir), None
        except ConfigError as error:
            return Path(), error

    def receive_missing(self, dataset: Dataset | None) -> tuple[Dataset | None, MlxRingError | None]:
        """Sends rank 0's files to every rank that holds other data, or none.

        Collective: every rank must call, with the data set that it opened by itself. Returns what `attempt`
        returns.
        """
        communicator = self._communicator
        digest = communicator.broadcast_object(dataset.digest if dataset and communicator.rank == 0 else None)
        names = communicator.broadcast_object({name: path.name for name, path in self._files.items()})
        cache, home = self._cache()
        communicator.agree_on_error(home)
        folder = cache / f"received-{digest[:16]}"
        files = {name: folder / filename for name, filename in names.items()}
        if dataset is None or dataset.digest != digest:
            dataset, _ = self.attempt(lambda: files)  # an earlier run may have received them
        lacks = dataset is None or dataset.digest != digest
        if not any(communicator.gather_objects(lacks)):
            return dataset, None
        error: OSError | None = None
        own = self._files.values() if communicator.rank == 0 else []
        sizes = communicator.broadcast_object([path.stat().st_size for path in own])
        with working("sending rank 0's data to other hosts", total=sum(sizes), computes=False):
            for name, path in files.items():
                error = self._send(name, path if lacks and error is None else None) or error
        if error is not None:
            return None, DataError(f"{folder} cannot hold what rank 0 sent: {error.strerror}; make room")
        return self.attempt(lambda: files) if lacks else (dataset, None)

    def _send(self, name: str, target: Path | None) -> OSError | None:
        """Rank 0 sends one of its files to all ranks. A rank with a `target` writes it, whole or not at all.

        Returns: the error that kept this rank from writing. The rank still receives the rest of the file,
        because every rank must enter the same collectives.
        """
        communicator = self._communicator
        failure: OSError | None = None
        with self._files[name].open("rb") if communicator.rank == 0 else nullcontext() as source:
            chunks = iter(
                lambda: communicator.broadcast_bytes(source.read(CHUNK_BYTES) if source else b""), b""
            )
            chunks = (_counted(chunk) for chunk in chunks)
            try:
                if target is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(target) as part, part.open("wb") as file:
                        file.writelines(chunks)
            except OSError as error:
                failure = error
            for _ in chunks:
                pass
        return failure


def _counted(chunk: bytes) -> bytes:
    advance(len(chunk))
    return chunk


def _sequence_length(config: Any, model_maximum: int | None) -> int | None:
    """Tokens of a sample: what the configuration says, else the model's maximum."""
    asked = getattr(config, "sequence_length", None)
    if asked is not None and model_maximum is not None and asked > model_maximum:
        raise ConfigError(
            f"data.sequence_length={asked} is above the model's maximum of {model_maximum} positions; lower "
            "it, or raise model.max_sequence_length"
        )
    return asked or model_maximum
