"""What can go wrong, as types: each message says what, where, and what to do.

`exit_code` is what the command line exits with: 2 when the request was wrong (recipe, data, a folder),
1 when the work itself failed.
"""

from __future__ import annotations


class LlavaTrainError(Exception):
    """Base of every error that is a message to the user rather than a bug."""

    exit_code = 2


class RecipeError(LlavaTrainError):
    """The recipe is wrong; the message lists every fault with its place in the YAML."""


class DataError(LlavaTrainError):
    """A record, an image or a template cannot be used; the message names file, place and cause."""


class RecordError(DataError):
    """One record, or one of its pictures, cannot be used.

    Attributes:
        cause: the slug it is counted under ("image_missing", "control_token", ...).
        hostile: no policy may skip it (a path that leaves its root, a device instead of a file).
        outside: the picture or video that is to blame, where it lies outside the record and may be mended there.
    """

    def __init__(self, message: str, cause: str, hostile: bool = False, outside: str = "") -> None:
        super().__init__(message, cause, hostile, outside)  # all, so that it survives a pickle between processes
        self.message, self.cause, self.hostile, self.outside = message, cause, hostile, outside

    def __str__(self) -> str:
        return self.message

    def of(self, where: str, outside: str = "") -> RecordError:
        """The same fault, told of the record at `where`."""
        return RecordError(f"{where}: {self.message}", self.cause, self.hostile, outside or self.outside)


class CheckpointError(LlavaTrainError):
    """A folder is no model, or its weights do not fit."""


class ExportError(LlavaTrainError):
    """The model cannot be written in the asked layout, or what was written does not match."""


class StorageError(LlavaTrainError):
    """There is no room, or no right, to write what is about to be written."""


class TrainingError(LlavaTrainError):
    """Training cannot go on (a loss that is not finite, a step that failed)."""

    exit_code = 1


class StoppedError(LlavaTrainError):
    """A signal stopped the run, after a checkpoint. `exit_code` is what a shell says of that signal."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(step, number)
        self.step, self.exit_code = step, 128 + number

    def __str__(self) -> str:
        return f"stopped after step {self.step} with a checkpoint; the same command goes on"
