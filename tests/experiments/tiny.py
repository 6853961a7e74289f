"""A whole tiny model on disk with a text to calibrate on, for tests of the main job."""

from pathlib import Path

import numpy as np

from experiments.checkpoints.sources import Source, open_source
from models.decoder import DecoderConfig
from tests.experiments.checkpoints.synthetic import (
    CONFIG,
    gguf_metadata,
    random_tensors,
    write_gguf,
)

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


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path within: two folders are equal if these are."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
