"""A step of a recipe in a few words, from its settings: "GPTQ 4 bit g64"."""

import re
from collections.abc import Mapping
from typing import Any

NAMES = {
    "aqlm": "AQLM", "awq": "AWQ", "autoround": "AutoRound", "eora": "EoRA", "gptaq": "GPTAQ",
    "gptq": "GPTQ", "hqq": "HQQ", "lqer": "LQER", "omniquant": "OmniQuant", "qtip": "QTIP",
    "quarot": "QuaRot", "quip_sharp": "QuIP#", "rtn": "RTN", "smoothquant": "SmoothQuant",
    "spinquant": "SpinQuant", "svdquant": "SVDQuant",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "AdamW", "kron": "PSGD-Kron", "mars": "MARS", "nadamw": "NAdamW",
    "normuon": "NorMuon", "sgd": "SGD", "soap": "SOAP",
}  # fmt: skip


def step_label(step: Mapping[str, Any]) -> str:
    name = step["_target_"].rsplit(".", 1)[-1]
    if name == "RoundedCache":
        return f"KV {step['element'].upper()}"
    if name == "quantized_inputs":
        static = [] if step.get("dynamic", True) is True else ["static"]
        first, *rest = _format_words(step["format"])
        rest = ["per token" if word == "per channel" else word for word in rest]
        first = f"A{first.removesuffix(' bit')}" if first.endswith(" bit") else f"A-{first}"
        return " ".join([first, *(word for word in rest if word != "symmetric"), *static])
    named = NAMES.get(name) or (name.replace("_", " ").capitalize() if "_" in name else name)
    words = [named]
    if "bits" in step:
        words.append(f"{step['bits']} bit")
    if "codebooks" in step:
        words.append(f"{step['codebooks']}x{step['codebook_bits']}")
    if "rank" in step:
        words.append(f"rank {step['rank']}")
    if "format" in step and name not in ("awq", "spinquant"):  # which are not of weights
        words += _format_words(step["format"])
    return " ".join(words)


def training_label(config: Mapping[str, Any]) -> str:
    """What trained a model, and for how long: "Muon 200 steps"."""
    return f"{_optimizer_words(config['optimizer'])} {config['steps']} steps"


def _optimizer_words(node: Mapping[str, Any]) -> str:
    """Of groups, the first; of wrappers, what they are around too."""
    if "match" in node:
        return _optimizer_words(node[next(iter(node["match"]))])
    name = node["_target_"].rsplit(".", 1)[-1]
    named = OPTIMIZERS.get(name) or name.replace("_", " ").capitalize()
    inner = node.get("inner")
    return named if inner is None else f"{named} {_optimizer_words(inner)}"


def element_bits(format: Mapping[str, Any]) -> int:
    """Bits of one element of a format: 8 of "8 bit" and of "E4M3", 4 of "NVFP4"."""
    word = _format_words(format)[0]
    digits = [int(digit) for digit in re.findall(r"\d", word)]
    return 1 + sum(digits) if re.fullmatch(r"E\dM\d", word) else digits[0]


def _format_words(format: Mapping[str, Any]) -> list[str]:
    """A format in a few words: "4 bit g64", "NVFP4", "FP8 per channel"."""
    name = format["_target_"].rsplit(".", 1)[-1]
    if name == "Format":
        element = format["element"]
        words = [f"{element['bits']} bit" if "bits" in element else element["name"].upper()]
        words.append(_scaling_words(format.get("rows"), format.get("columns")))
        return words
    if name == "integer":
        words = [f"{format.get('bits', 4)} bit"]
    elif name == "microscaling":
        words = [f"MXFP{1 + sum(int(digit) for digit in format['element'] if digit.isdigit())}"]
    else:
        words = [name.upper()]
    if name in ("integer", "nf4"):
        group = format.get("group_size", 64)
        words.append("per channel" if group is None else f"g{group}")
    if name == "fp8":
        words.append(_scaling_words(format.get("rows", 1), format.get("columns")))
    if format.get("symmetric"):
        words.append("symmetric")
    return words


def _scaling_words(rows: int | None, columns: int | None) -> str:
    if rows is None and columns is None:
        return "per tensor"
    if columns is None:
        return "per channel" if rows == 1 else f"{rows} rows"
    return f"g{columns}" if rows == 1 else f"{rows}x{columns}"
