"""Image files inside a tar, read in place: nothing is unpacked."""

from __future__ import annotations

import logging
import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from excite.errors import ExciteError, UsageError

logger = logging.getLogger("excite.data")

_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # how gzip, bzip2 and xz begin


class TarFiles:
    """The files of a tar, by their position in :attr:`names`.

    An uncompressed tar is indexed once and then read by offset, from any thread or process. A compressed one
    cannot be read by offset, so its files are kept in memory.

    Links, devices, and names that lead out of the archive (absolute, or with ``..``) are left out and counted.

    Args:
        path: the tar; ``.tar``, or compressed with gzip, bzip2 or xz.
        memory_limit: bytes that the files of a compressed tar may take.

    Attributes:
        names: paths inside the tar, with ``/``.
        folders: the same for its folders.
        refused: how many members were left out for safety.
    """

    def __init__(self, path: str | Path, memory_limit: int = 1 << 30) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path} is not a file.")
        self.folders: list[str] = []
        self.refused = 0
        # By name: where a name comes twice, the later file is the one that unpacking would leave.
        self._places: dict[str, tuple[int, int]] = {}
        self._contents: dict[str, bytes] = {}
        try:
            if self._is_compressed():
                self._read_compressed(memory_limit)
            else:
                self._index()
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise ExciteError(f"Cannot read the tar {self.path}: {error}; is it whole, and is it a tar?") from error
        self.names = list(self._places or self._contents)
        if self.refused:
            logger.warning(
                "%s: %d members left out: links, devices, or names that lead out of the archive", path, self.refused
            )

    def read(self, position: int) -> bytes:
        """The content of a file."""
        name = self.names[position]
        if name in self._contents:
            return self._contents[name]
        offset, size = self._places[name]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _is_compressed(self) -> bool:
        with open(self.path, "rb") as file:
            return file.read(6).startswith(_COMPRESSED)

    def _index(self) -> None:
        with tarfile.open(self.path, "r:") as archive:
            for member in archive:
                if name := self._safe_name(member):
                    self._places[name] = member.offset_data, member.size
            if archive.offset + _BLOCK > self.path.stat().st_size:
                logger.warning("%s has no end mark: it may have been cut off between two files", self.path)

    def _read_compressed(self, memory_limit: int) -> None:
        taken = 0
        with tarfile.open(self.path, "r:*") as archive:
            for member in archive:
                if not (name := self._safe_name(member)):
                    continue
                taken += member.size
                if taken > memory_limit:
                    raise ExciteError(
                        f"The compressed tar {self.path} holds more than {memory_limit:,} bytes of files, which must "
                        "be kept in memory: decompress it (gunzip, bunzip2, unxz) or unpack it, and give that path."
                    )
                file = archive.extractfile(member)
                assert file is not None
                self._contents[name] = file.read()

    def _safe_name(self, member: tarfile.TarInfo) -> str:
        """The name of a file that may be used; empty for all else, which is noted as a folder or as refused."""
        path = PurePosixPath(member.name)
        inside = not path.is_absolute() and ".." not in path.parts
        if member.isreg() and inside and not member.issparse():
            return str(path)
        if member.isdir() and inside:
            self.folders.append(str(path))
        else:
            self.refused += 1
        return ""
