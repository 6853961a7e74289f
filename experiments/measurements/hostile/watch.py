"""What a process opens, changes or starts, seen through Python's audit events.

planish opens a model's files in Python alone (`tokenizers` is given text, `gguf` and NumPy map what
Python opened), so that every path passes here.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import records
from experiments.checkpoints.packages import cache_folder
from experiments.data import chat

CODE = [records.ROOT / name for name in ("kernels", "models", "algorithms", "experiments")]
CODE += records.ROOT.glob("*.egg-info")  # which whoever looks for plugins reads
INTERPRETER = [Path(sys.prefix), Path(sys.base_prefix)]
MACHINE = [Path("/proc/self"), Path("/proc") / str(os.getpid()), Path("/sys"), Path(os.devnull)]
READING = ("os.listdir", "os.scandir", "ctypes.dlopen")
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
            "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.")  # fmt: skip
NEVER = ("socket.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile",
         "pickle.find_class", "urllib.", "webbrowser.")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watches: "list[Watch]" = []
_local = threading.local()


class Watch:
    """What happened outside of a model's folder, the code and the cache, one clause each."""

    def __init__(self, model: Path):
        self.found: list[str] = []
        self._written = [*map(_real, _caches()), Path(os.devnull)]
        self._read = [*map(_real, [model, *CODE, *INTERPRETER]), *MACHINE, *self._written]
        # Names for hooks of the import system, which are no places, are looked for all the same.
        self._read += [_real(Path(name)) for name in sys.path if name and not os.path.exists(name)]

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            self._require(event, path, writing=bool(flags & WRITES))
        elif event in READING:
            self._require(event, arguments[0], writing=False)
        elif event.startswith(CHANGING):
            self._require(event, arguments[0], writing=True)
        elif event == "subprocess.Popen" and chat.__file__ not in map(str, arguments[1]):
            self.found.append(f"started {arguments[1]}")
        elif event.startswith(NEVER):
            self.found.append(f"{event} {arguments[:1]}")

    def _require(self, event: str, path: Any, *, writing: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, opened before
        real = Path(os.path.realpath(os.fsdecode(path)))
        if not any(
            real.is_relative_to(place) for place in (self._written if writing else self._read)
        ):
            self.found.append(f"{event} {real}{' for writing' if writing else ''}")


def _caches() -> list[Path]:
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return [cache_folder(), *([Path(compiled)] if compiled else [])]


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches or getattr(_local, "busy", False):
        return
    _local.busy = True
    try:
        for watch in _watches:
            watch.see(event, arguments)
    finally:
        _local.busy = False


@contextlib.contextmanager
def watching(model: Path) -> Iterator[Watch]:
    """Watch this process, threads included, while the body runs."""
    if not hasattr(_hook, "added"):  # a hook stays for the process's life
        _hook.added = True  # type: ignore[attr-defined]
        sys.addaudithook(_hook)
    watch = Watch(model)
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)
