"""Perplexity of the float model by transformers, timed, for the side-by-side benchmark.

`python run_transformers_perplexity.py --gguf FILE --windows NPZ [--heldout N]`, in the peers'
environment. The last line of stdout is a JSON object; `seconds` covers the evaluation alone, after
one window of warm-up.
"""

import argparse
import time
from pathlib import Path

import peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--heldout", type=int, help="evenly spread held-out windows (all)")
    parser.add_argument("--layers", type=int, help="cut the model to its first blocks, to try out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    peer.prepare(arguments.threads)
    start = time.perf_counter()
    model = peer.load_gguf(arguments.gguf, arguments.layers)
    loading = time.perf_counter() - start
    heldout = peer.windows(arguments.windows, "heldout", arguments.heldout)
    peer.window_loss(model, heldout[0])
    start = time.perf_counter()
    losses = [peer.window_loss(model, window) for window in heldout]
    seconds = time.perf_counter() - start
    timing = {
        "seconds": seconds,
        "load_seconds": loading,
        "tokens_per_second": heldout.numel() / seconds,
    }
    peer.report({"tool": "transformers"} | timing | peer.perplexity(losses))


if __name__ == "__main__":
    main()
