"""Single files out of published source packages, streamed out of the archive as it arrives.

pip is of no use here: to learn a source package's metadata it runs the package's own build, with
`pip download --no-deps` too. So the index that pip is configured with is asked for the archive's
address, and the archive is read until the file has passed. Nothing of the package is run, and
nothing but that file is kept.
"""

import html.parser
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from experiments.checkpoints.packages import cache_folder, digest_of, keep, progress
from experiments.errors import UserError

INDEX = "https://pypi.org/simple"
TIMEOUT = 60.0  # seconds without an answer


def fetch_source_member(
    package: str,
    version: str,
    member: str,
    sha256: str,
    *,
    size: int | None = None,
    cache: Path | None = None,
) -> Path:
    """The path of one file of a published source package, downloaded the first time only.

    As `packages.fetch_member`; `member` is the file's path below the archive's one folder, `size`
    the archive's bytes, for the progress bar. Raises UserError if the archive or the file in it
    cannot be found, or the file has another digest.
    """
    cache = cache_folder() if cache is None else cache
    final = cache / "packages" / f"{package}-{version}" / PurePosixPath(member)

    def fetch(_: Path, part: Path) -> str:
        try:
            return _stream(package, version, member, part, size)
        except (urllib.error.URLError, TimeoutError, tarfile.TarError, zlib.error, EOFError) as e:
            raise UserError(
                f"{package} {version} is not in the cache and its source package could not be "
                f"fetched ({e}): check the network and pip's index-url, or put {member} of it at "
                f"{final} yourself."
            ) from e

    what = f"{member} of {package} {version}"
    return keep(final, fetch, sha256=sha256, what=what, size=None, cache=cache)


def _stream(package: str, version: str, member: str, part: Path, size: int | None) -> str:
    """Write the member to `part` and go no further through the archive; its SHA-256."""
    url = _address(package, version)
    with (
        progress(f"{package}=={version}", size) as show,
        urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
        tarfile.open(fileobj=_Counted(answer, show), mode="r|gz") as archive,  # type: ignore[call-overload]
    ):
        for entry in archive:
            if entry.isfile() and entry.name.partition("/")[2] == member:
                file = archive.extractfile(entry)
                assert file is not None
                with part.open("wb") as to:
                    return digest_of(file.read, to.write)
    raise UserError(
        f"The source package {package} {version} has no file {member}: check the member's path "
        "and the package's version."
    )


class _Counted:
    """A file whose reading moves a progress bar."""

    def __init__(self, file: Any, show: Any):
        self._file, self._show = file, show

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._show.advance(self._show.task_ids[0], len(data))
        return data


def _address(package: str, version: str) -> str:
    """Where the index has the source archive of a version."""
    page = f"{_index().rstrip('/')}/{re.sub(r'[-_.]+', '-', package).lower()}/"
    with urllib.request.urlopen(page, timeout=TIMEOUT) as answer:
        links = _Links(answer.read().decode("utf-8", errors="replace")).found
    wanted = _normal(f"{package}-{version}.tar.gz")
    for link in links:
        url = urllib.parse.urljoin(page, link)
        if _normal(PurePosixPath(urllib.parse.urlsplit(url).path).name) == wanted:
            return url
    raise UserError(
        f"{page} lists no source package of {package} {version}: check pip's index-url."
    )


def _index() -> str:
    """What pip is configured with: its environment variable, its files, or PyPI."""
    if own := os.environ.get("PIP_INDEX_URL"):
        return own
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return asked.stdout.strip() or INDEX


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


class _Links(html.parser.HTMLParser):
    """The addresses that a page of a package index (PEP 503) links to."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if (tag, key) == ("a", "href") and value]
