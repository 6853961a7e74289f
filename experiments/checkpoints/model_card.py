"""The README.md of an exported model: what was done to it, what that cost, how it is loaded."""

from collections.abc import Mapping
from typing import Any

from experiments.evaluation.footprint import Footprint
from experiments.step_labels import step_label


def card(notes: Mapping[str, Any], *, method: str | None, dtype: str, sparse: bool = False) -> str:
    """Markdown. notes: as a checkpoint keeps them, and `measured`: metrics and footprint, if known.

    method: quant_method of the config.json; None where all weights are dense. sparse: whether
    weights are stored without their zeros.
    """
    sections = [
        _front(method),
        f"# {_title(notes)}\n\nWritten by planish.",
        f"## What was done\n\n{_recipe(notes)}",
        f"## What it cost\n\n{_measured(notes.get('measured'))}",
        f"## How to load it\n\n{_loading(method, dtype, sparse)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front(method: str | None) -> str:
    tags = "" if method is None else f"\ntags: [{method}]"
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation{tags}\n---"


def _title(notes: Mapping[str, Any]) -> str:
    return str((notes.get("source") or {}).get("location", "A model"))


def _recipe(notes: Mapping[str, Any]) -> str:
    steps = [f"{n}. {_step(step)}" for n, step in enumerate(notes.get("recipe") or [], 1)]
    lines = steps or ["Nothing: the weights are those of the source."]
    if cut := notes.get("structure"):
        lines += ["", _cut(cut)]
    source, calibration = notes.get("source") or {}, notes.get("calibration") or {}
    if source:
        lines += ["", f"Source: {source['location']}, SHA-256 {source['digest']}."]
    if calibration and steps:
        lines += [f"Calibration text: {calibration['name']}, SHA-256 {calibration['digest']}."]
    if notes.get("identity"):
        lines += [f"Run: {notes['identity']}."]
    return "\n".join(lines)


def _cut(cut: Mapping[str, Any]) -> str:
    """What a structure left of the model, in a sentence."""
    said = {key: pair for key, pair in cut.items() if key not in ("removed", "scores")}
    (before, after), sizes = said.pop("parameters"), said
    changed = [f"{key.replace('_', ' ')} {a} of {b}" for key, (b, a) in sizes.items() if a != b]
    return f"{after:,} of {before:,} parameters stay{': ' if changed else ''}{', '.join(changed)}."


def _step(step: Any) -> str:
    if not isinstance(step, Mapping):
        return str(step)
    if "rule" in step:
        algorithm = step.get("algorithm", {})
        named = algorithm and algorithm.get("_target_") and "format" not in algorithm
        what = "stays dense" if algorithm is None else "has settings of its own"
        return f"`{step['rule']}` {step_label(algorithm) if named else what}."
    return f"{step_label(step)} (`{step['_target_']}`)."


def _measured(measured: Mapping[str, Any] | None) -> str:
    """With its protocol: a number without one says nothing."""
    if not measured:
        return "Not measured."
    lines = []
    if found := (measured.get("metrics") or {}).get("perplexity"):
        windows, tokens = found["windows"]
        lines += [
            f"Perplexity {found['value']:.3f} ± {found['standard_error']:.3f} (standard error over "
            f"windows) on {windows} windows of {tokens} tokens of {found['data']['name']}, SHA-256 "
            f"{found['data']['digest']}: each window on its own, no token in front, loss over its "
            "second to last token, the exponential of the mean."
        ]
    if size := measured.get("footprint"):
        bits = Footprint(**size).bits_per_weight
        lines += [f"{bits:.3f} bits per weight in the compressed layers, scales and zero points "
                  "counted, as planish stores them."]  # fmt: skip
    return "\n\n".join(lines) or "Not measured."


def _loading(method: str | None, dtype: str, sparse: bool) -> str:
    needs = "transformers" + (f" {method}" if method == "compressed-tensors" else "")
    if sparse:
        return (
            "compressed-tensors kept weights without their zeros so until its version 0.14, whose\n"
            "compressors decompress them (`pip install 'compressed-tensors<0.15'`). Later\n"
            "versions, and servers, do not load them.\n"
            "In planish: `python -m experiments.evaluate model=local model.path=PATH`."
        )
    return (
        f"```python\n# pip install torch {needs}\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH")  # in {dtype}\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n\n'
        f"What was measured was computed in float32; in {dtype}, scales and sums are rounded too.\n"
        "In planish: `python -m experiments.evaluate model=local model.path=PATH`."
    )
