"""Names and places: where a session is, how it is found, how its files are opened.

Directory names are slugs; the true ids are in the header. Files are opened relative to a directory's descriptor, never
through a link, and only regular ones: a journal may lie where others can write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

SEGMENT = re.compile(r"(\d{6,})\.jsonl")
SESSION = re.compile(r"rank-(\d{5,})(\.[\w-]+)?-([0-9a-f]{16})")
WORKER = re.compile(r"worker\d+$")
"""The end of the role of a forked worker."""
DIRECTORY_LEVELS = 3  # <directory>/<job>/<host>/<session>


def slug(name: str) -> str:
    """A file name for any text: the text itself where it is harmless, else its harmless part and a hash of it all."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64].lstrip(".-")
    if clean and clean == name:
        return clean
    return f"{clean or 'x'}-{blake2b(name.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"


def segment_name(number: int) -> str:
    """The file name of a segment."""
    return f"{number:06d}.jsonl"


def session_name(rank: int, role: str, session: str) -> str:
    """The directory name of a session."""
    return f"rank-{rank:05d}{'.' + slug(role) if role else ''}-{session}"


def open_directory(path: str | Path, *, dir_fd: int | None = None) -> int:
    """A descriptor of a directory that is not a link."""
    return _open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)


def open_file(name: str, flags: int, *, dir_fd: int, mode: int = 0o600) -> int:
    """A descriptor of a regular file that is not a link. OSError otherwise; never blocks on a FIFO."""
    fd = _open(name, flags | os.O_NONBLOCK, mode, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return fd


def open_path(path: Path, flags: int) -> int:
    """A descriptor of a regular file; neither it nor its directory is a link. OSError otherwise."""
    directory = open_directory(path.parent)
    try:
        return open_file(path.name, flags, dir_fd=directory)
    finally:
        os.close(directory)


def _open(path: str | Path, flags: int, mode: int = 0o600, *, dir_fd: int | None) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    if fd > 2:
        return fd
    try:  # a process without stdout: what C code prints must not land in a journal
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


class RefusalIgnored:
    """A context in which what the system refuses is passed over.

    What a signal handler raises is not: an alarm's TimeoutError is an OSError, too, but one without a number.
    """

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return isinstance(error, OSError) and error.errno is not None


class Descriptors:
    """Descriptors that stay open for long, each known by the file that it led to when it was opened.

    Files are deleted while they are written, and some code closes every descriptor of its process (`os.closerange`),
    whose numbers may then belong to files of other code.
    """

    def __init__(self) -> None:
        self._opened: dict[int, tuple[int, int, bool]] = {}

    def hold(self, fd: int) -> int:
        """Keep a descriptor that was just opened, and return it."""
        self._opened[fd] = _leads_to(fd)
        return fd

    def gone(self) -> bool:
        """Whether a file was deleted, or a descriptor closed by somebody else."""
        for fd, opened in self._opened.items():
            try:
                if _leads_to(fd) != opened:
                    return True
            except OSError as error:  # any other error is the file system's, and may pass
                if error.errno in {errno.EBADF, errno.ESTALE}:
                    return True
        return False

    def close(self, fd: int) -> None:
        """Close a descriptor, unless its number belongs to other code by now."""
        with RefusalIgnored():
            if _leads_to(fd)[:2] == self._opened[fd][:2]:
                os.close(fd)
        del self._opened[fd]

    def close_all(self) -> None:
        """Close every descriptor that is still the one that was opened."""
        self.close_others(())

    def close_others(self, kept: Collection[int]) -> None:
        """The same, but for those in `kept`."""
        for fd in [fd for fd in self._opened if fd not in kept]:
            self.close(fd)


def _leads_to(fd: int) -> tuple[int, int, bool]:
    """Device, inode, and whether it still has a name."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_nlink > 0


def read_file(path: Path, max_bytes: int = -1) -> bytes | None:
    """Read a small regular file.

    Args:
        path: Of the file; links are not followed.
        max_bytes: How much of it, from its beginning; -1: all of it.

    Returns:
        Its bytes; None where there is no such file, or it cannot be read.

    """
    try:
        with open(open_path(path, os.O_RDONLY), "rb") as file:
            return file.read(max_bytes)
    except OSError:
        return None


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, sync: bool = False) -> None:
    """Put a file with this content in the place of whatever has the name: a reader sees the old one or the new one.

    Args:
        path: Of the file; its directory may be no link.
        content: All of its bytes.
        mode: Its permissions.
        sync: Whether the bytes are on the disk before the name is theirs.

    Raises:
        OSError: The old file is untouched, and nothing is left of the new one.

    """
    with _draft(path, content, mode=mode, sync=sync) as (draft, directory):
        os.rename(draft, path.name, src_dir_fd=directory, dst_dir_fd=directory)


def create_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make a file with all of this content, unless something has the name. Arguments and errors as `replace_file`."""
    with _draft(path, content, mode=mode) as (draft, directory), contextlib.suppress(FileExistsError):
        os.link(draft, path.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)


@contextlib.contextmanager
def _draft(path: Path, content: bytes, *, mode: int, sync: bool = False) -> Iterator[tuple[str, int]]:
    """A file beside `path`, for as long as the name that it was made under: that name, and the directory's descriptor.

    Each has a name of its own: threads and processes may be at it at once.
    """
    draft = f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
    directory = open_directory(path.parent)
    try:
        fd = open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=directory, mode=mode)
        with open(fd, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(fd)
        yield draft, directory
    finally:
        with contextlib.suppress(OSError):  # it has its name by now
            os.unlink(draft, dir_fd=directory)
        os.close(directory)


def writable_by_us(path: Path) -> bool:
    """Whether a directory is our own to write in: it exists, is not a link, and its owner is our user."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and os.access(path, os.W_OK | os.X_OK)


@dataclass(frozen=True, slots=True)
class SessionPath:
    """A session's directory on disk, with the rank, the session id and the role (as a slug) that its name says."""

    path: Path
    rank: int
    session: str
    role: str = ""

    @classmethod
    def of(cls, path: Path) -> SessionPath | None:
        """The session at this path, judged by its name."""
        match = SESSION.fullmatch(path.name)
        return cls(path, int(match[1]), match[3], (match[2] or "").removeprefix(".")) if match else None

    def segments(self) -> list[int]:
        """The numbers of the segments that are there, ascending; none where the session is gone. OSError."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in map(SEGMENT.fullmatch, names) if match)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a segment, fewer where it ends. OSError."""
        with open(open_path(self.path / segment_name(number), os.O_RDONLY), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def find_sessions(
    root: Path, *, host: str | None = None, refused: Callable[[Path], None] = lambda _: None
) -> Iterator[SessionPath]:
    """All sessions at or below a path, in name order.

    Args:
        root: All runs, one job, or one session.
        host: Only those in a folder of this host's name.
        refused: Called with each directory that this user may not list; what is in it is passed over.

    """
    start = SessionPath.of(root)
    if start:
        yield start
        return
    yield from _descend(os.fspath(root), DIRECTORY_LEVELS, slug(host) if host else None, refused)


def _descend(directory: str, levels: int, host: str | None, refused: Callable[[Path], None]) -> Iterator[SessionPath]:
    """In plain strings: a deliverer lists its journals every second."""
    is_of_host = host is None or os.path.basename(directory) == host
    if host is not None and not is_of_host:  # a job's folder: of a thousand hosts' folders, look into one
        mine = list(_descend(os.path.join(directory, host), 1, host, refused))
        if mine:
            yield from mine
            return
    try:
        with os.scandir(directory) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False))
    except PermissionError:
        refused(Path(directory))
        return
    except OSError:
        return
    for name in names:
        found = _session_at(directory, name)
        if found:
            if is_of_host:
                yield found
        elif levels > 1:
            yield from _descend(os.path.join(directory, name), levels - 1, host, refused)


@lru_cache(maxsize=4096)
def _session_at(directory: str, name: str) -> SessionPath | None:
    return SessionPath.of(Path(directory, name))


def sessions_of_rank(directory: Path, job_id: str, rank: int) -> list[SessionPath]:
    """Earlier sessions of one rank of a job, without those of its forked workers."""
    found = find_sessions(directory / slug(job_id))
    return [each for each in found if each.rank == rank and not WORKER.search(each.role)]
