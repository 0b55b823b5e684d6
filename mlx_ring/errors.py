"""Every error that can end a run, each with the exit status of the process.

    MlxRingError
    ├── ConfigError       2   the configuration, the command line or the environment is wrong
    ├── DataError         2   a data set is missing, damaged, or does not fit the model
    ├── ClusterError      3   a launch failed, a rank was lost, or the ranks do not agree
    ├── TrainingError     4   gradients are not finite, or the replicas differ
    ├── CheckpointError   5   no checkpoint can be used, or none can be written
    ├── JobFailed             a job of a sweep failed; the status is the job's own
    └── Interrupted     130   a second signal asked the process to end at once

A message is one line: what failed, where, both values, the remedy.
"""

import errno
import logging
import sys
import traceback

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
EXIT_COMPLETED = 0
EXIT_STOPPED = 75  # stopped on request; the state is saved


class MlxRingError(Exception):
    """Base class of all errors that end a run on purpose.

    Attributes:
        exit_status: the exit status of the process.
        agreed: True if every rank raises this error with the same words; then rank 0 alone prints it.
    """

    exit_status = 1
    agreed = False

    def __init__(self, message: str) -> None:
        """Joins the lines of `message` into one, because it may quote text with line breaks."""
        super().__init__(" ".join(message.split()))


class ConfigError(MlxRingError):
    """Raised if the configuration, the command line or the environment is wrong. Exit status 2."""

    exit_status = 2


class DirectoryInUse(ConfigError):
    """Raised if another process that is still alive writes to the run's directory. Exit status 2."""


class DataError(MlxRingError):
    """Raised if a data set is missing, damaged, or does not fit the model. Exit status 2."""

    exit_status = 2


class ClusterError(MlxRingError):
    """Raised if the ranks cannot be started or joined, do not agree, or if one is lost. Exit status 3."""

    exit_status = 3


class TrainingError(MlxRingError):
    """Raised if training cannot go on: gradients are not finite, or the replicas differ. Exit status 4."""

    exit_status = 4


class CheckpointError(MlxRingError):
    """Raised if a checkpoint was asked for and none can be used, or none can be written. Exit status 5."""

    exit_status = 5


class NewerCheckpointError(CheckpointError):
    """Raised for a checkpoint that a later version of mlx_ring wrote. Exit status 5.

    Such a checkpoint is not damaged, so an older one must not be taken in its place.
    """


class JobFailed(MlxRingError):
    """Raised when a sweep ends and one of its jobs failed. The exit status is that of the job."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(MlxRingError):
    """Raised when a second signal asks the process to end at once, without saving. Exit status 130."""

    exit_status = 130


def agreed(error: MlxRingError) -> MlxRingError:
    """Marks an error that every rank raises with the same words, and returns it."""
    error.agreed = True
    return error


def unwritable_record(error: OSError) -> MlxRingError:
    """Says why a file of the run's record cannot be written.

    Returns: a CheckpointError if the disk is full or failing, else a ConfigError: run.dir is a wrong choice.
    """
    if error.errno in DISK_ERRORS:
        return CheckpointError(
            f"the run's record cannot be written: {error}; make room, then the same command continues"
        )
    return ConfigError(f"the run's record cannot be written: {error}; mend it, or choose another run.dir")


def locate_error(error: BaseException) -> str:
    """Says where an unexpected error was raised, in words to append to its message.

    The traceback is in this rank's log. If there is no log yet, prints it on stderr and returns "".
    """
    logs = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    if not logs:
        sys.excepthook(type(error), error, error.__traceback__)
        return ""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({place.filename}, line {place.lineno}); its traceback is in {logs[0].baseFilename}"
