"""What a user does with a model's files, and the verdict on a damaged one.

accepted   everything was read: the damage left a valid model, or nothing that is used
refused    a UserError of one readable line that names the file
finding    anything else: another exception, a hang, too much memory, a file touched outside
"""

import contextlib
import functools
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.checkpoints.sources import Source, open_source
from experiments.errors import LONGEST, UserError
from experiments.measurements.hostile.watch import watching

type Templates = dict[Any, list[str]]

ACCEPTED, REFUSED, FINDING = "accepted", "refused", "finding"
LINE = "Ab cd, ab ab 0123! " + "a" * 40 + " \u00e9\u4e2d\U0001f600 <s></s>"
MESSAGES = [{"role": "user", "content": "Is <s> a 'b'?"}]
INTERNAL = re.compile(r"Traceback|object at 0x|<class |File \"|\.py\b")


class Verdict(NamedTuple):
    kind: str
    detail: str = ""  # the first refusal, or all that is wrong


class TookTooLong(BaseException):
    """No Exception, so that no reader takes it for damage."""


def examine(path: Path, seconds: float, templates: Templates) -> Verdict:
    """Read a model as a user does, within some seconds; only where nothing else runs in Python's
    main thread. templates: those rendered before, with what was refused of them.
    """
    refused: list[str] = []
    wrong: list[str] = []
    with watching(path) as watch:
        try:
            with _limited(seconds):
                _use(path, refused, templates)
        except TookTooLong as error:
            wrong.append(f"took longer than {seconds} s{_where(error)}")
        except MemoryError as error:
            wrong.append(f"asked for too much memory: {error}{_where(error)}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            wrong.append(f"{type(error).__name__}: {str(error)[:300]}{_where(error)}")
    wrong += watch.found
    wrong += [f"{reason}: {message}" for message in refused if (reason := complaint(message, path))]
    if wrong:
        return Verdict(FINDING, " | ".join(wrong)[:2000])
    return Verdict(REFUSED, refused[0]) if refused else Verdict(ACCEPTED)


def _use(path: Path, refused: list[str], templates: Templates) -> None:
    """Everything once; a refusal of one thing leaves the rest to be tried."""
    source = _told(lambda: open_source(path), refused)
    if source is None:
        return
    _told(source.digest, refused)
    for name in sorted(_told(source.names, refused) or ()):
        _told(functools.partial(_read, source, name), refused)
    tokenizer = _told(source.tokenizer, refused)
    if tokenizer is None:
        return
    ids = _told(lambda: tokenizer.encode(LINE), refused)
    _told(lambda: tokenizer.decode(ids or [0, 1, 2]), refused)
    key = tokenizer.chat_template, tokenizer.bos, tokenizer.eos
    if key not in templates and tokenizer.chat_template is not None:
        _told(lambda: tokenizer.chat(MESSAGES), templates.setdefault(key, []))
    refused += templates.get(key, [])


def _read(source: Source, name: str) -> None:
    source.read(name)  # by way of `tensor`, where it is compressed
    if hasattr(source, "stored"):  # of GGUF
        source.stored(name)


def _told(do: Callable[[], Any], refused: list[str]) -> Any:
    try:
        return do()
    except UserError as error:
        refused.append(str(error))
        return None


def complaint(message: str, path: Path) -> str | None:
    """What is wrong with a refusal, or None."""
    if not message.isprintable():
        return "a refusal of several lines"
    if len(message) > LONGEST + 3:
        return "a refusal without bounds"
    if not message.endswith("."):
        return "a refusal that does not end"
    if INTERNAL.search(message.replace(str(path.parent), "")):
        return "a refusal with the insides of the program"
    if str(path) not in message and "The model's" not in message:
        return "a refusal that does not name the file"
    return None


def _where(error: BaseException) -> str:
    """The last place in planish's code."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/experiments/" in file and "/hostile/" not in file:
            found = f" at {file.rpartition('/experiments/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
