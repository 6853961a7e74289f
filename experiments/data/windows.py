"""Windows of tokens: what calibration observes and what evaluation scores.

Shapes: n calibration windows and m held-out windows of T tokens each, none with a bos token.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError


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
    calibration: int  # windows
    heldout: int  # windows

    def validate(self, longest: int | None = None) -> None:
        """Raise UserError unless the sizes make sense for a model of `longest` tokens at most."""
        for option, value, least in (
            ("context", self.context, 2),  # the loss needs a token to predict from
            ("calibration", self.calibration, 1),
            ("heldout", self.heldout, 1),
        ):
            if value < least:
                raise UserError(f"data.{option}={value} is too small: ask for {least} at least.")
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
) -> Windows:
    """The asked numbers of windows, evenly spread over those at hand.

    Raises UserError if there are too few.
    """
    calibration = _choose(calibration, sizes.calibration, name, "calibration")
    heldout = _choose(heldout, sizes.heldout, name, "heldout")
    return Windows(calibration, heldout, name, digest(calibration, heldout))


def _choose(tokens: np.ndarray, count: int, name: str, part: str) -> np.ndarray:
    available, context = tokens.shape
    if count > available:
        raise UserError(
            f"{name} holds {available} {part} windows of {context} tokens, fewer than "
            f"data.{part}={count}: ask for fewer or shorter ones, or choose data with more text."
        )
    return tokens[spread(available, count)]


def cut(text: str, tokenizer: Tokenizer, vocabulary: int, sizes: Sizes, name: str) -> Windows:
    """Protocol E's windows of a text: first half calibration, second half held out, no bos.

    Each half is encoded by itself and cut into consecutive windows; a last, shorter one is dropped.
    Raises UserError if the text is empty, too short for the windows asked for, or has tokens that
    the model's vocabulary lacks.
    """
    if not text.strip():
        raise UserError(f"{name} holds no text: give a text to calibrate on and to evaluate.")
    first, second = (tokenizer.encode(half) for half in halves(text))
    largest = max(first + second, default=0)
    if largest >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {largest} for {name}, but the model's vocabulary ends at "
            f"{vocabulary - 1}: use the tokenizer that belongs to the model."
        )
    return collect(
        _consecutive(first, sizes.context), _consecutive(second, sizes.context), sizes, name
    )


def halves(text: str) -> tuple[str, str]:
    """The text before and after the first blank line that follows its middle character.

    A text without one there is split at the middle character itself.
    """
    middle = len(text) // 2
    blank = text.find("\n\n", middle)
    if blank < 0:
        return text[:middle], text[middle:]
    return text[:blank], text[blank:].lstrip("\n")


def _consecutive(ids: list[int], context: int) -> Int32[np.ndarray, "n T"]:
    whole = len(ids) // context
    return np.array(ids[: whole * context], np.int32).reshape(whole, context)
