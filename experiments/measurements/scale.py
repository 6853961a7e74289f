"""Does a model far larger than memory pass? Random weights in the shapes of large models, a few
blocks of each, compressed, evaluated and exported in one run; its peak memory beside what one block
and the activations take, and the estimate of the whole model.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from omegaconf import OmegaConf

from experiments import hardware, programs, progress
from experiments.checkpoint_size import kinds_of
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.families.raw import Raw
from experiments.checkpoints.sources import Source, shapes
from experiments.data.tokenizer import Tokenizer
from experiments.files import write_whole
from experiments.measurements.estimates import MEASURING, of_record
from experiments.operations import size
from experiments.recipe_builder import build_recipe
from experiments.recipes import Recipe
from models.config import DecoderConfig

type Runner = Callable[[str, Path, list[str]], dict[str, Any]]  # command, folder, overrides: record

CALIBRATION = (128, 2048)  # windows and tokens of each, for the estimates of whole models

_LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# The published config.json of Llama 3, what shapes follow from.
MODELS: dict[str, dict[str, Any]] = {
    "llama_3_8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama_3_70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def config_of(name: str) -> DecoderConfig:
    return FAMILIES["llama"].read(Raw(MODELS[name], Path(f"{name}/config.json")))


def scale(plain: dict[str, Any], source: Source, folder: Path, run: Runner) -> list[dict[str, Any]]:
    """A row for each model of `scaled` and recipe of `scale_recipes`; `source` gives a tokenizer.

    Rows are kept as they are done, for the same command to go on. run: one command in a new
    process.
    """
    kept, wanted = folder / "scale.json", plain["scale_recipes"]
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    with progress.steps("scale", len(plain["scaled"]) * len(wanted)) as step:
        for name, blocks in plain["scaled"].items():
            done = [row["recipe"] for row in rows if row["model"] == name]
            for _ in done:
                step("kept")
            few = dataclasses.replace(config_of(name), layers=blocks)
            for recipe in [recipe for recipe in wanted if recipe not in done]:
                with _random_model(few, source.tokenizer(), folder / name) as model:
                    settings = ["model=local", f"model.path={model}", *recipe, *plain["scale"]]
                    found = _row(settings, few, config_of(name), folder / "run", run)
                rows.append({"model": name, "recipe": recipe, **found})
                write_whole(kept, json.dumps(rows))
                step(f"{name} {' '.join(recipe)}: {found['peak_memory'] / 1e9:.1f} GB")
    return rows


@contextlib.contextmanager
def _random_model(config: DecoderConfig, tokenizer: Tokenizer, folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        write_random_model(config, tokenizer, folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def _row(
    settings: list[str], few: DecoderConfig, whole: DecoderConfig, where: Path, run: Runner
) -> dict[str, Any]:
    shutil.rmtree(where, ignore_errors=True)
    record = run("compress", where, settings)
    found = row(record, few, whole) | _read_back(record, where, settings, run)
    shutil.rmtree(where)
    return found


def row(record: dict[str, Any], few: DecoderConfig, whole: DecoderConfig) -> dict[str, Any]:
    """What the run held beside what a block and the activations take, as float32; the estimate of
    the whole model, calibrated as papers do.
    """
    recipe = build_recipe(OmegaConf.create(record["config"]), few)
    windows, context = record["data"]["calibration"]
    calibrated = recipe.needs_data(few)
    tokens = windows * context if calibrated else 0
    widest = shapes(few)["blocks.0.mlp.down.weight"][1]
    block = 4 * sum(math.prod(s) for n, s in shapes(few).items() if n.startswith("blocks.0."))
    held = {
        "block": block,
        "statistics": _statistics(few, recipe) if calibrated else 0,
        "activations": 4 * tokens * (few.hidden + widest),
    }
    found = of_record(record, whole, hardware.product_rate(MEASURING), True, CALIBRATION)
    return {
        "blocks": few.layers,
        "held": held,
        "memory_at_start": record["memory_at_start"],
        "peak_memory": record["peak_memory"],
        "seconds": record["seconds"],
        "estimated_memory": record["estimate"]["memory"],
        "whole": {"blocks": whole.layers, "calibration": CALIBRATION, **found._asdict()},
    }


def _statistics(config: DecoderConfig, recipe: Recipe) -> int:
    """Bytes of the largest site's."""
    (kind,) = kinds_of(config, recipe)
    groups = programs.groups(config, kind.layer, dict(kind.methods))
    return max(size(programs.site_shapes(config, group)[1]) for group in groups)


def _read_back(
    record: dict[str, Any], where: Path, settings: list[str], run: Runner
) -> dict[str, Any]:
    """Evaluate the export as a model of its own."""
    (export,) = where.glob("compress/*/*/export/*")
    data = [setting for setting in settings if setting.startswith("data")]
    again = run("evaluate", where / "again", ["model=local", f"model.path={export}", *data])
    loss = [r["metrics"]["perplexity"]["loss"] for r in (record, again)]
    return {"loss": loss[0], "loss_of_export": loss[1], "export_bytes": again["bytes_on_disk"]}


def write_random_model(config: DecoderConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder of random bfloat16 weights, one file per tensor: never the whole model
    at once.
    """
    family, rng = FAMILIES[config.family], np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(family.write(config)))
    weight_map: dict[str, str] = {}
    for name, shape in shapes(config).items():
        file, x = f"{name}.safetensors", np.ones(shape, ml_dtypes.bfloat16)
        if len(shape) > 1:
            for row in x:  # of one row's size beside the tensor
                row[...] = rng.standard_normal(shape[1:], np.float32) / shape[-1] ** 0.5
        stored = family.stored(config, {name: x})
        safetensors.numpy.save_file(stored, folder / file)
        weight_map |= dict.fromkeys(stored, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.core.save(str(folder / "tokenizer.json"))
