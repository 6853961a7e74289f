"""Progress on the terminal: a bar with an ETA where someone watches, else a few plain lines."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
QUIET_SECONDS = 20.0  # between lines where nobody watches

Step = Callable[[str], None]


@contextlib.contextmanager
def steps(label: str, total: int, *, done: int = 0) -> Iterator[Step]:
    """Count `total` steps; call what is yielded after each one, with a word on how it went.

    done: how many an earlier attempt did.
    """
    if console.is_terminal:
        with _bar(label, total, done) as step:
            yield step
    else:
        yield _lines(label, total, done)


@contextlib.contextmanager
def _bar(label: str, total: int, done: int) -> Iterator[Step]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


def _lines(label: str, total: int, before: int) -> Step:
    start = last = time.monotonic()
    done = before

    def step(note: str) -> None:
        nonlocal done, last
        done, now = done + 1, time.monotonic()
        if done == total or now - last > QUIET_SECONDS:
            last, left = now, (now - start) / (done - before) * (total - done)
            console.print(
                f"{label} {done}/{total}, {left:.0f} s left {note}".rstrip(), soft_wrap=True
            )

    return step
