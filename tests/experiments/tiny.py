"""A whole tiny model on disk with a text to calibrate on, for tests of the main job."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from experiments.checkpoints.sources import Source, open_source
from experiments.configuration import CONF
from models.config import DecoderConfig
from tests.experiments.checkpoints.synthetic import (
    CONFIG,
    gguf_metadata,
    random_tensors,
    write_gguf,
)

ROOT = Path(__file__).parents[2]
OVERRIDES = ["data=text", "data.context=16", "data.calibration=6", "data.heldout=4"]


def tensors(config: DecoderConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random weights at the scale of a trained model's, so that activations stay finite."""
    found = random_tensors(config)
    return {
        name: 1 + np.float32(0.1) * x if "norm" in name else x / np.sqrt(x.shape[-1], dtype=x.dtype)
        for name, x in found.items()
    }


def write_model(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    """A GGUF file of random float32 weights."""
    path = folder / "model.gguf"
    write_gguf(path, tensors(config), gguf_metadata(config=config))
    return path


def model(folder: Path, config: DecoderConfig = CONFIG) -> Source:
    return open_source(write_model(folder, config))


def write_text(folder: Path) -> Path:
    """Random words of the tiny vocabulary's letters, enough for a few dozen windows of 16."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghij ")
    path = folder / "text.txt"
    path.write_text(
        "".join(rng.choice(letters, 2000)) + "\n\n" + "".join(rng.choice(letters, 2000))
    )
    return path


def overrides(folder: Path) -> list[str]:
    """Hydra's overrides for the tiny model and text, written into `folder`."""
    return [
        "model=local",
        f"model.path={write_model(folder)}",
        f"data.path={write_text(folder)}",
        *OVERRIDES,
    ]


def config(folder: Path, *more: str, name: str = "compress") -> DictConfig:
    """The tiny model's configuration; runs go below `folder`."""
    base = [*overrides(folder), f"runs={folder / 'runs'}", "logger.tensorboard=false"]
    if name in ("compress", "evaluate"):
        base.append("hardware.rate=1e11")  # measured, it would be half a second of every run
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, [*base, *more])


def command(*arguments: str, cwd: Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path within: two folders are equal if these are."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
