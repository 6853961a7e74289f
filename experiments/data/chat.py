"""Chat templates: programs in Jinja that come with a model, run by a process of their own.

Jinja's sandbox keeps a template from what is not its own, but not from loops without an end or
texts without bounds. The process that renders has seconds of one core for each text and a bounded
memory, opens nothing for writing, and imports nothing of planish: this file is its script. It stays
for the texts to come, of which an evaluation has thousands, and ends with the program.
"""

import atexit
import contextlib
import datetime
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

SECONDS, MEMORY = 2, 1 << 30  # of CPU time for a text; bytes
WAITING = 60  # seconds for an answer, however busy the machine is
LONGEST = 10_000_000  # characters of what is rendered
UNENDING = "it takes too much time or memory"


def render(template: str, variables: Mapping[str, Any]) -> str:
    """What a template makes of JSON variables; raises ValueError, a clause, where it fails."""
    said = json.dumps({"template": template, "variables": variables})
    with _LOCK:
        answer = _ask(said.encode())
    try:
        found = json.loads(answer)
    except ValueError:  # stopped by its limits, it says nothing
        raise ValueError(UNENDING) from None
    if "error" in found:
        raise ValueError(found["error"])
    return str(found["text"])


_LOCK = threading.Lock()
_RENDERING: list[subprocess.Popen[bytes]] = []  # the process, once there is one


def _ask(said: bytes) -> bytes:
    """One line of JSON for another; nothing from a process that did not survive it."""
    if _RENDERING and _RENDERING[0].poll() is not None:
        close()
    if not _RENDERING:
        command, pipe = [sys.executable, "-I", __file__], subprocess.PIPE
        _RENDERING.append(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        )
    process = _RENDERING[0]
    assert process.stdin is not None and process.stdout is not None
    waiting = threading.Timer(WAITING, process.kill)
    waiting.start()
    try:
        process.stdin.write(said + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = b""
    finally:
        waiting.cancel()
    if not answer.endswith(b"\n"):
        close()
        return b""
    return answer


@atexit.register
def close() -> None:
    """End the process that renders, if there is one."""
    while _RENDERING:
        process = _RENDERING.pop()
        process.kill()
        with contextlib.suppress(OSError):  # what was not read any more
            process.communicate()


def _limited_render(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = _environment().from_string(template).render(**variables)
        if len(text) > LONGEST:
            raise ValueError(f"it makes {len(text)} characters")
        text.encode()  # raises for half a character
        return {"text": text}
    except (MemoryError, RecursionError):
        return {"error": UNENDING}
    except Exception as error:  # a template may raise anything
        return {"error": str(error) or type(error).__name__}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it, unable to reach anything outside its variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; rendered, it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit() -> None:
    """Of all that the process does; its parent has a clock of its own."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _limit_time() -> None:
    """SECONDS more; whole ones are counted."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + SECONDS, most))


if __name__ == "__main__":
    _limit()
    for line in sys.stdin.buffer:
        _limit_time()
        given = json.loads(line)
        rendered = json.dumps(_limited_render(given["template"], given["variables"]))
        sys.stdout.write(rendered + "\n")
        sys.stdout.flush()
