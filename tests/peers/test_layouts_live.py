"""Live checks of the layouts: GPTQModel, AutoAWQ and llama.cpp on what planish writes.

PLANISH_LAYOUTS_PYTHON names a Python with requirements.txt and requirements-layouts.txt,
PLANISH_LLAMACPP_PYTHON one with requirements-llamacpp.txt.
"""

import dataclasses
import json
import secrets
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from algorithms import formats
from experiments.checkpoints import huggingface
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.gguf_writer import GGUFWriter
from experiments.checkpoints.layouts.awq import AWQ
from experiments.checkpoints.layouts.base import Layout
from experiments.checkpoints.layouts.gptq import GPTQ
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import Source, open_source
from models.decoder import DecoderConfig
from tests.experiments import tiny
from tests.experiments.checkpoints import synthetic, test_gguf_writer
from tests.experiments.checkpoints.layouts import test_awq, test_gptq
from tests.experiments.checkpoints.layouts.grid_cases import random_grid
from tests.experiments.checkpoints.synthetic import CONFIG
from tests.peers import goldens, llamacpp
from tests.peers.test_live import run

pytestmark = pytest.mark.peers
integer = formats.integer
SMALL = test_gguf_writer.FORMATS
WIDE = {  # groups that fill a K block
    "Q2_K": integer(bits=2, group_size=256),
    "Q3_K": integer(bits=3, group_size=256, symmetric=True),
    "Q4_K": integer(bits=4, group_size=256),
    "Q5_K": integer(bits=5, group_size=256),
    "Q6_K": integer(bits=6, group_size=256, symmetric=True),
}
WIDE_CONFIG = dataclasses.replace(
    CONFIG, hidden=256, heads=4, kv_heads=2, head_size=64, feed_forward=256
)


def test_the_committed_layers_are_what_the_tools_pack(layouts: str, tmp_path: Path) -> None:
    run(layouts, "make_layouts.py", str(tmp_path), "--seed", "0")
    for golden in (test_gptq.GOLDEN, test_awq.GOLDEN):
        with np.load(golden) as old, np.load(tmp_path / golden.name) as new:
            assert set(old.files) == set(new.files)
            for name in old.files:
                np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_fresh_layers_are_read_and_packed_alike(layouts: str, tmp_path: Path) -> None:
    run(layouts, "make_layouts.py", str(tmp_path), "--seed", str(secrets.randbelow(2**31)))
    test_gptq.check_golden(tmp_path / "gptq.npz")
    test_awq.check_golden(tmp_path / "awq.npz")


def test_the_tools_read_our_configurations(layouts: str, tmp_path: Path) -> None:
    gptq, awq = GPTQ("gptq_v2"), AWQ()
    grids = {
        "model.layers.0.mlp.up_proj": random_grid(32, 64, bits=4, group=32, symmetric=False),
        "model.layers.1.mlp.up_proj": random_grid(32, 64, bits=8, group=32, symmetric=True),
        "model.layers.11.mlp.up_proj": random_grid(32, 64, bits=4, group=32, symmetric=False),
    }
    schemes = {n: gptq.scheme(t) for n, t in grids.items()} | {"model.layers.1.mlp.gate": None}
    found = read_config(layouts, gptq.describe(schemes), [*schemes], tmp_path)
    assert found["layers"] == {
        "model.layers.0.mlp.up_proj": [4, 32, False],
        "model.layers.1.mlp.up_proj": [8, 32, True],
        "model.layers.11.mlp.up_proj": [4, 32, False],
        "model.layers.1.mlp.gate": None,
    }
    assert found["format"] == "gptq_v2" and found["transformers"][:3] == ["GPTQConfig", 4, 32]
    scheme = awq.scheme(grids["model.layers.0.mlp.up_proj"])
    found = read_config(layouts, awq.describe({"a": scheme, "lm_head": None}), ["a"], tmp_path)
    assert found["layers"]["a"][:2] == [4, 32]
    assert found["format"] == "gemm" and found["transformers"][:3] == ["AwqConfig", 4, 32]


def read_config(python: str, config: dict, names: list[str], folder: Path) -> dict:
    (folder / "config.json").write_text(json.dumps(config))
    printed = run(python, "read_layout_config.py", str(folder / "config.json"), *names)
    return json.loads(printed.splitlines()[-1])


FOLDERS = {
    "gptq2": (GPTQ(), integer(bits=2, group_size=32)),
    "gptq3": (GPTQ(), integer(bits=3, group_size=32)),
    "gptq4": (GPTQ(), integer(bits=4, group_size=32)),
    "gptq4-symmetric": (GPTQ(), integer(bits=4, group_size=64, symmetric=True)),
    "gptq8-symmetric": (GPTQ(), integer(bits=8, group_size=128, symmetric=True)),
    "awq4": (AWQ(), integer(bits=4, group_size=32)),
    "awq4-symmetric": (AWQ(), integer(bits=4, group_size=128, symmetric=True)),
}


def test_transformers_loads_our_layers(layouts: str, tmp_path: Path) -> None:
    """With GPTQModel's kernels for a CPU, which compute in float16: 0.007 on logits of deviation 1
    when this was written, as much as the dense model's.
    """
    raw = synthetic.LLAMA | {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    config = huggingface.read_config(raw, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    expected = {}
    for name, (layout, form) in FOLDERS.items():
        weights = {n: form_of(n, x, form) for n, x in tiny.tensors(config).items()}
        write_folder(tmp_path / name, raw, weights, layout)
        dense = {n: np.asarray(w.dequantize()) if hasattr(w, "dequantize") else w
                 for n, w in weights.items()}  # fmt: skip
        write_folder(tmp_path / "dense", raw, dense, None)
        expected[name] = logits(open_source(tmp_path / "dense"), tokens)
    names = [str(tmp_path / name) for name in FOLDERS]
    printed = run(
        layouts, "run_transformers_folder.py", "--tokens", str(tmp_path / "tokens.npy"), *names
    )
    classes = json.loads(printed.splitlines()[-1])
    for name, ours in expected.items():
        theirs = np.load(tmp_path / name / "logits.npy")
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=0.02, err_msg=name)
        assert classes[name] != "Linear"


def write_folder(folder: Path, raw: dict, tensors: dict, layout: Layout | None) -> None:
    """A Hugging Face folder, its compressed layers in a layout."""
    config = huggingface.read_config(raw, folder)
    arrays, schemes = {}, {"lm_head": None}
    for name, x in tensors.items():
        (place,) = FAMILIES[config.family].places(config, name)
        module = place.name.removesuffix(".weight")
        if layout is None or isinstance(x, np.ndarray):
            arrays[f"{module}.weight"] = x
        else:
            schemes[module] = layout.scheme(x)
            arrays |= {f"{module}.{key}": a for key, a in layout.encode(x).items()}
    described = {} if layout is None else {"quantization_config": layout.describe(schemes)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw | described))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", test_gguf_writer.ARCHITECTURES)
def test_llamacpp_computes_our_logits(llama: str, tmp_path: Path, case: str) -> None:
    """In float32: what the metadata says, where rows lie, and the tokenizer."""
    _, changes = test_gguf_writer.ARCHITECTURES[case]
    path = write(tmp_path / "m.gguf", dataclasses.replace(CONFIG, **changes))
    tokens, text = some_tokens(), "ab cab<s>1."
    theirs = llamacpp.run(llama, path, tokens, tmp_path, "--text", text)
    source = open_source(path)
    np.testing.assert_allclose(theirs["logits"], logits(source, tokens), rtol=0, atol=2e-5)
    assert theirs["ids"] == source.tokenizer().encode(text, special=True)


@pytest.mark.parametrize("kind", [*SMALL, *WIDE])
def test_llamacpp_reads_our_blocks(llama: str, tmp_path: Path, kind: str) -> None:
    """Our model with inputs rounded as llama.cpp rounds them gives its logits, but for those of
    positions behind an input that lay on the edge between two codes.
    """
    config = CONFIG if kind in SMALL else WIDE_CONFIG
    path = write(tmp_path / "m.gguf", config, (SMALL | WIDE)[kind])
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {x for name, x in types.items() if "ffn_" in name and "norm" not in name} == {kind}
    tokens = some_tokens()
    theirs = llamacpp.run(llama, path, tokens, tmp_path)["logits"]
    exact = logits(open_source(path), tokens)
    rounding = llamacpp.round_q8_0 if kind in SMALL else llamacpp.round_q8_k
    model = llamacpp.as_llamacpp(load_model(open_source(path)), rounding)
    ours = np.asarray(model(jnp.asarray(tokens)))
    assert np.median(np.abs(theirs - ours).max(-1)) < 2e-5
    assert 1e-3 < rms(exact - ours) < 0.05 and rms(theirs - exact) < 0.05  # what rounding does


@pytest.mark.real
def test_llamacpp_gives_the_embedded_models_perplexity(llama: str, tmp_path: Path) -> None:
    """Float32 within 1e-5 nats; in blocks, within what rounding activations to 8 bits moves."""
    source = goldens_source()
    with np.load(goldens.WINDOWS) as archive:
        tokens = archive["heldout"][[0, 20], :256].astype(np.int32)
    for kind, within in ((None, 1e-5), ("Q8_0", 0.03), ("Q4_0", 0.03)):
        path = tmp_path / f"{kind}.gguf"
        copy(source, path, None if kind is None else SMALL[kind])
        theirs = llamacpp.run(llama, path, tokens, tmp_path)
        ours = [loss(x, t) for x, t in zip(logits(open_source(path), tokens), tokens, strict=True)]
        np.testing.assert_allclose(theirs["losses"], ours, rtol=0, atol=within, err_msg=str(kind))
        path.unlink()


def goldens_source() -> Source:
    import hydra.utils
    from omegaconf import OmegaConf

    return hydra.utils.instantiate(OmegaConf.load(goldens.EMBEDDED))


def write(path: Path, config: DecoderConfig, form: formats.Format | None = None) -> Path:
    """A tiny random model, its linear layers in `form`."""
    source = tiny.model(path.parent, CONFIG)
    tensors = {name: form_of(name, x, form) for name, x in tiny.tensors(config).items()}
    test_gguf_writer.write(path, config, tensors, source.tokenizer())
    return path


def form_of(name: str, x: np.ndarray, form: formats.Format | None):
    linear = form is not None and name.startswith("blocks.") and x.ndim == 2
    return form.quantize(jnp.asarray(x)) if form is not None and linear else x


def copy(source: Source, path: Path, form: formats.Format | None) -> None:
    """A model as a GGUF file, a part at a time."""
    writer, parts = GGUFWriter(path, source.config), {}
    for name in sorted(source.names()):
        parts.setdefault(part_of(name), []).append(name)
    for part, names in parts.items():
        writer.write(part, {n: form_of(n, np.asarray(source.read(n)), form) for n in names})
    writer.finish(source.config, source.tokenizer(), {})


def some_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 52, (2, 16)).astype(np.int32)


def logits(source: Source, tokens: np.ndarray) -> np.ndarray:
    model = load_model(source)
    forward = jax.jit(lambda t: model(t))
    return np.concatenate([forward(jnp.asarray(t[None])) for t in tokens])


def loss(x: np.ndarray, tokens: np.ndarray) -> float:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(x[:-1]), tokens[1:, None], -1)
    return -float(chosen.mean())


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))
