"""Every error that a run can end with, each with its exit status.

    MlxRingError
    ├── ConfigError       2   a wrong configuration, command line or environment
    ├── DataError         2   a data set that is absent, damaged or does not fit the model
    ├── ClusterError      3   launch failed, a peer was lost, ranks do not agree
    ├── TrainingError     4   non-finite loss, replicas differ
    ├── CheckpointError   5   no usable checkpoint where one was asked for, or one of a later version
    ├── JobFailed             a job of a sweep ended so; with the job's own status
    └── Interrupted     130   a second signal asked to leave at once

A message is one line: what failed, where, both values, the remedy.
"""

import errno
import logging
import sys
import traceback

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
EXIT_COMPLETED = 0
EXIT_STOPPED = 75  # stopped on request, state saved


class MlxRingError(Exception):
    """Base of all errors that end a run; `exit_status` is the process's exit status.

    `agreed` is set where all ranks raise the same error together: then rank 0 alone prints it.
    """

    exit_status = 1
    agreed = False

    def __init__(self, message: str) -> None:
        """`message` becomes one line, whatever of the user's is quoted in it."""
        super().__init__(" ".join(message.split()))


class ConfigError(MlxRingError):
    """The configuration, the command line or the environment is wrong."""

    exit_status = 2


class DirectoryInUse(ConfigError):
    """A live run holds the run's directory."""


class DataError(MlxRingError):
    """A data set is absent, damaged, or does not fit the model."""

    exit_status = 2


class ClusterError(MlxRingError):
    """The ranks could not be joined, do not agree, or one was lost."""

    exit_status = 3


class TrainingError(MlxRingError):
    """Training cannot go on: non-finite gradients, or replicas that differ."""

    exit_status = 4


class CheckpointError(MlxRingError):
    """A checkpoint that was asked for cannot be used, or none can be written."""

    exit_status = 5


class NewerCheckpointError(CheckpointError):
    """A checkpoint was written by a later version: not damaged, and not to be passed over."""


class JobFailed(MlxRingError):
    """A job of a sweep did not complete; its exit status is the sweep's."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(MlxRingError):
    """A second signal asked to leave at once."""

    exit_status = 130


def agreed(error: MlxRingError) -> MlxRingError:
    """Mark an error that every rank raises with the same words."""
    error.agreed = True
    return error


def record_error(error: OSError) -> MlxRingError:
    """What it means that a file of the run's record cannot be written: no room, or not a file to write to."""
    if error.errno in DISK_ERRORS:
        return CheckpointError(
            f"the run's record cannot be written: {error}; make room, then the same command continues"
        )
    return ConfigError(f"the run's record cannot be written: {error}; mend it, or choose another run.dir")


def whereabouts(error: BaseException) -> str:
    """Where an unforeseen error arose. Its traceback is in this rank's log; before there is one, here."""
    logs = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    if not logs:
        sys.excepthook(type(error), error, error.__traceback__)
        return ""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({place.filename}, line {place.lineno}); its traceback is in {logs[0].baseFilename}"
