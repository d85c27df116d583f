"""What ppvision raises.

Every error that a user can mend is a `PpvisionError`, and also the built-in type that fits it, so
that `except ValueError` catches what it always did. Its message says what was expected, what was
found and what to do; the command line shows it as one message. Any other exception is a fault of
ours or of a library below us: the command line shows its traceback.
"""


class PpvisionError(Exception):
    """Something that a user can mend."""


class InputError(PpvisionError, ValueError):
    """An argument, a flag or an array is not what was expected."""


class InputTypeError(PpvisionError, TypeError):
    """An argument has the wrong type, or a function was called with an unknown one."""


class ConfigError(PpvisionError, ValueError):
    """A configuration cannot be read, or names something unknown."""


class DataError(PpvisionError, ValueError):
    """A data set, a list or a picture is not what training, prediction or conversion needs."""


class WeightsError(PpvisionError, ValueError):
    """Weights cannot be read, or do not fit the model."""


class ManifestError(PpvisionError, ValueError):
    """An exported folder's `deploy.yaml`, or a file that it names, is not as it was written."""


class MissingFileError(PpvisionError, FileNotFoundError):
    """A file or folder that was named is not there."""


class FolderInUseError(PpvisionError, FileExistsError):
    """A folder to be written holds other files, or another process is writing it."""


class StorageError(PpvisionError, OSError):
    """The system refused to read or write: a full disk, missing rights, a device that failed."""


class MissingPackageError(PpvisionError, ImportError):
    """An optional package is needed and not installed."""


class EngineError(PpvisionError, RuntimeError):
    """An inference engine, a converter or the tracer could not do what it was asked."""


class LibraryError(PpvisionError, RuntimeError):
    """PaddleSeg or PaddleDetection raised while it built or ran what a configuration names; the
    cause is attached."""
