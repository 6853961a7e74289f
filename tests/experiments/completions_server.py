"""A server on loopback that answers as OpenAI's API does, by a planish model: real HTTP, real
numbers, computed with one whole forward pass and with our own generation.
"""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import Source
from experiments.generation import Sampling, generate
from tests.peers.goldens import forward

KEY = "a-secret-of-ours"


class Model:
    """A source behind the API. bos: whether one that it puts in front of a text is shown too."""

    def __init__(self, source: Source, *, bos: str = "shown"):
        self.text, self.decoder, self.bos = source.tokenizer(), load_model(source), bos
        self.asked: list[dict[str, Any]] = []

    def encode(self, text: str) -> list[int]:
        ids = self.text.encode(text, special=True)
        return ids if ids[:1] == [self.text.bos] else [self.text.bos, *ids]

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(asked)
        ids = self.encode(asked["prompt"])
        new = self.generate(ids, asked)
        choice: dict[str, Any] = {"index": 0, "text": self.text.decode(new)}
        if asked.get("echo"):
            choice["text"] = asked["prompt"] + choice["text"]
            choice["logprobs"] = self.logprobs([*ids, *new])
        return {"choices": [choice]}

    def chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(asked)
        ids = self.encode(asked["messages"][-1]["content"])
        answer = self.text.decode(self.generate(ids, asked))
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}

    def whole(self, ids: list[int]) -> str:
        """The text of tokens without a character that is not complete."""
        return self.text.decode(ids, special=True).rstrip("\N{REPLACEMENT CHARACTER}")

    def generate(self, ids: list[int], asked: dict[str, Any]) -> list[int]:
        new = []
        count = min(asked["max_tokens"], self.decoder.config.context - len(ids))
        sampling, key = Sampling(temperature=float(asked["temperature"])), jax.random.key(0)
        for token in generate(
            self.decoder, ids, max_tokens=count, stops=self.text.stops, sampling=sampling, key=key
        ):
            new.append(token)
            if any(stop in self.text.decode(new) for stop in asked.get("stop") or []):
                break
        return new

    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        """Of each token, the first one's unknown."""
        filled = np.zeros((1, self.decoder.config.context), np.int32)
        filled[0, : len(ids)] = ids
        p = np.asarray(jax.nn.log_softmax(forward(self.decoder, jnp.asarray(filled))[0]))
        tokens = [self.text.core.decode([i], skip_special_tokens=False) for i in ids]
        own = [None, *(float(p[n, i]) for n, i in enumerate(ids[1:]))]
        top = [None, *({"likeliest": float(p[n].max())} for n in range(len(ids) - 1))]
        starts = [len(self.whole(ids[:n])) for n in range(len(ids))]
        hidden = 1 if self.bos == "hidden" else 0
        shift = starts[hidden]
        return {
            "tokens": tokens[hidden:],
            "token_logprobs": own[hidden:],
            "top_logprobs": top[hidden:],
            "text_offset": [start - shift for start in starts[hidden:]],
        }


@contextlib.contextmanager
def serving(model: Model, *, wants_key: bool = False) -> Iterator[str]:
    """The address of a server that answers while the body runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"data": [{"id": "tiny", "owned_by": "nobody", "context": 64}]}
            self.reply(listed if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            asked = json.loads(self.rfile.read(length))
            answers = {"/v1/completions": model.complete, "/v1/chat/completions": model.chat}
            self.reply(answers[self.path](asked) if self.path in answers else None)

        def reply(self, content: dict[str, Any] | None) -> None:
            refused = wants_key and self.headers["Authorization"] != f"Bearer {KEY}"
            self.send_response(401 if refused else 404 if content is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps({} if refused else content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
