"""Files that appear whole or not at all, and survive a power cut once they have."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UserError

ORIGIN = ".origin.json"  # in a partial folder: what it is of


def write_whole(path: Path, text: str) -> Path:
    """Replace a file's content at once: a reader sees the old text or the new, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync(path.parent)
    return path


def begin_partial(partial: Path, origin: str, *, finished: bool = False) -> None:
    """Go on with a folder that is written part by part, or begin it anew where what an earlier
    command left is of another origin.

    origin: what identifies its content; kept in ORIGIN until the folder is done. finished: whether
    all is there, ORIGIN taken away, and the name alone missing.
    """
    mark = partial / ORIGIN
    ours = mark.read_text() == origin if mark.is_file() else finished
    if partial.is_dir() and not ours:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(mark, origin)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or to a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def kept_so_far(place: Path, what: str = "") -> Iterator[None]:
    """Where something is written part by part, an error is a sentence that says so.

    what: for the sentence, such as "the checkpoint ".
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Writing {what}{place} failed ({free_space(place)}): {error}. What was written before "
            "is kept: make room and run the same command again."
        ) from error


def free_space(place: Path) -> str:
    """How much room the disk has of a file or folder that may not exist yet."""
    there = next(p for p in (place, *place.parents) if p.exists())
    return f"{shutil.disk_usage(there).free / 1e6:.0f} MB free on its disk"
