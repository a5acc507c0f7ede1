"""Sentence pairs: every format, what is wrong in them, cleaning with counts, and a split that leaks nothing."""

import gzip
import os
import unicodedata

import numpy as np
import pytest

from training.data.examples import Batches, Examples, write_examples
from training.data.pairs import MAX_RATIO, SLACK, Pair, clean, main_script, read_pairs, read_sides
from training.data.records import DataError
from training.data.split import digest
from training.subwords import train_subwords

PO = """
msgid ""
msgstr ""
"Language: de\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\\n"

msgid "Yes"
msgstr "Ja"

msgid "One file"
msgid_plural "Many files"
msgstr[0] "Eine Datei"
msgstr[1] "Viele Dateien"

#, fuzzy
msgid "No"
msgstr "Nie"

msgid "Empty"
msgstr ""
"""


def read(path):
    return [(p.source, p.target) for p in read_pairs([str(path)], "de", "en")]


def write(path, text):
    path.write_text(text, "utf-8")
    return path


FORMATS = {
    "pairs.tsv": "Ja\tYes\nDie Katze\tThe cat\n",
    "columns.jsonl": '{"source": "Ja", "target": "Yes"}\n{"source": "Die Katze", "target": "The cat", "id": 7}\n',
    "hub.jsonl": '{"translation": {"de": "Ja", "en": "Yes"}}\n{"translation": {"en": "The cat", "de": "Die Katze"}}\n',
    "languages.jsonl": '{"de": "Ja", "en": "Yes"}\n{"en": "The cat", "de": "Die Katze"}\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(name, tmp_path):
    assert read(write(tmp_path / name, FORMATS[name])) == [("Ja", "Yes"), ("Die Katze", "The cat")]


def test_twin_files_are_read_line_by_line(tmp_path):
    write(tmp_path / "news.de", "Ja\nDie Katze\n")
    write(tmp_path / "news.en", "Yes\nThe cat\n")
    pairs = read_pairs([str(tmp_path / "news.{de,en}")], "en", "de")
    assert [(p.source, p.target) for p in pairs] == [("Yes", "Ja"), ("The cat", "Die Katze")]


def test_twin_files_of_unequal_length_are_refused_by_name(tmp_path):
    write(tmp_path / "news.de", "Ja\nDie Katze\n")
    write(tmp_path / "news.en", "Yes\n")
    with pytest.raises(DataError, match=r"news\.en: ends before line 2, which .*news\.de has"):
        read(tmp_path / "news.{de,en}")


def test_a_missing_twin_is_named(tmp_path):
    write(tmp_path / "news.de", "Ja\n")
    with pytest.raises(DataError, match=r"there is no file .*news\.en"):
        read(tmp_path / "news.{de,en}")


def test_a_catalogue_gives_what_is_translated_and_sure(tmp_path):
    wanted = [("Ja", "Yes"), ("Eine Datei", "One file"), ("Viele Dateien", "Many files")]
    assert read(write(tmp_path / "django.po", PO)) == wanted
    packed = tmp_path / "packed.po.gz"
    packed.write_bytes(gzip.compress(PO.encode()))
    assert read(packed) == wanted


def test_a_catalogue_of_a_country_is_one_of_its_language(tmp_path):
    assert ("Ja", "Yes") in read(write(tmp_path / "x.po", PO.replace("Language: de", "Language: de_DE")))


def test_a_catalogue_without_a_language_is_refused(tmp_path):
    with pytest.raises(DataError, match="its header names no Language"):
        read(write(tmp_path / "x.po", 'msgid "Yes"\nmsgstr "Ja"\n'))


WRONG = {
    "one column": ("x.tsv", "Ja\tYes\nDie Katze\n", r"x\.tsv:2: has 1 columns; a line is SOURCE, a tab, TARGET"),
    "three columns": ("x.tsv", "Ja\tYes\t0.5\n", r"x\.tsv:1: has 3 columns"),
    "another language": ("x.jsonl", '{"fr": "Oui", "en": "Yes"}\n', r"x\.jsonl:1: translation\.de: is missing"),
    "a number": ("x.jsonl", '{"de": 1, "en": "Yes"}\n', r"x\.jsonl:1: source: must be a text, not 1"),
    "no object": ("x.jsonl", '{"translation": "Ja"}\n', r"translation: must be an object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_pointed_to(case, tmp_path):
    name, text, said = WRONG[case]
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / name, text))


def test_wrong_utf8_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"Ja\tYes\nStra\xdfe\tStreet\n")
    with pytest.raises(DataError, match=r"x\.tsv:2: not UTF-8: byte 5"):
        read(tmp_path / "x.tsv")


def test_texts_are_nfc_with_single_spaces(tmp_path):
    (pair,) = read(write(tmp_path / "x.tsv", unicodedata.normalize("NFD", " Ärger   im Büro ") + "\ttrouble\n"))
    assert pair == ("Ärger im Büro", "trouble")


def pair(source, target):
    return Pair(source, target, source)


def test_cleaning_counts_what_it_takes_out():
    good = [pair(f"Haus Nummer {i}", f"house number {i}") for i in range(10)]
    long = "x" * int(MAX_RATIO * (4 + SLACK))
    bad = [pair("", "empty"), pair("Taxi", "Taxi"), pair("kurz", long), pair("Ja", "Да, конечно"), good[0]]
    kept, counts, script = clean([*good, *bad])
    assert kept == good and script == "LATIN"
    assert counts == {"empty": 1, "identical": 1, "length ratio": 1, "wrong script": 1, "repeated": 1}


def test_numbers_and_signs_have_no_script_that_could_be_wrong():
    assert main_script("12 % 5 µ 🙂") == "" and main_script("Straße 12") == "LATIN" and main_script("γλώσσα") == "GREEK"
    kept, _, _ = clean([pair("eins", "one"), pair("100 %", "100%"), pair("5 µ", "5 micro")])
    assert len(kept) == 3


def test_a_language_of_several_scripts_is_one_and_its_density_is_no_fault():
    japanese = [pair("これはペンです。", "This is a pen."), pair("東京", "Tokyo"), pair("コーヒー", "coffee")]
    assert clean(japanese)[:2] == (japanese, dict.fromkeys(clean([])[1], 0))
    dense = [pair("字" * 40, "x" * 180) for _ in range(1)] + [pair(f"字{i}" * 20, "word " * 30) for i in range(9)]
    assert len(clean(dense)[0]) == 10


def test_held_out_pairs_share_no_side_with_training(tmp_path):
    lines = [f"Satz Nummer {i} hier\tsentence {i % 150}" for i in range(400)]  # targets come again and again
    path = write(tmp_path / "x.tsv", "\n".join([*lines, *(line.upper().replace("\t", ".\t") for line in lines)]) + "\n")
    sides = read_sides([str(path)], "de", "en", seed=1, val_fraction=0.2)
    held_out = sides.validation + sides.test
    for side in ("source", "target"):
        assert not {digest(getattr(p, side)) for p in held_out} & {digest(getattr(p, side)) for p in sides.training}
    assert sides.dropped["in training too"] > 0 and len(sides.validation) <= len(sides.test)


def test_too_few_pairs_are_refused_with_what_was_left_out(tmp_path):
    said = r"translation\.pairs: 2 to learn from and 0 held out .*val_fraction than 0\.01 \(left out: 1 identical\)"
    with pytest.raises(DataError, match=said):
        read_sides([str(write(tmp_path / "x.tsv", "Ja\tYes\nNein\tNo\nOK\tOK\n"))], "de", "en", 1, 0.01)


def test_the_split_does_not_depend_on_the_other_sources(tmp_path):
    paths = [write(tmp_path / f"{n}.tsv", "".join(f"{n} Wort {i}\tword {n}{i}\n" for i in range(100))) for n in "ab"]
    alone, both = (read_sides([str(p) for p in chosen], "de", "en", 3, 0.2) for chosen in (paths[:1], paths))
    first = {p.source for p in both.training if p.origin == str(paths[0])}
    assert first == {p.source for p in alone.training}


# ---- examples and batches


class Characters:
    """One token a character."""

    def encode(self, sentences):
        return [[*map(ord, sentence), 0] for sentence in sentences]

    encode_targets = encode


@pytest.fixture
def examples(tmp_path):
    random = np.random.default_rng(0)
    pairs = [pair("s" * random.integers(1, 12), "t" * random.integers(1, 12)) for _ in range(300)]
    write_examples([*pairs, pair("s" * 50, "t")], Characters(), 20, tmp_path / "train")
    return pairs, Examples(tmp_path / "train")


def test_examples_come_back_as_they_were_written(examples):
    pairs, read = examples
    assert len(read) == len(pairs)  # the one that is too long is left out
    for i in (0, 17, 299):
        assert read[i].source.tolist() == [*map(ord, pairs[i].source), 0]
        assert read[i].target.tolist() == [*map(ord, pairs[i].target), 0]


def test_nothing_that_fits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"max_length=2: none of 1 pairs fits"):
        write_examples([pair("lang", "long")], Characters(), 2, tmp_path / "train")


def test_tokens_are_made_on_every_core_as_subwords_are_learnt(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as workers have it
    seen = []

    class Watched(Characters):
        def encode(self, sentences):
            seen.append(os.environ["TOKENIZERS_PARALLELISM"])
            return super().encode(sentences)

        encode_targets = encode

    def texts():
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        yield "kurz"

    write_examples([pair("kurz", "short")], Watched(), 20, tmp_path / "train")
    train_subwords(texts(), 300, 24)
    assert seen == ["true"] * 3 and os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_an_epoch_has_every_example_once_in_batches_that_fit(examples):
    _, read = examples
    batches = Batches(read, 120, seed=1)
    epoch = [batches.at(step) for step in range(len(batches))]
    for batch in epoch:
        assert len(batch) * (max(len(e.source) for e in batch) + max(len(e.target) for e in batch)) <= 120
    seen = sorted((len(e.source), len(e.target)) for batch in epoch for e in batch)
    assert seen == sorted(zip(read.source_lengths.tolist(), read.target_lengths.tolist(), strict=True))
    padded = sum(len(b) * (max(len(e.source) for e in b) + max(len(e.target) for e in b)) for b in epoch)
    assert padded < 1.5 * (read.source_lengths.sum() + read.target_lengths.sum())


def test_epochs_differ_and_a_step_is_the_same_whoever_asks(examples):
    _, read = examples

    def lengths(batch):
        return [(e.source.tolist(), e.target.tolist()) for e in batch]

    one, other = Batches(read, 120, seed=1), Batches(read, 120, seed=1)
    steps = len(one)
    later = [lengths(one.at(step)) for step in range(2 * steps)]
    assert later[:steps] != later[steps:]
    assert lengths(other.at(steps + 3)) == later[steps + 3] and lengths(other.at(2)) == later[2]


def test_the_sample_of_pictograms_is_read():
    pairs = read_pairs(["sample:emoji-names"], "de", "en")
    assert len(pairs) > 3_000
    assert ("grinsendes Gesicht".casefold(), "grinning face") in {(p.source.casefold(), p.target) for p in pairs}
    assert not any(set(":_") & set(p.source + p.target) for p in pairs)
