"""Records as runs write them, without running: of the embedded model, with the losses asked for."""

import copy
import functools

import numpy as np

from experiments import records
from experiments.entry import resolved
from experiments.papers.lookup import Run, compose, identity_of, parse

HELDOUT = 40
SEEDS = ("data", "init", "method")
BASE = np.random.default_rng(0).normal(3.0, 0.3, HELDOUT)  # the float model's losses by window


def record(name, loss=0.0, *, noise=0.01, seed=0, windows="held-out", **fields):
    """Of the run `name` ("float", or overrides), each window's loss that far above the float's.

    Windows differ by `noise` in how far, by the run and the seed.
    """
    return of(parse(name), loss, noise=noise, seed=seed, windows=windows, **fields)


def of(run: Run, loss=0.0, *, noise=0.01, seed=0, windows="held-out", **fields):
    """As `record`, of a run."""
    rng = np.random.default_rng([seed, len(str(run)), int(1000 * loss)])
    losses = BASE + loss + (noise * rng.normal(size=HELDOUT) if loss else 0.0)
    plain = composed(run) | {"seed": seed, "seeds": dict.fromkeys(SEEDS, seed)}
    found = {
        "schema": records.SCHEMA,
        "command": run.command,
        "identity": identity_of(run),
        "seeds": dict.fromkeys(SEEDS, seed),
        "config": plain,
        "started": "2026-01-01T00:00:00+00:00",
        "code": {"commit": "c" * 40, "clean": True},
        "versions": {"jax": "0"},
        "device": {"cores": 2, "machine": "x86_64"},
        "model": {"location": "model.gguf", "digest": "m" * 64},
        "data": {"name": "text", "digest": "t", "calibration": [32, 512], "heldout": [40, 512]},
        "metrics": {"perplexity": perplexity(losses, windows)},
        "bytes_on_disk": 90_000_000,
        "seconds": {"evaluate": 1.0},
        "peak_memory": 2 * 10**9,
        "status": "finished",
    }
    if run.command == "compress":
        bits = plain["algorithm"]["format"]["bits"]
        group = plain["algorithm"]["format"]["group_size"] or 576
        bits = bits + (16 if plain["algorithm"]["format"]["symmetric"] else 24) / group
        found["footprint"] = {
            "weights": 10**8,
            "weight_bits": int(1e8 * bits),
            "parameters": 130 * 10**6,
            "model_bits": int(4.5e8 + 1e8 * bits),
        }
        found["seconds"]["compress"] = 12.0 + bits
        found["layers"] = [{"layer": 0, "errors": {}, "seconds": {"solve": 1.0}, "notes": {}}]
    return copy.deepcopy(found | fields)


@functools.cache
def composed(run):
    return resolved(compose(run))


def perplexity(losses, windows):
    loss, error = float(np.mean(losses)), float(np.std(losses, ddof=1) / np.sqrt(len(losses)))
    return {
        "value": float(np.exp(loss)),
        "standard_error": float(np.exp(loss)) * error,
        "loss": loss,
        "loss_standard_error": error,
        "window_losses": [float(each) for each in losses],
        "windows": [len(losses), 512],
        "data": {"name": "text", "digest": windows},
    }


GPTQ = "algorithm=gptq algorithm.format.bits="
RTN = "algorithm=rtn algorithm.format.bits="


def everything():
    """What the embedded claims of RTN and GPTQ need, by file name, as a small model would do."""
    losses = {
        "float": 0.0,
        RTN + "8 algorithm.format.group_size=null": 0.004,
        RTN + "4": 0.238,
        RTN + "4 algorithm.format.group_size=null": 0.9,
        RTN + "4 algorithm.format.symmetric=true": 0.3,
        RTN + "3": 1.109,
        GPTQ + "4": 0.168,
        GPTQ + "4 algorithm.format.symmetric=true": 0.207,
        GPTQ + "3": 0.644,
        GPTQ + "3 algorithm.format.group_size=null": 1.4,
        GPTQ + "3 algorithm.activation_order=false": 0.7,
        GPTQ + "3 walk.sequential=false": 0.643,
        GPTQ + "2": 3.1,
    }
    found = {name: record(name, loss) for name, loss in losses.items()}
    return {f"run-{number}": each for number, each in enumerate(found.values())}
