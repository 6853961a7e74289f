"""A config.json of transformers: its settings, checked as they are asked for.

Settings are read as transformers 5 reads them, older spellings included: `rope_parameters` or the
older `rope_theta` and `rope_scaling`, `layer_types` or what they follow from.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UserError
from experiments.untrusted import LARGEST
from models.rope import RopeScaling

MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def activation_name(kind: str) -> str:
    """The way back."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)


class Rope(NamedTuple):
    """Rotary positions as a model's configuration has them."""

    theta: float
    scaling: RopeScaling | None
    share: float  # of each head that is turned


class Raw:
    """The settings of one file."""

    def __init__(self, settings: Mapping[str, Any], path: Path):
        self.settings, self.path = settings, path

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST:
            raise UserError(
                f"{self.path} has {key}={value!r} where a positive whole number is expected: fetch "
                "the file again."
            )
        return value

    def layers(self, key: str = "num_hidden_layers") -> int:
        """How many blocks there are, of which lists are made before any tensor is looked for."""
        if (layers := self.count(key)) > MOST_LAYERS:
            raise UserError(
                f"{self.path} has {key}={layers}, and planish runs up to {MOST_LAYERS} layers: "
                "fetch the file again."
            )
        return layers

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(float(value)):
            raise UserError(
                f"{self.path} has {key}={value!r} where a number is expected: fetch the file again."
            )
        return float(value)

    def require(self, key: str, *runs: Any) -> None:
        """Refuse a setting that is not one of `runs`, the first of which is its default."""
        if (value := self.get(key, runs[0])) not in runs:
            known = " or ".join(map(repr, runs))
            raise UserError(f"{self.path} has {key}={value!r} where planish runs {known} only.")

    def activation(self, key: str, default: str) -> str:
        name = self.get(key) or default
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{self.path} has {key}={name!r} where planish runs {known} only.")
        return ACTIVATIONS[name]

    def rope(self, theta: float = 10000.0, kind: str | None = None) -> Rope:
        """The rotary positions; kind: of which layers, where they differ. theta: by default."""
        said = self.get("rope_scaling") or self.get("rope_parameters") or {}
        if kind is not None and isinstance(said.get(kind), dict):
            said = said[kind]
        form = said.get("rope_type", said.get("type", "default"))
        nested = any(isinstance(value, dict) for value in said.values())
        if nested or form not in SCALINGS:
            what = "one per kind of layer" if nested else str(form)
            raise UserError(
                f"{self.path} has rotary positions of a kind that planish does not run ({what}): "
                f"it runs {', '.join(SCALINGS)}."
            )
        share = said.get("partial_rotary_factor", self.get("partial_rotary_factor")) or 1.0
        try:
            base = float(said.get("rope_theta", self.get("rope_theta", theta)))
            return Rope(base, SCALINGS[form](said, self.settings), float(share))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} has incomplete rotary parameters ({error!r}): fetch the file again."
            ) from error

    def layer_types(self, default: Sequence[str]) -> list[str]:
        """Of each layer: full_attention or sliding_attention."""
        found = list(self.get("layer_types") or default)
        if unknown := set(found) - {FULL, SLIDING}:
            raise UserError(
                f"{self.path} has layers of type {min(unknown)}, which planish does not run."
            )
        return found

    def windows(self, types: Sequence[str], window: int | None) -> tuple[int | None, ...] | None:
        """The sliding window of each layer; None where every layer sees everything."""
        if window is None or SLIDING not in types:
            return None
        return tuple(window if kind == SLIDING else None for kind in types)


def _llama3(said: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling:
    key = "original_max_position_embeddings"
    return RopeScaling(
        kind="llama3",
        factor=float(said["factor"]),
        low_frequency_factor=float(said["low_freq_factor"]),
        high_frequency_factor=float(said["high_freq_factor"]),
        original_context=int(raw.get(key) or said.get(key) or raw["max_position_embeddings"]),
    )


def _longrope(said: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling:
    key, context = "original_max_position_embeddings", raw["max_position_embeddings"]
    original = int(raw.get(key) or said.get(key) or context)
    factor = float(said.get("factor") or context / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_context=original,
        short=tuple(map(float, said["short_factor"])),
        long=tuple(map(float, said["long_factor"])),
        stretch=float(said.get("attention_factor") or usual),
    )


SCALINGS = {
    "default": lambda said, raw: None,
    "linear": lambda said, raw: RopeScaling(kind="linear", factor=float(said["factor"])),
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,
}


def scaling_settings(s: RopeScaling) -> dict[str, Any]:
    """The way back."""
    if s.kind == "linear":
        return {"rope_type": "linear", "factor": s.factor}
    if s.kind == "longrope":
        return {
            "rope_type": "longrope", "factor": s.factor, "attention_factor": s.stretch,
            "original_max_position_embeddings": s.original_context,
            "short_factor": list(s.short), "long_factor": list(s.long),
        }  # fmt: skip
    return {
        "rope_type": "llama3", "factor": s.factor,
        "low_freq_factor": s.low_frequency_factor, "high_freq_factor": s.high_frequency_factor,
        "original_max_position_embeddings": s.original_context,
    }  # fmt: skip


def window_settings(windows: Sequence[int | None] | None) -> dict[str, Any]:
    """The way back from `windows`, where layers differ."""
    found = [w for w in windows or () if w is not None]
    if windows is None or not found:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": found[0],
        "max_window_layers": list(windows).index(found[0]),  # of older readers, which know no list
        "layer_types": [FULL if w is None else SLIDING for w in windows],
    }
