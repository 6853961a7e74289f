"""Windows of tokens: what calibration observes and what evaluation scores.

Shapes: n calibration windows and m held-out windows of T tokens each, without bos unless a corpus
says so.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError

DRAWS = ("even", "random")


class Windows(NamedTuple):
    """Calibration and held-out tokens, and what they are."""

    calibration: Int32[np.ndarray, "n T"]
    heldout: Int32[np.ndarray, "m T"]
    name: str  # of the data, for tables and records
    digest: str  # SHA-256 of the tokens and their shapes, in hexadecimal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many windows are asked for, and how long they are."""

    context: int  # tokens in a window
    calibration: int | None  # windows; None: all there are
    heldout: int | None
    draw: str = "even"  # which to calibrate on where there are more: spread evenly, or at random

    def validate(self, longest: int | None = None) -> None:
        """Raise UserError unless the sizes make sense for a model of `longest` tokens at most."""
        for option, value, least in (
            ("context", self.context, 2),  # the loss needs a token to predict from
            ("calibration", 1 if self.calibration is None else self.calibration, 1),
            ("heldout", 1 if self.heldout is None else self.heldout, 1),
        ):
            if not isinstance(value, int):
                raise UserError(f"data.{option}={value!r} is not a whole number: ask for one.")
            if value < least:
                raise UserError(f"data.{option}={value} is too small: ask for {least} at least.")
        if self.draw not in DRAWS:
            raise UserError(f"data.draw={self.draw} is unknown: choose {' or '.join(DRAWS)}.")
        if longest is not None and self.context > longest:
            raise UserError(
                f"data.context={self.context} is longer than the model allows: "
                f"ask for {longest} tokens at most."
            )


def spread(available: int, count: int) -> Int[np.ndarray, " n"]:
    """`count` indices evenly spread over 0 … available - 1: linspace(0, available - 1, count),
    rounded down.

    In whole numbers, so that no last bit of a float moves an index. Raises ValueError if fewer are
    available than asked for.
    """
    if not 0 < count <= available:
        raise ValueError(f"count={count} must be from 1 to available={available}.")
    return np.arange(count) * (available - 1) // max(count - 1, 1)


def digest(*parts: Int32[np.ndarray, "_ T"]) -> str:
    """SHA-256 over the shapes and the tokens as little-endian int32."""
    content = hashlib.sha256(" ".join(str(tokens.shape) for tokens in parts).encode())
    for tokens in parts:
        content.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    return content.hexdigest()


def collect(
    calibration: Int32[np.ndarray, "N T"],
    heldout: Int32[np.ndarray, "M T"],
    sizes: Sizes,
    name: str,
    *,
    names: tuple[str, str] | None = None,
    seed: int = 0,
) -> Windows:
    """The asked numbers of windows out of those at hand.

    Held-out windows are evenly spread; calibration windows too, unless `sizes` has them drawn at
    random by `seed`, without replacement. names: what calibration and held-out windows come from,
    where that is not the same. Raises UserError if there are too few.
    """
    sources = names or (name, name)
    calibration = _available(calibration, sizes.calibration, sources[0], "calibration")
    heldout = _available(heldout, sizes.heldout, sources[1], "heldout")
    count = sizes.calibration or len(calibration)
    if sizes.draw == "random":
        drawn = np.sort(np.random.default_rng(seed).choice(len(calibration), count, replace=False))
    else:
        drawn = spread(len(calibration), count)
    calibration = calibration[drawn]
    heldout = heldout[spread(len(heldout), sizes.heldout or len(heldout))]
    return Windows(calibration, heldout, name, digest(calibration, heldout))


def _available(tokens: np.ndarray, count: int | None, name: str, part: str) -> np.ndarray:
    available, context = tokens.shape
    if available < (count or 1):
        asked = f"data.{part}={count}" if count else "one"
        raise UserError(
            f"{name} holds {available} {part} windows of {context} tokens, fewer than {asked}: "
            "ask for fewer or shorter ones, or choose data with more text."
        )
    return tokens


def cut(
    text: str, tokenizer: Tokenizer, vocabulary: int, sizes: Sizes, name: str, *, seed: int = 0
) -> Windows:
    """Protocol E's windows of a text: first half calibration, second half held out, no bos.

    Each half is encoded by itself and cut into consecutive windows; a last, shorter one is dropped.
    Raises UserError if the text is empty, too short for the windows asked for, or has tokens that
    the model's vocabulary lacks.
    """
    if not text.strip():
        raise UserError(f"{name} holds no text: give a text to calibrate on and to evaluate.")
    first, second = (encode(half, tokenizer, vocabulary, name) for half in halves(text))
    return collect(
        consecutive(first, sizes.context),
        consecutive(second, sizes.context),
        sizes,
        name,
        seed=seed,
    )


def encode(text: str, tokenizer: Tokenizer, vocabulary: int, name: str) -> list[int]:
    """Tokens of a text, without bos; raises UserError if the model's vocabulary lacks one."""
    ids = tokenizer.encode(text)
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {largest} for {name}, but the model's vocabulary ends at "
            f"{vocabulary - 1}: use the tokenizer that belongs to the model."
        )
    return ids


def halves(text: str) -> tuple[str, str]:
    """The text before and after the first blank line that follows its middle character.

    A text without one there is split at the middle character itself.
    """
    middle = len(text) // 2
    blank = text.find("\n\n", middle)
    if blank < 0:
        return text[:middle], text[middle:]
    return text[:blank], text[blank:].lstrip("\n")


def consecutive(ids: list[int], context: int) -> Int32[np.ndarray, "n T"]:
    """Windows of `context` tokens, one after the other; what is left at the end is dropped."""
    whole = len(ids) // context
    return np.array(ids[: whole * context], np.int32).reshape(whole, context)
