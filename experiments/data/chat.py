"""Chat templates: programs in Jinja that come with a model, run by a process of their own.

Jinja's sandbox keeps a template from what is not its own, but not from loops without an end or
texts without bounds. The process that renders has seconds of one core and a bounded memory, opens
nothing for writing, and imports nothing of planish: this file is its script.
"""

import contextlib
import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

SECONDS, MEMORY = 2, 1 << 30  # of CPU time; bytes
LONGEST = 10_000_000  # characters of what is rendered
UNENDING = "it takes too much time or memory"


def render(template: str, variables: Mapping[str, Any]) -> str:
    """What a template makes of JSON variables; raises ValueError, a clause, where it fails."""
    said = json.dumps({"template": template, "variables": variables})
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(command, input=said.encode(), capture_output=True, timeout=60)
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # stopped by its limits, it says nothing
        raise ValueError(UNENDING) from None
    if "error" in found:
        raise ValueError(found["error"])
    return str(found["text"])


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
    with contextlib.suppress(ImportError, OSError, ValueError):  # the parent's clock stays
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    given = json.loads(sys.stdin.buffer.read())
    _limit()
    sys.stdout.write(json.dumps(_limited_render(given["template"], given["variables"])))
