"""The methods on integers, their grid's settings beside their own: gptq(bits=3, damping=0.1)."""

import inspect
from typing import Any

from algorithms import formats
from algorithms.layerwise import LayerwiseMethod
from algorithms.quantization import gptq as _gptq
from algorithms.quantization import rtn as _rtn
from algorithms.quantization import stochastic_rounding as _stochastic

GRID = set(inspect.signature(formats.integer).parameters)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    grid = {key: value for key, value in given.items() if key in GRID}
    own = {key: value for key, value in given.items() if key not in GRID}
    return {"format": formats.integer(**grid), **own}


def rtn(**settings: Any) -> LayerwiseMethod:
    return _rtn.rtn(**_settings(settings))


def gptq(**settings: Any) -> LayerwiseMethod:
    return _gptq.gptq(**_settings(settings))


def gptq_config(**settings: Any) -> _gptq.GPTQConfig:
    return _gptq.GPTQConfig(**_settings(settings))


def stochastic_rounding(**settings: Any) -> LayerwiseMethod:
    return _stochastic.stochastic_rounding(**_settings(settings))
