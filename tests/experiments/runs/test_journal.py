import pytest

from experiments.errors import UserError
from experiments.runs.journal import Journal, read
from experiments.runs.tensorboard import TensorBoard


def test_events_come_back_in_order(tmp_path):
    journal = Journal(tmp_path)
    journal.append("started", code={"commit": "a"})
    journal.append("layer", layer=0, errors={"mlp": 0.5})
    assert [entry["event"] for entry in journal.entries()] == ["started", "layer"]
    assert journal.entries("layer")[0]["errors"] == {"mlp": 0.5}
    assert read(tmp_path / "nothing") == []


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    journal = Journal(tmp_path)
    journal.append("started")
    whole = journal.path.read_bytes()
    for length in range(len(whole)):
        journal.path.write_bytes(whole + whole[:length])
        Journal(tmp_path).append("layer", layer=1)
        found = [entry["event"] for entry in journal.entries()]
        assert found in (["started", "layer"], ["started", "started", "layer"])


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="journal.jsonl cannot be written .*runs="):
        Journal(tmp_path / "missing").append("started")


def test_tensorboard_shows_the_numbers(tmp_path):
    board, journal = TensorBoard(tmp_path), Journal(tmp_path)
    journal.listeners.append(board)
    journal.append("layer", layer=3, errors={"mlp.hidden": 0.25}, name="text")
    board.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"errors/mlp.hidden" in content and b"text" not in content


def test_a_run_without_numbers_leaves_no_file_for_tensorboard(tmp_path):
    board = TensorBoard(tmp_path)
    board({"event": "started", "time": "now"})
    board.close()
    assert list(tmp_path.iterdir()) == []
