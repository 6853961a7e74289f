"""A step of a recipe in a few words, from its settings: "GPTQ 4 bit g64"."""

import re
from collections.abc import Mapping
from typing import Any

NAMES = {
    "admm": "ADMM", "aqlm": "AQLM", "asvd": "ASVD", "autoround": "AutoRound", "awq": "AWQ",
    "efficient_qat": "EfficientQAT", "eora": "EoRA", "gptaq": "GPTAQ", "gptq": "GPTQ",
    "hc_smoe": "HC-SMoE", "hqq": "HQQ",
    "llm_pruner": "LLM-Pruner", "lqer": "LQER", "magnitude": "Magnitude", "minitron": "Minitron",
    "oats": "OATS", "omniquant": "OmniQuant", "once_for_all": "Once-for-all", "puzzle": "Puzzle",
    "qtip": "QTIP", "quarot": "QuaRot", "quip_sharp": "QuIP#", "reap": "REAP", "rtn": "RTN",
    "shortened_llama": "Shortened LLaMA", "shortgpt": "ShortGPT", "slicegpt": "SliceGPT",
    "smoothquant": "SmoothQuant", "sparsegpt": "SparseGPT", "spinquant": "SpinQuant", "svd": "SVD",
    "svd_llm": "SVD-LLM", "svdquant": "SVDQuant", "wanda": "Wanda",
}  # fmt: skip
TRAINED = {
    "adamw": "AdamW", "kron": "PSGD-Kron", "mars": "MARS", "nadamw": "NAdamW",
    "normuon": "NorMuon", "scale_by_sm3": "SM3", "sgd": "SGD", "soap": "SOAP",
    "e2e_qp": "E2E-QP", "dora": "DoRA", "ema": "EMA", "ema_nesterov": "EMA-Nesterov",
    "fitnets": "FitNets", "forward_kl": "forward KL", "fp8": "FP8", "gkd": "GKD", "jsd": "JSD",
    "lawa": "LAWA", "loftq": "LoftQ", "lora": "LoRA", "lsq": "LSQ", "lsq_plus": "LSQ+",
    "masked": "kept mask", "minillm": "MiniLLM", "minilm": "MiniLM", "mxfp4": "MXFP4",
    "nvfp4": "NVFP4", "pact": "PACT",
    "qlora": "QLoRA", "reverse_kl": "reverse KL", "rigl": "RigL", "snoo": "SNOO",
    "sparse_evolutionary": "SET", "sr_ste": "SR-STE", "static": "static sparsity", "ste": "STE",
    "tail_ema": "tail EMA", "tinybert": "TinyBERT",
}  # fmt: skip
STRUCTURES = "experiments.structures."
SIZES = ("hidden", "heads", "kv_heads", "feed_forward", "experts")
ALLOCATIONS = {"autoquantize": "AutoQuantize", "hawq": "HAWQ-V2", "kl": "KL", "lamp": "LAMP",
               "owl": "OWL"}  # fmt: skip
AROUND = ("loss", "elastic", "parametrization", "precision", "sparsity", "outer", "averaging")


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
    if step["_target_"].startswith(STRUCTURES):
        return " ".join([named, *_structure_words(step)])
    words = [named]
    if "bits" in step:
        words.append(f"{step['bits']} bit")
    if "codebooks" in step:
        words.append(f"{step['codebooks']}x{step['codebook_bits']}")
    if "rank" in step:
        words.append(f"rank {step['rank']}")
    if "ratio" in step:
        words.append(f"{100 * step['ratio']:g} % left")
    if step.get("block") is not None:
        words.append(f"{step['keep']}:{step['block']}")
    elif "sparsity" in step:
        sparsity = step["sparsity"]
        words.append(sparsity if isinstance(sparsity, str) else f"{100 * sparsity:g} %")
    if step.get("format") and name not in ("awq", "spinquant"):  # which are not of weights
        words += _format_words(step["format"])
    if step.get("factors"):
        words.append(f"in {step_label(step['factors'])}")
    return " ".join(words)


def _structure_words(step: Mapping[str, Any]) -> list[str]:
    """How much goes, or stays: "20 %", "less 6 blocks", "feed_forward 1152"."""
    if "budgets" in step:
        return _budget_words(step["budgets"], fractions=step["_target_"].endswith(".puzzle"))
    if step["_target_"].endswith(".subnetwork"):
        return [f"{key} {step[key]}" for key in ("layers", *SIZES) if step.get(key) is not None]
    words = [step["score"]] if "score" in step else []
    layers = step.get("layers")
    if isinstance(layers, list):
        return [*words, "less blocks", *map(str, layers)]
    if layers is not None:
        return [*words, f"less {layers} block{'s' if layers != 1 else ''}"]
    sizes = [f"{key} {step[key]}" for key in SIZES if step.get(key) is not None]
    return words + (sizes or [f"{100 * step['fraction']:g} %"] if "fraction" in step else sizes)


def allocation_label(node: Mapping[str, Any]) -> str:
    """What gives layers settings of their own, and within what: "AutoQuantize to 3.5 bits"."""
    name = _last_name(node.get("score") or node)
    words = [ALLOCATIONS.get(name) or name.replace("_", " ").capitalize()]
    return " ".join(words + _budget_words(node.get("budgets") or {}))


def _budget_words(budgets: Mapping[str, Any], *, fractions: bool = False) -> list[str]:
    """ "to 3.5 bits", or where they are fractions "to 80 % of parameters"."""
    given = {key: value for key, value in budgets.items() if value is not None}
    each = [
        f"{100 * value:g} % of {key}" if fractions else f"{value:g} {key}"
        for key, value in given.items()
    ]
    said = " and ".join(each)
    return [f"to {said}"] if given else []


def with_options(step: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """A step as the options of an allocation leave it: bits 2/3/4 where each has its own."""
    options = [option for option in node.get("options") or [] if option]
    return _overlaid(step, options) if all("_target_" not in o for o in options) else dict(step)


def _overlaid(step: Mapping[str, Any], options: list[Mapping[str, Any]]) -> dict[str, Any]:
    found = dict(step)
    for key in {key for option in options for key in option} & found.keys():
        own = [option.get(key, step[key]) for option in options]
        if isinstance(step[key], Mapping):
            found[key] = _overlaid(step[key], own)
        elif len(set(map(str, own))) > 1:
            found[key] = "/".join(
                f"{value:g}" if type(value) is float else str(value) for value in own
            )
        else:
            found[key] = own[0]
    return found


def training_label(config: Mapping[str, Any]) -> str:
    """What trained a model, and for how long: "Muon 200 steps + forward KL + STE"."""
    words = [f"{_optimizer_words(config['optimizer'])} {config['steps']} steps"]
    for group in AROUND:
        node = config.get(group) or {"_target_": "CrossEntropy"}
        inner = [each for each in node.values() if isinstance(each, Mapping) and "_target_" in each]
        if group == "elastic" and config.get(group):
            words.append(_networks_words(node))
            continue
        name = _last_name(inner[-1] if group == "loss" and inner else node)
        if name != "CrossEntropy":
            stabilized = "rs" if node.get("rank_stabilized") else ""
            words.append(stabilized + (TRAINED.get(name) or name.replace("_", " ")))
    compressed = config["model"].get("command") == "compress"  # what was trained, its page says
    return " + ".join(words) + (origin(config) if compressed else "")


def origin(config: Mapping[str, Any]) -> str:
    """Which run made the model that a run began with: " from algorithm=gptq bits=3"; else empty."""
    model = config.get("model") or {}
    return f" from {' '.join(model['overrides'])}" if "command" in model else ""


def _networks_words(node: Mapping[str, Any]) -> str:
    """What a step trains: "sandwich", or which networks where that leaves some out."""
    ends = [each for each in ("largest", "smallest") if node[each]]
    if len(ends) == 2:
        return "sandwich" if node["distilled"] else "sandwich without distillation"
    drawn = [f"{node['random']} drawn"] if node["random"] else []
    return f"{' and '.join([*ends, *drawn])} alone"


def _optimizer_words(node: Mapping[str, Any]) -> str:
    """Of groups and chains, the first; of wrappers, what they are around too."""
    if "match" in node:
        return _optimizer_words(node[next(iter(node["match"]))])
    if "_args_" in node:
        return _optimizer_words(node["_args_"][0])
    name = _last_name(node)
    named = TRAINED.get(name) or name.replace("_", " ").capitalize()
    inner = node.get("inner")
    return named if inner is None else f"{named} {_optimizer_words(inner)}"


def _last_name(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rsplit(".", 1)[-1]


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
