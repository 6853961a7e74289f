"""Text to tokens and back, with the model's own special tokens and chat template."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import tokenizers
from jaxtyping import Int

from experiments.errors import UserError

CORE_FILE, META_FILE = "tokenizer.json", "planish_tokenizer.json"  # of a saved tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model's files say about its use."""

    core: tokenizers.Tokenizer
    chat_template: str | None = None  # Jinja source
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False  # whether the model expects bos in front of every text
    stops: tuple[int, ...] = ()  # tokens that end a generated text, eos among them

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added: bos in front is the caller's (`add_bos`).

        With `special`, text that spells a special token becomes that token; without, it is text
        like any other, so that a document cannot forge the end of a turn.
        """
        self.core.encode_special_tokens = not special
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"], *, special: bool = False) -> str:
        """Text of token ids; special tokens are spelled out with `special`, else left out."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, as `conversation` writes it."""
        return self.encode(self.conversation(messages), special=True)

    def conversation(self, messages: Sequence[dict[str, str]], *, answer: bool = True) -> str:
        """The text of a conversation in the model's own template, special tokens spelled.

        `messages` holds {"role": ..., "content": ...} in order. answer: whether the assistant's
        turn is opened behind them. Raises UserError where the model has no template or its
        template rejects the messages.
        """
        if self.chat_template is None:
            raise UserError("The model has no chat template: give it plain text instead.")
        try:
            return self._render(self.chat_template, messages, answer)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"The model's chat template fails ({error}): check the roles of the messages, or "
                "give the model plain text instead."
            ) from error

    def _render(self, template: str, messages: Sequence[dict[str, str]], answer: bool) -> str:
        named = {"bos_token": self.bos, "eos_token": self.eos}
        spelled = {k: self.core.id_to_token(i) for k, i in named.items() if i is not None}
        variables = {"tools": None, "documents": None, "add_generation_prompt": answer, **spelled}
        compiled = _environment().from_string(template)
        return compiled.render(messages=list(messages), **variables)

    def save(self, folder: Path) -> None:
        """Write the tokenizer into an existing folder, for `load`."""
        meta = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del meta["core"]
        self.core.save(str(folder / CORE_FILE), pretty=False)
        (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if it is missing or damaged."""
        core, path = read_core(folder / CORE_FILE), folder / META_FILE
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            return cls(core=core, **{**meta, "stops": tuple(meta["stops"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is missing or not what planish writes ({error}): the checkpoint is "
                "damaged, so compress the model again."
            ) from error


def read_core(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(
            f"There is no {path.name} in {path.parent}: planish needs that file, so save the "
            "model's fast tokenizer into the folder."
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
        core.no_truncation()  # a long text is cut into windows, not cut off
        core.no_padding()
        return core
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{path} is not a tokenizer that the tokenizers library reads ({error}): fetch the "
            "file again."
        ) from error


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it, unable to reach anything outside its variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; rendered, it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
