"""What a verb may be applied to: a finished run, or a network spec with weights."""

from __future__ import annotations

from pathlib import Path

from excite.errors import UsageError


def check_source(source: str | Path, weights: str | Path | None) -> None:
    """Refuse what is neither a run nor a spec with weights, before anything is fetched or read.

    Raises:
        UsageError: it is neither, or a run with other weights.
    """
    if (Path(source) / "recipe.yaml").is_file():
        if weights is not None:
            raise UsageError(f"{source} is a run and has weights of its own: leave the others out.")
    elif weights is None:
        if Path(source).is_dir():
            raise UsageError(f"{source} is not a run: it has no recipe.yaml.")
        raise UsageError(
            f"'{source}' is not a run, and as a network spec it has random weights: add --weights imagenet or a file."
        )
