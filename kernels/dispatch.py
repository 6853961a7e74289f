"""Which implementation of an operation runs, and why.

    reference   readable, in float32 or the arguments' wider type: what the operation means
    xla         the best form that XLA makes of it, on any device
    mosaic      our kernel, for Hopper GPUs
    interpret   that kernel, step by step on a CPU: for tests

"auto" takes the kernel only where it can run and was measured to be the fastest
(`kernels.measured`), else "xla". A named implementation runs, or is refused with the reason.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from kernels import measured

CAPABILITY = "9.0"  # of Hopper GPUs, which the kernels are written for
NAMES = ("reference", "xla", "mosaic", "interpret")


class Choice(NamedTuple):
    implementation: str
    reason: str


class Device(NamedTuple):
    """What programs are made for."""

    platform: str  # as JAX names it: "cpu", "cuda", …
    kind: str
    capability: str | None  # of compute, where the device is a GPU


_target: list[Device] = []
_chosen: dict[tuple[str, str], Choice] = {}


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str,
    *arguments: Any,
    lacks: str | None = None,
    bucket: str = "",
    **settings: Any,
) -> Any:
    """What the chosen implementation of `op` makes of the arguments.

    implementations: by name, "interpret" left out: it is "mosaic" with `interpret=True`, a setting
    that Mosaic forms have. lacks: why the kernel cannot take these arguments, in words that follow
    the name of the operation; None if it can. bucket: the class of shapes they belong to, in
    `kernels.measured`. Raises ValueError.
    """
    chosen = choose(op, implementations, implementation, lacks=lacks, bucket=bucket)
    if "mosaic" in implementations and chosen in ("mosaic", "interpret"):
        settings["interpret"] = chosen == "interpret"
        chosen = "mosaic"
    return implementations[chosen](*arguments, **settings)


def choose(
    op: str,
    implementations: Mapping[str, Any],
    implementation: str,
    *,
    lacks: str | None = None,
    bucket: str = "",
) -> str:
    """The name of the implementation; what "auto" came to is kept for `choices`."""
    known = [name for name in NAMES if name in implementations]
    if "mosaic" in implementations:
        known.append("interpret")
    if implementation == "auto":
        choice = _choose(op, implementations, lacks, bucket)
        _chosen[op, bucket] = choice
        return choice.implementation
    if implementation not in known:
        raise ValueError(
            f"implementation={implementation!r} is not one of {', '.join(['auto', *known])}."
        )
    if implementation in ("mosaic", "interpret") and lacks is not None:
        raise ValueError(f"implementation={implementation!r} of {op} {lacks}: choose 'xla'.")
    if implementation == "mosaic" and (unable := _unable(device())) is not None:
        raise ValueError(
            f"implementation='mosaic' of {op} {unable}: choose 'xla', or 'interpret' to run the "
            "kernel on a CPU."
        )
    return implementation


def _choose(op: str, implementations: Mapping[str, Any], lacks: str | None, bucket: str) -> Choice:
    where = device()
    if "mosaic" not in implementations:
        return Choice("xla", "there is no kernel of it")
    if (unable := _unable(where)) is not None:
        return Choice("xla", f"the kernel {unable}")
    if lacks is not None:
        return Choice("xla", f"the kernel {lacks}")
    faster = measured.TIMES_FASTER.get((where.kind, op, bucket))
    if faster is None:
        return Choice("xla", f"the kernel was not measured on {where.kind} for {bucket}")
    if faster <= 1:
        return Choice("xla", f"the kernel is {faster:.2f} times as fast on {where.kind}")
    return Choice("mosaic", f"measured to be {faster:.2f} times as fast on {where.kind}")


def _unable(where: Device) -> str | None:
    if where.capability == CAPABILITY:
        return None
    what = f"a {where.kind}" if where.capability is None else f"compute {where.capability}"
    return f"needs an NVIDIA GPU of compute capability {CAPABILITY}, and this is {what}"


def note(op: str, implementation: str, reason: str) -> None:
    """Keep for `choices` what an operation came to by itself."""
    _chosen[op, ""] = Choice(implementation, reason)


def choices() -> dict[str, dict[str, str]]:
    """What "auto" came to so far in this process, and why: {"op, shapes": {…}}."""
    return {", ".join(filter(None, key)): choice._asdict() for key, choice in _chosen.items()}


def device() -> Device:
    """What programs are made for: the default device, or that of `compiling_for`."""
    return _target[-1] if _target else described(jax.devices()[0])


def described(found: Any) -> Device:
    platform = "cuda" if found.platform == "gpu" else found.platform
    return Device(platform, found.device_kind, getattr(found, "compute_capability", None))


@contextlib.contextmanager
def compiling_for(target: Any) -> Iterator[None]:
    """Programs are made for another device than the default one, such as one that is not there."""
    _target.append(described(target))
    try:
        yield
    finally:
        _target.pop()
