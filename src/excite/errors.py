"""The two ways in which excite refuses: the input was wrong, or the work could not be done.

Both carry one clear sentence for the person who runs excite. The command line prints that sentence and
ends with the exception's exit code; from Python they are ordinary exceptions.
"""


class ExciteError(Exception):
    """The work failed: a broken file, a full disk, a loss that is not a number. Exit code 1."""

    exit_code = 1


class UsageError(ExciteError, ValueError):
    """What was asked for is wrong: an unknown name, a bad value, a missing path. Exit code 2."""

    exit_code = 2


def nearest(word: str, known: list[str], count: int = 3) -> str:
    """A ready clause such as ``did you mean 'resnet20' or 'resnet32'?``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    if not close:
        return ""
    return "did you mean " + " or ".join(repr(name) for name in close) + "?"
