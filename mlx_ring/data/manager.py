"""The data of one rank: found or made on its host, or received from rank 0, then opened and dealt."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_ring.communication.communicator import Communicator
from mlx_ring.data.loader import Loader
from mlx_ring.data.sources import Dataset, open_dataset, prepare
from mlx_ring.errors import ConfigError, DataError, MlxRingError, agreed

CHUNK_BYTES = 32 * 2**20


class DataManager:
    """Opens a data set on every rank; builds the loader of this rank's share."""

    def __init__(
        self,
        config: Any,
        communicator: Communicator,
        *,
        kind: str,
        seed: int,
        model_maximum: int | None,
        targets_are_classes: bool,
    ) -> None:
        """Collective: every rank must call.

        `targets_are_classes`: whether a target beyond the number of classes is refused when drawn.

        Raises: DataError or ConfigError, the same on every rank, for data that is absent, damaged or does not
        fit.
        """
        self._config, self._communicator = config, communicator
        self._kind, self._seed = kind, seed
        self._sequence_length: int | None = None
        self._files: dict[str, Path] = {}
        dataset, error = self._try(lambda: self._own_files(model_maximum))
        if getattr(config, "distribute", False) and communicator.world_size > 1:
            communicator.agree_on_error(error if communicator.rank == 0 else None)
            dataset, error = self._receive_missing(dataset)
        communicator.agree_on_error(error)
        assert dataset is not None
        self.dataset = dataset.checked() if targets_are_classes else dataset

    def loader(
        self, *, global_batch_size: int, micro_batch_size: int, micro_batches: range, next_sample: int
    ) -> Loader:
        """These micro-batches of every global batch from `next_sample` on.

        Raises: DataError, the same on every rank, for fewer samples than a global batch.
        """
        try:
            return Loader(
                self.dataset.train,
                seed=self._seed,
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                micro_batches=micro_batches,
                next_sample=next_sample,
                prefetch=self._config.prefetch,
            )
        except DataError as error:
            raise agreed(error) from None

    def _open(self, files: dict[str, Path]) -> Dataset:
        return open_dataset(
            self._config, kind=self._kind, seed=self._seed, sequence_length=self._sequence_length, files=files
        )

    def _own_files(self, model_maximum: int | None) -> dict[str, Path]:
        self._sequence_length = _sequence_length(self._config, model_maximum)
        self._files = prepare(self._config)
        return self._files

    def _try(self, find: Callable[[], dict[str, Path]]) -> tuple[Dataset | None, MlxRingError | None]:
        """The data in the files found, or what is wrong with them."""
        try:
            return self._open(find()), None
        except (ConfigError, DataError) as error:
            return None, error
        except OSError as error:
            return None, DataError(f"the data cannot be read: {error}; mend the file or its permissions")

    def _receive_missing(self, dataset: Dataset | None) -> tuple[Dataset | None, MlxRingError | None]:
        """Send rank 0's files to every rank that holds other data or none."""
        communicator = self._communicator
        digest = communicator.broadcast_object(dataset.digest if dataset and communicator.rank == 0 else None)
        names = communicator.broadcast_object({name: path.name for name, path in self._files.items()})
        folder = Path(self._config.cache_dir).expanduser() / f"received-{digest[:16]}"
        files = {name: folder / filename for name, filename in names.items()}
        if dataset is None or dataset.digest != digest:
            dataset, _ = self._try(lambda: files)  # received by an earlier run
        lacks = dataset is None or dataset.digest != digest
        if not any(communicator.gather_objects(lacks)):
            return dataset, None
        error: OSError | None = None
        for name, path in files.items():
            error = self._send(name, path if lacks and error is None else None) or error
        if error is not None:
            return None, DataError(f"{folder} cannot hold what rank 0 sent: {error.strerror}; make room")
        return self._try(lambda: files) if lacks else (dataset, None)

    def _send(self, name: str, target: Path | None) -> OSError | None:
        """Rank 0 reads one of its files, everybody hears it; a rank with a `target` writes it, whole or not.

        Returns what kept it from writing: it goes on listening, for the others do.
        """
        communicator, failure = self._communicator, None
        source = self._files[name].open("rb") if communicator.rank == 0 else None
        part = target.with_name(f".{target.name}-{os.getpid()}") if target is not None else None
        while chunk := communicator.broadcast_bytes(source.read(CHUNK_BYTES) if source else b""):
            if part is not None and failure is None:
                try:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    with part.open("ab") as file:
                        file.write(chunk)
                except OSError as error:
                    failure = error
        if source is not None:
            source.close()
        if part is not None and target is not None and failure is None:
            part.replace(target)
        elif part is not None:
            part.unlink(missing_ok=True)
        return failure


def _sequence_length(config: Any, model_maximum: int | None) -> int | None:
    """Tokens of a sample: the configuration's, else the model's maximum."""
    asked = getattr(config, "sequence_length", None)
    if asked is not None and model_maximum is not None and asked > model_maximum:
        raise ConfigError(
            f"data.sequence_length={asked} is above the model's maximum of {model_maximum} positions; lower "
            "it, or raise model.max_sequence_length"
        )
    return asked or model_maximum
