"""Image files below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from excite.errors import ExciteError, UsageError


class FolderFiles:
    """The files below a folder, by their position in :attr:`names`.

    Links to files are followed; links to folders only directly below ``root`` and in its splits, where a set
    is often put together from elsewhere.

    Attributes:
        names: paths relative to the root, sorted, with ``/``.
        folders: relative paths of the folders.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UsageError(f"{self.root} is not a folder.")
        self.names: list[str] = []
        self.folders: list[str] = []
        self._walk(self.root, "", link_depth=2)
        self.names.sort()

    def read(self, position: int) -> bytes:
        """The content of a file."""
        return (self.root / self.names[position]).read_bytes()

    def _walk(self, folder: Path, prefix: str, link_depth: int) -> None:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ExciteError(f"Cannot list the folder {folder}: {error.strerror}.") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=link_depth > 0):
                self.folders.append(prefix + entry.name)
                self._walk(Path(entry.path), f"{prefix}{entry.name}/", link_depth - 1)
            elif entry.is_file():
                self.names.append(prefix + entry.name)
