"""A model that answers over HTTP as OpenAI's API does: a local server, or somebody's.

Nothing of it is on this machine, so that it can only be given tasks (evaluation=lm_eval). It is
known by its address and its name; its key comes from an environment variable and goes nowhere but
into the requests.
"""

import dataclasses
import hashlib
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.progress import console

if TYPE_CHECKING:
    from lm_eval.api.model import LM

GENERATED = "generate_until"  # what a task asks of a model that need not say how likely texts are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is asked, and how."""

    url: str  # up to and with /v1
    name: str  # of the model, as the server knows it
    chat: bool = False  # /chat/completions, which takes conversations and gives no likelihoods
    prefix: str = ""  # text in front of what is scored: the model's bos, if the server adds none
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key
    concurrent: int = 1  # requests at a time
    timeout: int = 300  # seconds for an answer

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"model.url={self.url} is no address: give one such as http://localhost:8000/v1."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"model.url of {parts.hostname} holds more than an address, which a record would "
                f"keep: give the key in the environment variable {self.key_variable} instead."
            )

    @property
    def location(self) -> str:
        return self.url

    @property
    def key(self) -> str:
        """Empty for a server that wants none."""
        return os.environ.get(self.key_variable, "")

    def facts(self) -> dict[str, Any]:
        """For the record: address, name, and what the server says of the model.

        Raises UserError if the server is not there, or refuses the key.
        """
        from experiments.evaluation.lm_eval_endpoint import server_facts

        known = hashlib.sha256(f"{self.url} {self.name}".encode()).hexdigest()
        said = server_facts(self)
        return {"location": self.name, "digest": known, "url": self.url, "server": said}

    def require(self, kinds: Mapping[str, str]) -> None:
        """Refuse tasks that cannot be put to it. kinds: what each asks of a model."""
        scored = [name for name, kind in kinds.items() if kind != GENERATED]
        if self.chat and scored:
            raise UserError(
                f"{', '.join(scored)} asks how likely given texts are, which a chat endpoint does "
                "not say: give model.chat=false, or choose tasks that generate."
            )

    def asked(self, *, chat: bool, seed: int) -> "tuple[LM, bool]":
        """It as a model of lm-eval's, and whether questions are put in a conversation."""
        from experiments.evaluation.lm_eval_endpoint import connect

        if chat and not self.chat:
            raise UserError(
                "evaluation.apply_chat_template=true needs an endpoint with a template of its own: "
                "give model.chat=true."
            )
        return connect(self, seed=seed), self.chat


@dataclasses.dataclass(frozen=True)
class Asking:
    """A run on an endpoint, in place of `planning.Plan`: it takes next to nothing here."""

    source: Endpoint
    evaluation: Any
    windows: None = None

    def require(self, folder: Path) -> None:
        console.print(f"asks {self.source.url}: {folder}", soft_wrap=True)

    def show(self) -> None:
        console.print(f"Everything is computed by {self.source.name} at {self.source.url}.")

    def facts(self) -> dict[str, Any]:
        return {}


def plan(config: DictConfig, endpoint: Endpoint) -> Asking:
    """Refuse what an endpoint cannot do. Raises UserError."""
    from experiments.entry import build
    from experiments.evaluation.tasks import Tasks

    evaluation = build(config, "evaluation")
    if not isinstance(evaluation, Tasks):
        raise UserError(
            "An endpoint gives no weights to run windows of text through: choose "
            "evaluation=lm_eval tasks=NAME, or a model on this machine."
        )
    endpoint.require(evaluation.kinds())
    return Asking(endpoint, evaluation)
