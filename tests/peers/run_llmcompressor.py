"""GPTQ by llm-compressor, timed, then its perplexity, for the side-by-side benchmark.

`python run_llmcompressor.py --gguf FILE --windows NPZ --calibration 32 --bits 4 --group 64
--asymmetric`, in the peers' environment. Integer grids, static activation order, embedding and head
left in float. The last line of stdout is a JSON object; `seconds` is the wall time of `oneshot`.
"""

import argparse
import importlib.metadata
import tempfile
import time
from pathlib import Path

import peer
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--calibration", type=int, help="evenly spread windows (all)")
    parser.add_argument("--heldout", type=int, help="evenly spread held-out windows (all)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--asymmetric", dest="symmetric", action="store_false")
    parser.add_argument("--layers", type=int, help="cut the model to its first blocks, to try out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    peer.prepare(arguments.threads)
    model = peer.load_gguf(arguments.gguf, arguments.layers)
    calibration = peer.windows(arguments.windows, "calibration", arguments.calibration)
    heldout = peer.windows(arguments.windows, "heldout", arguments.heldout)
    recipe = gptq(arguments.bits, arguments.group, arguments.symmetric)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name
    )
    seconds = compress(model, tokenizer, recipe, calibration)
    losses = [peer.window_loss(model, window) for window in heldout]
    tool = {"tool": "llmcompressor", "version": importlib.metadata.version("llmcompressor")}
    peer.report(tool | {"seconds": seconds} | peer.perplexity(losses))


def gptq(bits: int, group: int, symmetric: bool):
    """llm-compressor's GPTQ over every linear layer of the blocks."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=group,
        actorder="static",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"weights": scheme}, ignore=["lm_head"])


def compress(model, tokenizer, recipe, calibration: torch.Tensor) -> float:
    """Compress the model in place over windows [N, T]; the seconds it took."""
    import datasets
    from llmcompressor import oneshot

    rows = {
        "input_ids": calibration.tolist(),
        "attention_mask": torch.ones_like(calibration).tolist(),
    }
    data = datasets.Dataset.from_dict(rows)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder  # where oneshot looks up whether it is quantized
        start = time.perf_counter()
        oneshot(
            model=model,
            processor=tokenizer,  # unused on tokens, yet demanded
            dataset=data,
            recipe=[recipe],
            max_seq_length=calibration.shape[1],
            num_calibration_samples=len(calibration),
            shuffle_calibration_samples=False,
        )
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
