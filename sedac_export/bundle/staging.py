"""Writes bundles so that each appears whole under its name, or not at all.

Beside a bundle NAME, hidden and only while a process builds or changes it, lie

    .NAME.lock       the file that this process holds locked
    .NAME.building   what it writes
    .NAME.scratch    what it needs only meanwhile
    .NAME.replaced   the bundle that gives way, until the new one has the name

The lock is the kernel's (flock) and ends with the process, however it ends. Process ids would not
do: containers count their own, and hosts share volumes. Who holds the lock is alone, so whatever
else lies there was left by a process that was killed.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import Timeout, UnixFileLock

from sedac_export.errors import SedacError


@dataclass(frozen=True)
class Claim:
    """The right to build or change a bundle. name: as the user wrote it. place: where it is."""

    name: Path
    place: Path

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to write the bundle into, gone afterwards unless it was published."""
        with self._temporary("building") as path:
            yield path

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory on the bundle's disk for what is needed only during the work."""
        with self._temporary("scratch") as path:
            yield path

    @contextlib.contextmanager
    def _temporary(self, purpose: str) -> Iterator[Path]:
        path = self._hidden(purpose)
        with _writing(self.name):
            path.mkdir()
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def publish(self, staging: Path, replace: bool) -> None:
        """Give `staging` the bundle's name, once the disk holds all of it.

        A bundle that it replaces is set aside until that is done.
        """
        for path in (*staging.rglob("*"), staging):
            sync(path)
        if replace and self.place.exists():
            self._exchange(staging)
        else:
            staging.rename(self.place)
            sync(self.place.parent)

    def _exchange(self, staging: Path) -> None:
        old = self._hidden("replaced")
        self.place.rename(old)
        try:
            staging.rename(self.place)
        except BaseException:
            old.rename(self.place)
            raise
        sync(self.place.parent)
        # under this name it would be put back by whoever finds no bundle, and must be whole
        old.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)

    def recover(self) -> None:
        """Remove what killed processes left, put back a bundle that one of them had set aside."""
        old = self._hidden("replaced")
        if old.exists() and not self.place.exists():
            old.rename(self.place)
        for path in (old, self._hidden("building"), self._hidden("scratch")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _hidden(self, purpose: str) -> Path:
        return self.place.with_name(f".{self.place.name}.{purpose}")


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Claim]:
    """Keep other processes from building or changing the bundle `output` within this context.

    A link stands for what it points to. Parents that had to be made go again if they stay empty.
    Within its claim a thread may claim the same bundle again.

    Raises SedacError when another process has it, and when `output` cannot be written.
    """
    with _writing(output):
        claim = Claim(output, _place(output))
        made = [path for path in claim.place.parents if not path.exists()]
    try:
        with _writing(output):
            claim.place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(claim) as is_first:
            if is_first:
                with _writing(output):
                    claim.recover()
            yield claim
    finally:
        # a parent that holds the bundle by now is not empty and stays
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def replace_file(path: Path, text: str) -> None:
    """Write a whole file in one step: readers find the old text or the new one."""
    new = path.with_name(f".{path.name}")
    # whatever a killed process left there, a link too, is not written to
    new.unlink(missing_ok=True)
    new.write_text(text)
    sync(new)
    new.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends, and not if the block fails."""
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as file:
            yield file
        sync(new)
        new.rename(path)
        sync(path.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the disk hold what was written to the file or directory `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems know no such thing for directories
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _place(output: Path) -> Path:
    place = Path(os.path.realpath(output))
    if place.is_symlink():
        raise SedacError(f"{output} is a link that leads back to itself; remove it")
    return place


@contextlib.contextmanager
def _lock(claim: Claim) -> Iterator[bool]:
    """Hold the lock; whether it was not held by this thread before."""
    path = claim.place.with_name(f".{claim.place.name}.lock")
    lock = UnixFileLock(path, blocking=False, is_singleton=True, fallback_to_soft=False)
    with _writing(claim.name):
        try:
            lock.acquire()
        except Timeout as error:
            # that is also what comes of a place where no file can be made
            path.touch()
            raise SedacError(
                f"{claim.name} is being built or changed by another process; wait until it is done"
            ) from error
    try:
        yield lock.lock_counter == 1
    finally:
        if lock.lock_counter == 1:
            # a process that opened the file before this sees that it was unlinked, and starts over
            path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Raise the system's objection to writing `output` as a SedacError."""
    try:
        yield
    except OSError as error:
        above = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the place of its parent" if above else error.strerror or error
        raise SedacError(
            f"{output} cannot be written: {reason}; nothing was kept, write it elsewhere"
        ) from error
