"""Writes what llm-compressor itself makes of a tiny model: `python make_llmcompressor.py FOLDER`.

In the peers' environment: one folder for each scheme, by `oneshot` with plain rounding, and beside
it what run_exports.py hands over of it. (Not "plain": in float32, its own FP4 does not run.)
"""

import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from families import randomize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from run_exports import run

PRESETS = (
    "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC",
    "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP8A16",
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.disable_progress_bar()
    place = Path(sys.argv[1])
    for name in PRESETS:
        make(
            place / name, [QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"])]
        )
        np.savez_compressed(f"{place / name}.npz", **run(place / name, plain=False))
    make(place / "mixed", [mixed()])
    np.savez_compressed(f"{place / 'mixed'}.npz", **run(place / "mixed", plain=False))


def mixed() -> QuantizationModifier:
    """Two schemes by patterns, a layer left dense by one."""
    four = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    eight = QuantizationArgs(num_bits=8, strategy="channel")
    token = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    return QuantizationModifier(
        config_groups={
            "mlp": QuantizationScheme(targets=["re:.*mlp.*"], weights=four),
            "attention": QuantizationScheme(
                targets=["re:.*self_attn.*"], weights=eight, input_activations=token
            ),
        },
        ignore=["lm_head", "re:.*layers.1.mlp.down_proj"],
    )


def make(folder: Path, recipe: list) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=67, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, np.random.default_rng(0))
    tokens = np.random.default_rng(2).integers(0, 67, (8, 32))
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    with tempfile.TemporaryDirectory() as other:
        model.config.save_pretrained(other)
        model.config.name_or_path = other  # where oneshot looks up whether it is quantized
        oneshot(
            model=model, processor=tokenizer(), dataset=datasets.Dataset.from_dict(rows),
            recipe=recipe, max_seq_length=32, num_calibration_samples=8,
            shuffle_calibration_samples=False,
        )  # fmt: skip
        model.save_pretrained(folder, save_compressed=True)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Unused on tokens, yet demanded."""
    words = tokenizers.models.WordLevel({chr(33 + n): n for n in range(67)}, unk_token="!")
    core = tokenizers.Tokenizer(words)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!")


if __name__ == "__main__":
    main()
