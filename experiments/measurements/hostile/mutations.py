"""Every way that a file of the corpus is damaged; one is drawn for each index, and made again from
(seed, index) alone.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.checkpoints import planish, shards
from experiments.measurements.hostile import gguf_edits, json_edits
from experiments.measurements.hostile.corpus import files
from experiments.measurements.hostile.templates import TEMPLATES

OUTSIDE = "outside"  # beside the model's folder: files that no reader may touch
NAMES = [
    "../outside/canary.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "config.json",
    "missing.safetensors", "a\x00b", "x" * 300, "sub/../../outside/canary.safetensors", "~/x",
    "C:\\x", "\\\\host\\x", "file:///etc/passwd", 3, None, [], {"a": 1}, "\x1b[2J\n", "@lone",
]  # fmt: skip

type Apply = Callable[[random.Random, Path, Path], None]  # random numbers, model, file of it


class Kind(NamedTuple):
    """One kind of damage. suits: the files that can have it."""

    apply: Apply
    suits: Callable[[Path], bool] = lambda file: True


class Drawn(NamedTuple):
    """What happens to one file."""

    kind: str
    model: str
    file: str  # within the model


def draw(seed: int, index: int, corpus: Mapping[str, Path]) -> Drawn:
    """Kinds are drawn evenly, then a model that has files for it; config.json more often."""
    rng = random.Random(f"{seed} {index}")
    kind = rng.choice(list(KINDS))
    while True:
        model = rng.choice(list(corpus))
        suited = [file for file in files(corpus[model]) if KINDS[kind].suits(file)]
        if suited:
            config = [file for file in suited if file.name == "config.json"]
            file = rng.choice(config if config and rng.random() < 0.4 else suited)
            return Drawn(kind, model, os.path.relpath(file, corpus[model]))


def damage(drawn: Drawn, seed: int, index: int, corpus: Mapping[str, Path], box: Path) -> Path:
    """Put a damaged copy of the drawn model into an empty folder; where it lies."""
    whole = corpus[drawn.model]
    copy = box / whole.name
    (shutil.copytree if whole.is_dir() else shutil.copyfile)(whole, copy)
    rng = random.Random(f"{seed} {index} {drawn.kind}")
    KINDS[drawn.kind].apply(rng, copy, (copy / drawn.file) if whole.is_dir() else copy)
    return copy


def _bytes(edit: Callable[[random.Random, bytearray], Any]) -> Apply:
    def apply(rng: random.Random, model: Path, file: Path) -> None:
        content = bytearray(file.read_bytes())
        if content:
            edit(rng, content)
        file.write_bytes(content)

    return apply


def _span(rng: random.Random, content: bytearray) -> tuple[int, int]:
    """Half of them near the beginning, where headers are."""
    room = len(content) if rng.random() < 0.5 else min(len(content), 512)
    start = rng.randrange(room)
    return start, min(start + rng.choice([1, 2, 4, 8, 64, 1000]), len(content))


def _flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 8, 100])):
        content[_span(rng, content)[0]] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.choice([0, 1, 7, 8, len(content) - 1, rng.randrange(len(content))]) :]


def _extend(rng: random.Random, content: bytearray) -> None:
    content += rng.choice([b"\0", b"\n", b"{}", b"\xff" * 100, rng.randbytes(5000)])


def _fill(rng: random.Random, content: bytearray) -> None:
    start, stop = _span(rng, content)
    content[start:stop] = rng.choice([b"\0", b"\xff", b" ", b"["]) * (stop - start)


def _splice(rng: random.Random, content: bytearray) -> None:
    start, stop = _span(rng, content)
    at = _span(rng, content)[0]
    if rng.random() < 0.5:
        content[at:at] = content[start:stop]
    else:
        content[at : at + stop - start] = content[start:stop]


def _junk(rng: random.Random, content: bytearray) -> None:
    start, stop = _span(rng, content)
    content[start:stop] = rng.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", rng.randbytes(64)])


def _json_file(edit: Callable[[random.Random, Any], None]) -> Apply:
    def apply(rng: random.Random, model: Path, file: Path) -> None:
        content = json.loads(file.read_text())
        edit(rng, content)
        file.write_text(json_edits.text(content))

    return apply


def _header(edit: Callable[[random.Random, Any], None]) -> Apply:
    """The JSON in front of tensors, its length put right."""

    def apply(rng: random.Random, model: Path, file: Path) -> None:
        whole = file.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        content = json.loads(whole[8:end])
        edit(rng, content)
        text = json_edits.text(content).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])

    return apply


def _length(rng: random.Random, content: bytearray) -> None:
    """A header that says it is longer or shorter than it is."""
    true = int.from_bytes(content[:8], "little")
    lies = [0, 1, 2, true - 1, true + 1, 2 * true, len(content), 10**8, 2**31, 2**63, 2**64 - 1]
    content[:8] = rng.choice(lies).to_bytes(8, "little")


def _tensor(rng: random.Random, content: Any) -> None:
    """One tensor's type, shape or place, or its name."""
    name = rng.choice([key for key in content if key != "__metadata__"])
    info = content[name]
    start, stop = info["data_offsets"]
    size, huge = stop - start, rng.choice([2**31, 2**63, 2**64, 10**30])
    info |= rng.choice(
        [
            {"dtype": rng.choice(["F64", "I64", "BOOL", "F8_E4M3", "U8", "F4", "", None, 7])},
            {"shape": info["shape"][::-1]}, {"shape": [*info["shape"], 1]}, {"shape": []},
            {"shape": [-n for n in info["shape"]]}, {"shape": [huge] * 3}, {"shape": [huge, 0]},
            {"shape": [size]}, {"shape": [0]}, {"shape": {"0": 1}}, {"shape": [1.5, True]},
            {"shape": [1] * 100}, {"data_offsets": [start, stop + 1]},
            {"data_offsets": [start - 1, stop]}, {"data_offsets": [stop, start]},
            {"data_offsets": [start, start]}, {"data_offsets": [huge, huge + size]},
            {"data_offsets": [0, size]}, {"data_offsets": [-size, 0]}, {"data_offsets": [start]},
            {"data_offsets": [float(start), float(stop)]}, {"data_offsets": "01"},
        ]
    )  # fmt: skip
    if rng.random() < 0.2:
        content[rng.choice(["model.layers.99.x", name.upper(), "", name + ".weight"])] = info
    if rng.random() < 0.1:
        del content[name]


def _shard(rng: random.Random, content: Any) -> None:
    """Files that the index names: outside, missing, no files, no names."""
    named = content["weight_map"]
    chosen = list(named) if rng.random() < 0.3 else [rng.choice(list(named))]
    content["weight_map"] |= dict.fromkeys(chosen, rng.choice(NAMES))


def _forge(rng: random.Random, model: Path, file: Path) -> None:
    """What a part of planish's own says of its tensors, with every digest put right."""
    part = planish.Part(file)
    json_edits.EDITS[rng.choice(list(json_edits.EDITS))](rng, part.described)
    described = json.loads(json.dumps(part.described))
    found = planish.digest(part.trees, described)
    arrays = {f"{n}:{field}": x for n, tree in part.trees.items() for field, x in tree.items()}
    shards.save(file, arrays, {"planish": json.dumps({"digest": found, "tensors": described})})
    whole = json.loads((model / planish.DESCRIPTION).read_text())
    whole["digests"][file.stem] = found
    whole["tensors"] |= described
    (model / planish.DESCRIPTION).write_text(json.dumps(whole))


def _template(rng: random.Random, content: Any) -> None:
    content["chat_template"] = rng.choice(TEMPLATES)


def _instead(rng: random.Random, model: Path, file: Path) -> None:
    """Something else than the file, under its name."""
    outside = model.parent / OUTSIDE
    makes: list[Callable[[], Any]] = [
        file.touch, file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to(outside / f"canary{file.suffix}"), lambda: file.symlink_to(file),
        lambda: file.symlink_to(f"../{OUTSIDE}/canary{file.suffix}"), lambda: None,
        lambda: file.symlink_to("/etc/passwd"), lambda: file.symlink_to(model.parent),
        lambda: file.symlink_to(f"/proc/{os.getpid()}/mem"), lambda: file.symlink_to("missing"),
        lambda: file.touch(0),
    ]  # fmt: skip
    file.unlink()
    rng.choice(makes)()


def _exchange(rng: random.Random, model: Path, file: Path) -> None:
    """The bytes of another file of the model."""
    file.write_bytes(rng.choice(files(model)).read_bytes())


def _suffix(*suffixes: str) -> Callable[[Path], bool]:
    return lambda file: file.suffix in suffixes


def _named(*names: str) -> Callable[[Path], bool]:
    return lambda file: file.name in names


JSON, TENSORS, GGUF = _suffix(".json"), _suffix(".safetensors"), _suffix(".gguf")
TEMPLATED = _named("tokenizer_config.json", "planish_tokenizer.json")
KINDS: dict[str, Kind] = {
    "bits flipped": Kind(_bytes(_flip)),
    "cut off": Kind(_bytes(_cut)),
    "extended": Kind(_bytes(_extend)),
    "a span filled": Kind(_bytes(_fill)),
    "a span copied elsewhere": Kind(_bytes(_splice)),
    "bytes that are no text": Kind(_bytes(_junk)),
    "no file in its place": Kind(_instead),
    "another file's bytes": Kind(_exchange),
    **{f"JSON: {what}": Kind(_json_file(edit), JSON) for what, edit in json_edits.EDITS.items()},
    **{f"safetensors: {what}": Kind(_header(edit), TENSORS)
       for what, edit in json_edits.EDITS.items()},
    "safetensors: length": Kind(_bytes(_length), TENSORS),
    "safetensors: a tensor's place": Kind(_header(_tensor), TENSORS),
    "index: files named": Kind(_json_file(_shard), _named(shards.INDEX)),
    "planish: forged with its digests": Kind(
        _forge, lambda file: file.suffix == ".safetensors" and file.parent.name == "parts"
    ),
    "a hostile chat template": Kind(_json_file(_template), TEMPLATED),
    **{f"GGUF: {what}": Kind(_bytes(edit), GGUF) for what, edit in gguf_edits.EDITS.items()},
}  # fmt: skip
