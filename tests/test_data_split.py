"""The split: by key alone, alike in every stage, and nothing held out that training has too."""

from dataclasses import dataclass

import pytest

from training.data.split import held_out, normalised, split, unseen


@dataclass(frozen=True)
class Record:
    key: str
    identity: str


def test_side_depends_on_seed_and_key_alone():
    records = [Record(f"k{i}", f"text {i}") for i in range(2000)]
    train, val = split(records, seed=1, val_fraction=0.1)
    assert train + val == sorted(records, key=lambda r: held_out(r.key, 1, 0.1))
    assert 150 < len(val) < 250
    later = split([*records, *(Record(f"new{i}", f"new {i}") for i in range(500))], seed=1, val_fraction=0.1)
    assert set(val) <= set(later[1])
    assert split(records, seed=2, val_fraction=0.1)[1] != val


def test_side_is_the_same_on_every_machine():
    """Written down, since a run that is resumed elsewhere must hold out the same records."""
    assert [i for i in range(40) if held_out(f"k{i}", 1, 0.1)] == [13, 15, 17, 24, 27, 32]


def test_held_out_side_has_nothing_that_training_has():
    train_key = next(f"k{i}" for i in range(99) if not held_out(f"k{i}", 1, 0.5))
    val_keys = [f"k{i}" for i in range(99) if held_out(f"k{i}", 1, 0.5)]
    same = ["the moon, is a rock", "Moon is the rock!"]
    records = [Record(train_key, "The moon is a rock."), *map(Record, val_keys, [*same, "New.", "new", "Other"])]
    assert [record.identity for record in split(records, 1, 0.5)[1]] == ["New.", "Other"]


def test_unseen_keeps_the_first_of_each():
    records = [Record("a", "Hi!"), Record("b", "hi"), Record("c", "Ho")]
    assert [record.key for record in unseen(records)] == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "same"),
    [("The  cat's\nhat!", "cats hat"), ("A an THE", "A an THE"), (":-)", ":-)"), ("Äpfel, 你好?", "äpfel 你好")],
)
def test_normalised(text, same):
    assert normalised(text) == same
