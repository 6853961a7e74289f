"""Text to tokens and back, with the model's own special tokens and chat template."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int

from experiments.data import chat
from experiments.errors import UserError
from experiments.untrusted import parse_json, read_text, refusing, require_file

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

    def validate(self) -> None:
        """Raise ValueError for what is no text and no token, as files of others may say."""
        if not isinstance(self.chat_template, str | None):
            raise ValueError("chat_template is no text")
        for name, i in (("bos", self.bos), ("eos", self.eos), *(("stops", i) for i in self.stops)):
            if i is not None and not (type(i) is int and 0 <= i < 1 << 32):
                raise ValueError(f"{name} has {i!r}, which is no token")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added: bos in front is the caller's (`add_bos`).

        With `special`, text that spells a special token becomes that token; without, it is text
        like any other, so that a document cannot forge the end of a turn.
        """
        with told("The model's tokenizer fails on this text", "give it another text or tokenizer"):
            self.core.encode_special_tokens = not special
            return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"], *, special: bool = False) -> str:
        """Text of token ids; special tokens are spelled out with `special`, else left out."""
        with told("The model's tokenizer fails on these tokens", "fetch the model again"):
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
        named = {"bos_token": self.bos, "eos_token": self.eos}
        spelled = {k: self.core.id_to_token(i) for k, i in named.items() if i is not None}
        variables = {"tools": None, "documents": None, "add_generation_prompt": answer, **spelled}
        try:
            return chat.render(self.chat_template, {"messages": list(messages), **variables})
        except ValueError as error:
            raise UserError(
                f"The model's chat template fails ({error}): check the roles of the messages, or "
                "give the model plain text instead."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer into an existing folder, for `load`."""
        meta = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del meta["core"]
        self.core.save(str(folder / CORE_FILE), pretty=False)
        (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if it is missing or damaged."""
        core, path = read_core(folder / CORE_FILE, folder), folder / META_FILE
        with refusing(f"{path} is missing or not what planish writes", "compress the model again"):
            meta = parse_json(read_text(path, folder))
            made = cls(core=core, **{**meta, "stops": tuple(meta["stops"])})
            made.validate()
            return made


def read_core(path: Path, folder: Path | None = None) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, of a folder. Raises UserError if it is missing or damaged."""
    if not path.exists():
        raise UserError(
            f"There is no {path.name} in {path.parent}: planish needs that file, so save the "
            "model's fast tokenizer into the folder."
        )
    require_file(path, folder)
    with told(f"{path} is not a tokenizer that the tokenizers library reads", "fetch it again"):
        core = tokenizers.Tokenizer.from_str(read_text(path, folder))
        core.no_truncation()  # a long text is cut into windows, not cut off
        core.no_padding()
        return core


@contextlib.contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Whatever the tokenizers library raises as one sentence: it raises nothing narrower than
    Exception, and where its Rust code panics, not even that.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({error}): {advice}.") from error
