"""Where windows of tokens come from: protocol E's stored ones, a Wikipedia dump, a file of text.

Each is a Hydra target (conf/data/): `windows(tokenizer, vocabulary)` gives what to calibrate on and
what to evaluate.
"""

import abc
import dataclasses
from pathlib import Path

import numpy as np

from experiments.checkpoints.packages import fetch_member
from experiments.data import mediawiki
from experiments.data.tokenizer import Tokenizer
from experiments.data.windows import Sizes, Windows, collect, cut
from experiments.errors import UserError

STORED = Path(__file__).with_name("enwiki_windows.npz")
STORED_VOCABULARY = 49152  # SmolLM2's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Sizes, abc.ABC):
    """A text, and how many windows of which length to take from it."""

    context: int = 512
    calibration: int = 32
    heldout: int = 40

    def windows(
        self,
        tokenizer: Tokenizer,
        vocabulary: int,
        *,
        longest: int | None = None,
        seed: int = 0,
    ) -> Windows:
        """Windows for a model with `vocabulary` tokens that takes `longest` at a time.

        Raises UserError if the sizes, the text or the tokenizer do not allow it.
        """
        self.validate(longest)
        return self._windows(tokenizer, vocabulary)

    @abc.abstractmethod
    def _windows(self, tokenizer: Tokenizer, vocabulary: int) -> Windows: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredEnwiki(Corpus):
    """The exact windows of protocol E (enwiki_windows.md), for SmolLM2's tokenizer alone."""

    def _windows(self, tokenizer: Tokenizer, vocabulary: int) -> Windows:
        if vocabulary != STORED_VOCABULARY:
            raise UserError(
                f"data=enwiki512 holds tokens of SmolLM2's vocabulary of {STORED_VOCABULARY}, but "
                f"the model's has {vocabulary}: choose data=enwiki or data=text."
            )
        with np.load(STORED, allow_pickle=False) as stored:
            calibration, heldout = stored["calibration"], stored["heldout"]
        if self.context != heldout.shape[1]:
            raise UserError(
                f"data.context={self.context}, but the windows of data=enwiki512 have exactly "
                f"{heldout.shape[1]} tokens: choose data=enwiki or data=text."
            )
        if not _comes_back(heldout, tokenizer):
            raise UserError(
                "The model's tokenizer encodes the text of data=enwiki512 differently from "
                "SmolLM2's, whose tokens it holds: choose data=enwiki or data=text."
            )
        return collect(calibration, heldout, self, "enwiki512")


def _comes_back(tokens: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether every window, decoded and encoded again, is itself: true of all 40 held-out ones."""
    return all(tokenizer.encode(tokenizer.decode(ids)) == ids for ids in tokens.tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedEnwiki(Corpus):
    """The articles of a Wikipedia dump inside a published package, with the model's tokenizer."""

    package: str
    version: str
    member: str  # the bzip2 dump's path inside the package
    sha256: str  # of the dump
    size: int | None = None  # of the download, in bytes, for its progress bar and the disk

    def _windows(self, tokenizer: Tokenizer, vocabulary: int) -> Windows:
        dump = fetch_member(self.package, self.version, self.member, self.sha256, size=self.size)
        return cut(mediawiki.read(dump), tokenizer, vocabulary, self, "enwiki")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile(Corpus):
    """A local text in UTF-8."""

    path: str

    def _windows(self, tokenizer: Tokenizer, vocabulary: int) -> Windows:
        return cut(read_text(Path(self.path)), tokenizer, vocabulary, self, Path(self.path).name)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark and with plain line ends.

    Raises UserError if it cannot be read or is not UTF-8.
    """
    try:
        text = path.expanduser().read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"data.path={path} cannot be read ({error.strerror}): give the path of a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path={path} is not UTF-8 text (byte {error.start} does not fit): convert it, "
            "for example with `iconv -t UTF-8`."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
