"""The outermost frame of every program: its streams, its exit status and a home folder."""

import contextlib
import errno
import getpass
import io
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

DEVICE_FAULT = os.EX_TEMPFAIL
"""Exit status 75: a GPU or the connection between ranks failed. Another attempt can succeed."""

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with the status that it returns.

    Characters that the encoding of standard output lacks are printed as escapes. A program whose output nobody reads
    any more, such as `... --plan | head`, continues without a word. An interrupt (Ctrl-C), or SIGTERM while
    Composer trains, ends it with one line, of rank 0 alone, and status 130 or 143. After a fault of the GPU, what
    libraries do at exit is skipped: it may wait for the GPU.
    """
    rank = os.environ.get("RANK", "0")  # ranks that train alone change it later
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
    try:
        status = main()
    except (KeyboardInterrupt, SystemExit) as end:
        status = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if status in _STOPPED:  # Composer's handler of these signals raises SystemExit
            _stop(status, rank)
        raise
    try:
        print(end="", flush=True)
    except OSError as error:  # of a file on a full disk
        print(f"error: {error.filename} cannot be written ({error.strerror})", file=sys.stderr)
        status = status or 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which a launcher ends all ranks as soon as one has failed
    if status == DEVICE_FAULT:
        _leave(status)
    sys.exit(status)


def _stop(status: int, rank: str) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if rank == "0":
        print("stopped; rerun the same command to resume", file=sys.stderr)
    _leave(status)  # what libraries do at exit takes seconds, and a launcher waits


def _leave(status: int) -> NoReturn:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def ensure_home() -> None:
    """Give a user without home folder or name, as in a container with an arbitrary user id, those that libraries need.

    The folder is in the temporary folder of the machine and belongs to this user.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_private_folder())
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["USER"] = str(os.getuid())


def _private_folder() -> Path:
    """A folder that only this user can write, the same each time if possible."""
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp())


def _tolerant(stream: TextIO | None) -> TextIO | None:
    """Return a stream to the same file that discards its output once the reader is gone."""
    if stream is None:  # closed by the shell
        return None
    stream.flush()
    buffered = io.BufferedWriter(_Discarding(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)


class _Discarding(io.FileIO):
    """A file that discards its output once its pipe or terminal is closed, or after an error was raised."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._gone = {errno.EPIPE, errno.EIO} if self.isatty() else {errno.EPIPE}

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if error.errno not in self._gone:
                raise OSError(error.errno, error.strerror, "the output") from None
            return len(content)
