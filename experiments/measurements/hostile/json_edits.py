"""Damage to JSON that stays JSON, or nearly: values that no reader expects, keys lost and doubled.

What JSON cannot hold (a key twice, a number beyond all floats, ten thousand brackets) goes in as a
mark, which `text` replaces once the rest is written.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

DEEP = "[" * 10_000 + "]" * 10_000
MARKS = {"@deep": DEEP, "@overflow": "1e400", "@digits": "9" * 5000, "@lone": '"\\ud800"'}
TWICE = "@twice:"
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 5, 7, 255, 65_537, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    10**9, 10**12, 10**30, -(2**31), -(2**63), 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf,
    math.nan, "@overflow", "@digits",
]  # fmt: skip
VALUES: list[Any] = [
    *NUMBERS, None, True, False, "", "x", "@lone", "\x00", "\x1b[31mred\nsecond line", "../outside",
    "../../outside/canary.json", "/etc/passwd", "re:(a+)+$", "re:(.*)*x", "^(a|a)*$", "A" * 10_000,
    [], {}, [[]], [None], [1] * 1000, {"a": {}}, {"": None}, ["x", 1, None], "@deep",
]  # fmt: skip

type Place = tuple[Any, Any]  # an object or a list, and the key or number of what it holds


def text(content: Any) -> str:
    """JSON, with what the marks stand for."""
    found = json.dumps(content)
    for mark, raw in MARKS.items():
        found = found.replace(json.dumps(mark), raw)
    return re.sub(f'"{TWICE}', '"', found)


def anywhere(rng: random.Random, content: Any) -> Place | None:
    """A place on a walk from the outermost object, which ends early as often as not."""
    place, here = None, content
    while isinstance(here, dict | list) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        place, here = (here, key), here[key]
        if rng.random() < 0.35:
            break
    return place


def _places(content: Any) -> Iterator[Place]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _numbered(rng: random.Random, content: Any) -> Place | None:
    found = [(c, k) for c, k in _places(content) if type(c[k]) in (int, float)]
    return rng.choice(found) if found else None


def _keyed(rng: random.Random, content: Any) -> Place | None:
    found = [(c, k) for c, k in _places(content) if isinstance(c, dict)]
    return rng.choice(found) if found else None


def value(rng: random.Random, content: Any) -> None:
    """One value becomes another that nobody expects there."""
    if (place := anywhere(rng, content)) is not None:
        place[0][place[1]] = rng.choice(VALUES)


def number(rng: random.Random, content: Any) -> None:
    """A number becomes its neighbour, its negative, its text, or one of NUMBERS."""
    if (place := _numbered(rng, content)) is not None:
        held, key = place
        n = held[key]
        held[key] = rng.choice([*NUMBERS, n + 1, n - 1, -n, 2 * n, float(n), str(n), [n], n == 1])


def dropped(rng: random.Random, content: Any) -> None:
    if (place := anywhere(rng, content)) is not None:
        del place[0][place[1]]


def renamed(rng: random.Random, content: Any) -> None:
    if (place := _keyed(rng, content)) is not None:
        held, key = place
        held[rng.choice([key.upper(), f"{key}x", key[:-1], "", "__class__", "weight"])] = held.pop(
            key
        )


def twice(rng: random.Random, content: Any) -> None:
    if (place := _keyed(rng, content)) is not None:
        held, key = place
        held[TWICE + key] = rng.choice([held[key], rng.choice(VALUES)])


def swapped(rng: random.Random, content: Any) -> None:
    places = [place for place in (anywhere(rng, content) for _ in range(2)) if place is not None]
    if len(places) == 2:
        (a, i), (b, j) = places
        a[i], b[j] = json.loads(json.dumps(b[j])), json.loads(json.dumps(a[i]))


def grown(rng: random.Random, content: Any) -> None:
    """A list or text becomes long, an object gets another's things."""
    if (place := anywhere(rng, content)) is not None:
        held, key = place
        here = held[key]
        longer = isinstance(here, list | str) and here
        held[key] = here * rng.choice([2, 100, 1000]) if longer else [here] * 1000


EDITS: dict[str, Callable[[random.Random, Any], None]] = {
    "a value of another kind": value,
    "another number": number,
    "a key dropped": dropped,
    "a key renamed": renamed,
    "a key twice": twice,
    "two values swapped": swapped,
    "a list or text grown": grown,
}
