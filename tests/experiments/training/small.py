"""A training run that takes seconds: a byte-level model of one block on a small text."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.configuration import CONF
from tests.experiments import tiny

MODEL = ["model.hidden=16", "model.layers=1", "model.heads=2", "model.kv_heads=2",
         "model.head_size=8", "model.feed_forward=16", "model.context=17"]  # fmt: skip
DATA = ["data=text", "data.context=17", "data.calibration=null", "data.heldout=10"]
PACE = ["steps=8", "batch=4", "log_every=2", "evaluate_every=4", "save_every=3",
        "evaluation_batch=4"]  # fmt: skip


def overrides(folder: Path) -> list[str]:
    return [
        *MODEL, *DATA, *PACE, f"data.path={tiny.write_text(folder)}", f"runs={folder / 'runs'}",
        "logger.tensorboard=false", "hardware.rate=1e11",
    ]  # fmt: skip


def config(folder: Path, *more: str) -> DictConfig:
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("train", [*overrides(folder), *more])
