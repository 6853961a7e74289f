"""Seconds of compiled programs, in turns, on arguments that no cache holds."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kernels import dispatch
from kernels.workload import Arrays

CACHED = 120_000_000  # bytes: more than any cache of the device keeps
ROUNDS = 5, 20  # at least, at most
BUDGET = 0.5  # seconds for those of one shape


class Form(NamedTuple):
    """One way to do what a workload asks."""

    run: Callable[..., Any]
    arguments: Callable[[Any], Arrays]


class Program(NamedTuple):
    """A form, compiled."""

    make: Callable[..., Arrays]  # its arguments from a key
    run: Callable[..., Any]
    sets: int  # of arguments: as many as no cache holds together


def compiled(form: Form) -> Program:
    """Raises ValueError where the form does not take its arguments."""
    arguments = jax.eval_shape(form.arguments, jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    sets = max(1, min(64, -(-CACHED // max(size, 1))))
    return Program(_maker(form.arguments), jax.jit(form.run).lower(*arguments).compile(), sets)


@functools.lru_cache(maxsize=8)  # of the forms that share them
def _maker(arguments: Callable[[Any], Arrays]) -> Callable[..., Arrays]:
    return jax.jit(arguments).lower(jax.random.key(0)).compile()


def seconds(programs: Sequence[Program]) -> list[float]:
    """Seconds of each, the median over rounds in which they take turns, every run on arguments
    that the runs between have driven out of every cache; none is zeros, which some devices multiply
    faster.
    """
    keys = jax.random.split(jax.random.key(0), 64)
    made = {p.make: [p.make(key) for key in keys[: p.sets]] for p in programs}
    turns = [(_clock(p.run), made[p.make]) for p in programs]
    start = time.perf_counter()
    for clock, sets in turns:
        clock(sets)
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, int(BUDGET / (time.perf_counter() - start))))
    samples = [[clock(sets) / len(sets) for clock, sets in turns] for _ in range(rounds)]
    return [statistics.median(each) for each in zip(*samples, strict=True)]


type Clock = Callable[[list[Arrays]], float]  # seconds of a program on several sets of arguments


def _clock(run: Callable[..., Any]) -> Clock:
    return _device_time(run) or _wall_time(run)


class _InTurn(jax.stages.Wrapped):
    """A program on one set of arguments after another: as one program of its own it would be
    compiled as often as there are sets, which is what the profiler does with other functions.
    """

    def __init__(self, run: Callable[..., Any]):
        self.run = run

    def __call__(self, sets: list[Arrays]) -> list[Any]:
        return [self.run(*arguments) for arguments in sets]

    def trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    lower = trace


def _device_time(run: Callable[..., Any]) -> Clock | None:
    """Of the kernels alone, as CUPTI counts it."""
    if dispatch.device().platform != "cuda":
        return None
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.Cupti(finalize=False).measure(_InTurn(run))

    def timed(sets: list[Arrays]) -> float:
        milliseconds = measured(sets)[1]
        assert milliseconds is not None, "the program ran no kernel"
        return milliseconds / 1e3

    return timed


def _wall_time(run: Callable[..., Any]) -> Clock:
    in_turn = _InTurn(run)

    def timed(sets: list[Arrays]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(in_turn(sets))
        return time.perf_counter() - start

    return timed
