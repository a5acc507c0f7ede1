"""What is said of a translation model: scores beside the baselines, on pairs that training has not seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import evaluate, measure_translation, translation, zero
from training.config import EvaluateConfig
from training.data.pairs import Pair
from training.recipe import Recipe
from training.report import write_report
from training.run import Run, StageError, write_atomic
from training.verdict import headline, warnings

ROOT = Path(__file__).parents[1]
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with a small translator of numbers, evaluated."""
    folder = tmp_path_factory.mktemp("run")
    paths = []
    for name, step in (("tens", 9), ("sevens", 7)):
        paths.append(folder / f"{name}.tsv")
        numbers = [f"{number:04d}" for number in range(0, 5_000, step)]
        lines = ("\t".join(" ".join(names[int(d)] for d in n) for names in (GERMAN, ENGLISH)) for n in numbers)
        paths[-1].write_text("\n".join(lines) + "\n", "utf-8")
    stage = {"pairs": list(map(str, paths)), "steps": 250, "batch_tokens": 1024, "learning_rate": 1e-2, "num_heads": 2}
    stage |= {
        "num_layers": 1,
        "hidden_size": 64,
        "vocab_size": 340,
        "max_length": 24,
        "dropout": 0.0,
        "eval_every": 125,
    }
    recipe = Recipe.model_validate({"name": "numbers", "translation": stage, "evaluate": {"num_pairs": 20}})
    root = folder / "numbers"
    write_atomic(root / "run.json", recipe.model_dump_json())
    run = Run(root, "translation", val_fraction=0.1)
    run.folder.mkdir()
    zero.init_distributed("cpu")
    translation.run(recipe.translation, run)
    (root / "evaluate").mkdir()
    evaluate.run(EvaluateConfig(num_pairs=20), Run(root, "evaluate", val_fraction=0.1))
    return root, json.loads((root / "evaluate" / "evaluation.json").read_text("utf-8"))["translation"], paths


def test_every_source_is_scored_beside_the_baselines(measured):
    _, result, _ = measured
    assert [row["name"] for row in result["sources"]] == ["tens.tsv", "sevens.tsv", "all"]
    assert [row["pairs"] for row in result["sources"]] == [20, 20, 40]
    everything = result["sources"][-1]
    assert everything["copy"]["chrf"] < 30 < 60 < everything["model"]["chrf"]
    assert everything["dictionary"]["chrf"] > 90  # a language of words alone is what a dictionary is made for
    assert "chrF2" not in result["chrf_signature"] and "nc:6" in result["chrf_signature"]
    assert result["over_copy"]["mean"] > 2 * result["over_copy"]["stderr"]
    assert len(result["samples"]) == measure_translation.SHOWN


def test_attention_is_a_distribution_over_the_source(measured):
    _, result, _ = measured
    attention = result["attention"]
    assert len(attention["weights"]) == len(attention["target"])
    for row in attention["weights"]:
        assert len(row) == len(attention["source"]) and sum(row) == pytest.approx(1, abs=0.01)


def test_the_metrics_and_the_warnings_speak_of_it(measured):
    _, result, _ = measured
    whole = {"answers": {}, "bits_per_byte": {}, "settings": {}, "translation": result}
    assert headline(whole)["translation_chrf"] == result["sources"][-1]["model"]["chrf"]
    bad = {**result, "over_copy": {"mean": 0.1, "stderr": 0.2, "n": 40}}
    (said,) = [w for w in warnings({**whole, "translation": bad, "settings": _settings()}) if "copying" in w]
    assert "not better than copying the source" in said


def _settings():
    return {"num_prompts": 0, "num_prompts_wanted": 1, "max_new_tokens": 1}


def test_the_report_shows_it(measured):
    root, result, _ = measured
    page = write_report(root).read_text("utf-8")
    assert "Where it looks" in page and result["samples"][0]["reference"] in page
    assert "Side by side" not in page  # there is no chat model to show
    assert "An encoder-decoder transformer from de to en" in page


def test_a_folder_is_scored_on_any_pairs(measured):
    root, _, paths = measured
    told = evaluate.evaluate_model(str(root / "translation" / "model"), [str(paths[0])])
    assert told["kind"] == "translation" and told["pairs"] == 556 and told["languages"] == "de → en"
    assert told["chrf"] > 60 and told["bleu_signature"].startswith("nrefs:1|case:mixed")


def test_the_command_prints_scores_and_signatures(measured):
    root, _, paths = measured
    command = [sys.executable, "-m", "services.cli", "evaluate", str(root / "translation" / "model"), str(paths[0])]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert told.returncode == 0, told.stderr
    for name in ("bleu", "chrf", "bleu_signature", "chrf_signature"):
        assert name in told.stdout


def test_pairs_that_are_all_empty_are_refused(measured, tmp_path):
    root, _, _ = measured
    path = tmp_path / "x.tsv"
    path.write_text("\t\n", "utf-8")
    with pytest.raises(StageError, match="no pair has two sides"):
        evaluate.evaluate_model(str(root / "translation" / "model"), [str(path)])


def test_exact_hits_are_counted_apart_for_sources_with_new_words():
    tested = [Pair("a b", "x", ""), Pair("a c", "y", ""), Pair("b", "z", "")]
    exact = measure_translation._exact(tested, ["x", "no", "no"], {"a", "b"})
    assert (exact["all"]["mean"], exact["known_words"]["mean"]) == (pytest.approx(1 / 3), 0.5)
    assert exact["new_words"] == {"mean": 0.0, "stderr": float("inf"), "n": 1}


def test_a_perfect_translation_scores_100():
    texts = ["the house is small and the garden is green", "one two three four five"]
    assert measure_translation.bleu(texts, texts) == pytest.approx(100)
    assert measure_translation.chrf(texts, texts) == pytest.approx(100)
    assert torch.tensor(measure_translation.sentence_chrf(texts, texts[::-1])).max() < 30
