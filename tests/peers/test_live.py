"""Live checks against the peers' own environment: `make test-peers`.

PLANISH_PEERS_PYTHON names its Python. Nothing of the peers is imported here: they run beside us and
hand over files.
"""

import json
import secrets
import subprocess
from pathlib import Path

import hydra.utils
import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.peers import goldens

SCRIPTS = Path(__file__).parent
TOLERANCE = 1e-4  # on logits, absolute, in float32
SHIFT = 2e-5  # what transformers' float32 logits move between processors
MINUTES = 10


@pytest.mark.peers
def test_the_committed_goldens_are_what_transformers_computes(python: str, tmp_path: Path) -> None:
    made = make_goldens(python, tmp_path / "made", seed=0)
    assert files(made) == files(goldens.COMMITTED)
    assert versionless(made) == versionless(goldens.COMMITTED)
    for name in goldens.names(made):
        compare(made / name, goldens.COMMITTED / name)


@pytest.mark.peers
def test_fresh_models_of_every_family_agree(python: str, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    made = make_goldens(python, tmp_path / "fresh", seed=seed)
    for name in goldens.names(made):
        golden = goldens.load(made / name)
        ours = goldens.forward(golden.model, golden.tokens)
        np.testing.assert_allclose(
            ours, golden.logits, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {seed=}"
        )


@pytest.mark.peers
@pytest.mark.real
def test_smollm2_is_still_what_transformers_computes(
    python: str, real: list[str], tmp_path: Path
) -> None:
    run(python, "make_smollm2.py", str(tmp_path / "new.npz"), *real, "--heldout", "1")
    with np.load(tmp_path / "new.npz") as new, np.load(goldens.SMOLLM2) as old:
        np.testing.assert_array_equal(new["tokens"], old["tokens"])
        np.testing.assert_allclose(new["logits"], old["logits"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(new["losses"], old["losses"][:1], rtol=0, atol=1e-5)


@pytest.mark.peers
@pytest.mark.real
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("run_transformers_perplexity.py", []),
        ("run_llmcompressor.py", ["--calibration", "1", "--asymmetric"]),
    ],
)
def test_the_benchmark_runners_run(
    python: str, real: list[str], script: str, options: list[str]
) -> None:
    printed = run(python, script, *real, "--heldout", "2", "--layers", "1", *options)
    result = json.loads(printed.splitlines()[-1])
    assert result["seconds"] > 0 and len(result["losses"]) == 2
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(result["losses"])))


@pytest.fixture(scope="module")
def real() -> list[str]:
    """The runners' options for the embedded model and the peers' windows."""
    source = hydra.utils.instantiate(OmegaConf.load(goldens.EMBEDDED))
    return ["--gguf", source.location, "--windows", str(goldens.WINDOWS)]


def make_goldens(python: str, folder: Path, *, seed: int) -> Path:
    run(python, "make_goldens.py", str(folder), "--seed", str(seed))
    return folder


def run(python: str, script: str, *arguments: str) -> str:
    """What a script of this folder prints, run by the peers' Python."""
    finished = subprocess.run(
        [python, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert finished.returncode == 0, f"{script} failed:\n{finished.stderr[-3000:]}"
    return finished.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def versionless(folder: Path) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: manifest[key] for key in ("seed", "models")}


def compare(made: Path, committed: Path) -> None:
    """Configs, weights and tokens equal; logits as close as one processor is to another."""
    assert (made / "config.json").read_text() == (committed / "config.json").read_text()
    assert weights(made) == weights(committed), f"the weights of {committed.name} changed"
    with np.load(made / "expected.npz") as new, np.load(committed / "expected.npz") as old:
        np.testing.assert_array_equal(new["tokens"], old["tokens"])
        np.testing.assert_allclose(new["logits"], old["logits"], rtol=0, atol=SHIFT)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
