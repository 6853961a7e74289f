"""Files that others wrote, read without trust: what is opened, and JSON with limits.

A model's folder may be damaged, or made to do damage. Only ordinary files are opened, which no
device or pipe is, and only within the folder: a link that leads out of it is refused, but for the
cache of Hugging Face's hub, whose snapshots are links into the `blobs` beside them.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError

LONGEST = 100_000_000  # bytes of a text or a header
LARGEST = 2**31 - 1  # of a count or a size
DEEPEST = 100  # objects and lists within each other
# What reading a damaged file raises, however careful the reader.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
          RecursionError)  # fmt: skip


@contextlib.contextmanager
def refusing(what: str, advice: str = "fetch it again") -> Iterator[None]:
    """Whatever a damaged file makes the body raise, as one sentence that begins with `what`."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{what} ({explained(error)}): {advice}.") from error


def explained(error: BaseException) -> str:
    """An exception's own words, with its kind where they say little: "KeyError: 'shape'"."""
    plain = isinstance(error, (OSError, ValueError, UserError)) and str(error)
    words = str(error).strip().rstrip(".")
    return words if plain else f"{type(error).__name__}: {words}"


def require_file(path: Path, folder: Path | None = None) -> Path:
    """Refuse what is no ordinary file, or lies outside the folder that it is a part of."""
    with refusing(f"{path} cannot be read"):
        if not path.is_file():
            raise UserError(f"{path} is missing or no ordinary file: fetch the model again.")
        if folder is not None and not _within(path.resolve(), folder.resolve()):
            raise UserError(
                f"{path} leads outside its folder: do not trust this model, or put the file itself "
                "in the place of the link."
            )
    return path


def _within(path: Path, folder: Path) -> bool:
    snapshot = folder.parent.name == "snapshots"
    blobs = [folder.parent.parent / "blobs"] if snapshot else []
    return any(path.is_relative_to(place) for place in [folder, *blobs])


def read_text(path: Path, folder: Path | None = None) -> str:
    """UTF-8 of a bounded length; raises UserError, or ValueError for other bytes."""
    require_file(path, folder)
    with path.open("rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    return content.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as the standard has it, in UTF-8; raises ValueError for anything else.

    Refused beside what is no JSON: keys given twice, which readers take differently, numbers that
    are not finite, halves of characters, and nesting beyond DEEPEST.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_plain(content)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return found


def _require_plain(content: Any) -> None:
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("it holds a number that is not finite")
            elif isinstance(value, str) and not value.isascii():
                value.encode()  # raises for half a character
        level = below


def read_json(
    path: Path, folder: Path | None = None, *, default: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A JSON object, or `default` where there is no such file; raises UserError."""
    if default is not None and not path.exists():
        return default
    with refusing(f"{path} is not a JSON object"):
        content = parse_json(read_text(path, folder))
        if isinstance(content, dict):
            return content
        raise ValueError(f"it holds a {type(content).__name__}")
