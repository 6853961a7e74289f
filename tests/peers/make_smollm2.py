"""What transformers computes on SmolLM2: `python make_smollm2.py --gguf FILE --windows NPZ OUT`.

Writes one compressed archive: tokens [2, 512] of held-out windows 0 and 20, logits [2, 8, V] at
`positions`, and the mean loss of each of the 40 held-out windows by protocol E.
"""

import argparse
from pathlib import Path

import numpy as np
import peer
import torch

WINDOWS = [0, 20]
POSITIONS = [0, 1, 17, 100, 233, 366, 440, 511]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--heldout", type=int, help="windows whose loss is computed (all)")
    arguments = parser.parse_args()
    peer.prepare(threads=2)
    model = peer.load_gguf(arguments.gguf)
    heldout = peer.windows(arguments.windows, "heldout", None)
    with torch.inference_mode():
        logits = torch.cat([model(heldout[[w]]).logits[:, POSITIONS] for w in WINDOWS])
    losses = [peer.window_loss(model, w) for w in heldout[: arguments.heldout]]
    np.savez_compressed(
        arguments.out,
        windows=np.array(WINDOWS, np.int32),
        positions=np.array(POSITIONS, np.int32),
        tokens=heldout[WINDOWS].numpy().astype(np.int32),
        logits=logits.numpy(),
        losses=np.array(losses),
    )
    peer.report(peer.perplexity(losses))


if __name__ == "__main__":
    main()
