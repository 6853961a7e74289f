import copy

import pytest

from experiments.entry import resolved
from experiments.runs.identity import EXCLUDED, identity, seeds_label
from tests.experiments import tiny


@pytest.fixture
def plain(tmp_path):
    return resolved(tiny.config(tmp_path))


def changed(plain, **keys):
    return copy.deepcopy(plain) | keys


def test_what_does_not_change_a_result_is_left_out(plain):
    where = {"runs", "again", "dry_run", "hardware", "logger", "launcher", "hydra", "export"}
    where |= {"save_every", "keep", "processes"}  # of a training run
    assert EXCLUDED == where | {"bits", "tasks"}  # which count where they are used
    first = identity("compress", plain)
    for key in EXCLUDED:
        assert identity("compress", changed(plain, **{key: "other"})) == first
    assert identity("compress", changed(plain, seed=7, seeds={"data": 7, "method": 8})) == first
    assert identity("compress", changed(plain, another_step=None, more_rules=[])) == first
    shuffled = dict(sorted(plain.items(), reverse=True))
    assert identity("compress", shuffled) == first


def test_everything_else_counts(plain):
    first = identity("compress", plain)
    for key in set(plain) - EXCLUDED - {"seed", "seeds"}:
        assert identity("compress", changed(plain, **{key: {"other": 1}})) != first, key
    assert identity("evaluate", plain) != first
    other = {**plain["algorithm"], "bits": 5}
    assert identity("compress", changed(plain, algorithm=other)) != first


def test_an_input_counts_by_its_content_and_not_by_its_place(plain, tmp_path):
    first = identity("compress", plain)
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes((tmp_path / "model.gguf").read_bytes())
    model = {**plain["model"], "path": str(moved)}
    assert identity("compress", changed(plain, model=model)) == first
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + " more")
    assert identity("compress", plain) != first


def test_the_path_of_a_method_is_a_name_and_no_file(plain):
    def with_norm(name):
        norm = {"_target_": "hydra.utils.get_method", "path": f"algorithms.optimizers.scion.{name}"}
        return identity("train", plain | {"optimizer": {"norm": norm}})

    assert with_norm("sign") != with_norm("rms")


def test_a_folder_is_named_by_its_seeds():
    assert seeds_label({"data": 3, "init": 3, "method": 3}) == "seed-3"
    assert seeds_label({"data": 1, "init": 0, "method": 2}) == "data-1-init-0-method-2"
