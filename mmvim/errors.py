"""Errors in what a user gives: each message names the file, key or argument and says what to do about it.

The tools print such a message alone; anything else is a fault of the program and keeps its stack trace.
"""


class InputError(ValueError):
    """A mistake in the input, explained in one line."""


class ConfigError(InputError):
    """A config or command line that cannot be used."""


class DataError(InputError):
    """A data folder, annotation file or image that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not fit the model."""


class RunError(InputError):
    """A run that cannot go on, such as one whose loss is not a number."""


def first_line(error: Exception) -> str:
    """First line of an error's text; of one without text, what Python shows of it."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
