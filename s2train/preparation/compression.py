"""Opens compressed files."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal, cast

from s2train.errors import ConfigError

Compression = Literal["", "gz", "zst", "bz2", "xz"]
REPAIR = "Repair the file, or leave it out"


@contextmanager
def open_content(path: Path, compression: Compression = "") -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file, decompressed.

    Yields the content, and a function that returns how many bytes of the compressed file were read.

    Raises:
        ConfigError: on `input`; the file can't be read, or a package that is needed is not installed.
    """
    try:
        with path.open("rb") as raw:
            yield _content(raw, path, compression), raw.tell
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError("input", path, f"can't be read ({error})", REPAIR) from error


def import_package(name: str, path: Path, remedy: str = "pip install s2train[data]") -> ModuleType:
    """Import a package that is needed to read `path`.

    Raises:
        ConfigError: on `input`; it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        problem = f"reading it needs {name.partition('.')[0]}, which is not installed"
        raise ConfigError("input", path, problem, remedy) from error


def _content(raw: IO[bytes], path: Path, compression: Compression) -> IO[bytes]:
    if compression == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if compression == "zst":
        return io.BufferedReader(_Zstandard(raw, import_package("zstandard", path)), 1 << 20)
    remedy = "Install a Python that was built with it"
    if compression == "bz2":
        return cast(IO[bytes], import_package("bz2", path, remedy).BZ2File(raw))
    if compression == "xz":
        return io.BufferedReader(_Xz(import_package("lzma", path, remedy).LZMAFile(raw)), 1 << 20)
    return raw


class _Xz(io.RawIOBase):
    """Content of an .xz file; damage raises OSError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._file.readinto(buffer))
        except EOFError:
            raise
        except Exception as error:  # LZMAError, whose module may be missing
            raise OSError(str(error)) from error


class _Zstandard(io.RawIOBase):
    """Content of consecutive zstandard frames.

    zstandard's own reader does not detect a truncated file.
    """

    def __init__(self, raw: IO[bytes], zstandard: ModuleType) -> None:
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._raw, self._frame, self._ready = raw, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(1 << 17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("it is truncated")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        content = []
        while chunk:
            frame: Any = self._decompressor.decompressobj() if self._frame is None else self._frame
            try:
                content.append(frame.decompress(chunk))
            except self._error as error:
                raise OSError(str(error)) from error
            self._frame, chunk = (None, frame.unused_data) if frame.eof else (frame, b"")
        return b"".join(content)
