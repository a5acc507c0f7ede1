"""The report of runs in every state: whole, half done, hardly begun; and that nothing in them can break the page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import figures
from training.page import Html, tag
from training.recipe import load_recipe
from training.report import figure, write_report
from training.report_tables import duration, number
from training.run import StageError, write_atomic
from training.sheet import write_sheet

_TURNS = ("user", "assistant", "user")
ATTACK = "<script>alert('x')</script>"


def _estimate(mean: float, stderr: float | None = 0.02) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "n": 256}


def _answers(gold: float, distinct: float) -> dict[str, Any]:
    return {
        "stop_rate": _estimate(0.973),
        "length": _estimate(11.0),
        "gold": _estimate(gold),
        "reward": _estimate(0.5),
        "distinct_1": 0.3,
        "distinct_2": distinct,
        "most_frequent": {"text": f"Top {ATTACK}", "share": 0.03},
    }


def _evaluation() -> dict[str, Any]:
    said = {"text": f"Sampled {ATTACK}", "gold": 0.5, "reward": 1.25}
    return {
        "settings": {"num_prompts": 256, "max_new_tokens": 24, "temperature": 1.0, "judge": "vader"},
        "bits_per_byte": {"pretrain": _estimate(1.557), "sft": _estimate(1.7), "ppo": _estimate(1.8)},
        "answers": {"sft": _answers(0.1, 0.7), "ppo": _answers(0.5, 0.4)},
        "reward": {
            "learnt_from": 900, "rankings": 100, "pairs": 512, "length_pearson": 0.1, "length_spearman": 0.2,
            "accuracy": _estimate(0.864), "longer_wins": _estimate(0.5), "over_longer_wins": _estimate(0.36),
            "bag_of_words": _estimate(0.85), "over_bag_of_words": _estimate(0.014),
        },
        "ppo_against_sft": {
            "kl": _estimate(8.6), "gold_gain": _estimate(0.379), "wins": _estimate(0.7), "reward_gain": _estimate(1.4)
        },
        "samples": {
            "fixed": [{"prompt": f"Hi {ATTACK}", "pretrain": "", "sft": "Hello.", "ppo": f"Fixed {ATTACK}"}],
            "held_out": [
                {"prompt": [{"role": "user", "content": f"Held {ATTACK}"}], "sft": said, "ppo": said},
                {"prompt": [{"role": r, "content": "Yes"} for r in _TURNS], "sft": said, "ppo": said},
            ],
        },
        "translation": _translation(),
        "image": _image(),
        "warnings": [f"Warned {ATTACK}"],
    }  # fmt: skip


def _translation() -> dict[str, Any]:
    scores = {who: {"bleu": 20.0, "chrf": 40.0} for who in ("model", "copy", "dictionary")}
    row = {"source": f"Von {ATTACK}", "reference": f"Of {ATTACK}", "translation": f"Made {ATTACK}", "chrf": 50.0}
    return {
        "languages": ["de", "en"], "learnt_from": 900, "num_beams": 4, "bleu_signature": "b", "chrf_signature": "c",
        "sources": [{"name": f"Pairs {ATTACK}", "pairs": 20, **scores}, {"name": "all", "pairs": 20, **scores}],
        "over_copy": _estimate(20.0), "over_dictionary": _estimate(1.0), "exact": {"all": _estimate(0.5)},
        "samples": [row], "attention": {"source": [ATTACK, "b"], "target": ["c"], "weights": [[0.25, 0.75]]},
    }  # fmt: skip


def _image() -> dict[str, Any]:
    matches = {f"match_{k}": {**_estimate(0.75), "chance": 0.01} for k in (1, 5)}
    return {
        "features": f"features {ATTACK}", "near": [1, 5], "pictures": 64, "frechet": 3.5, "frechet_of_real": 1.25,
        "trained": {"n": 48, **matches}, "held_out": {"n": 16, **matches},
    }  # fmt: skip


def _metrics(stage: str) -> list[dict[str, Any]]:
    names = {name for panel in figures.PANELS.get(stage, ()) for name in panel.metrics} or {"vocab_size"}
    return [{"step": i, "total": 80, "time": 0.0, **{name: 0.5 + 0.4 / i for name in names}} for i in range(1, 81)]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run of the tiny recipe, with hostile text wherever a model, a file or a person may put some."""
    root = tmp_path / "tiny<b>"
    hostile = [f"rank.prompts=['{ATTACK.replace(chr(39), chr(34))}']", "translation={pairs: [a], steps: 10}"]
    hostile += ["image_vae={images: [a], steps: 10}", "image={images: [a], steps: 10}"]
    recipe = load_recipe("tiny", hostile)
    write_atomic(root / "run.json", recipe.model_dump_json())
    for stage in recipe.stages:
        _write_lines(root / stage / "metrics.jsonl", _metrics(stage))
        identity = {"parents": {"tokenizer": "x"}, "inputs": {f"data {ATTACK}": "y"}}
        manifest = {
            "identity": identity, "output": "0123456789abcdef", "device": "cpu", "versions": {"torch": "2.13.0"},
            "commit": "c0ffee", "finished": "2026-01-02T03:04:05Z", "seconds": 61.0,
        }  # fmt: skip
        write_atomic(root / stage / "manifest.json", json.dumps(manifest))
    completions = [f"Ranked {ATTACK}", "good", ""]
    record = {"prompt": f"Rank {ATTACK}", "completions": completions, "ranking": [3, 1, 2]}
    _write_lines(root / "rank" / "rankings.jsonl", [{**record, "ranking": [1, 1, 1]}, record])
    write_atomic(root / "evaluate" / "evaluation.json", json.dumps(_evaluation()))
    sheet = [np.zeros((8, 8, 3), np.uint8)], [ATTACK]
    for path in ("evaluate/drawings.png", *(f"image/samples/step-{step:08d}.png" for step in range(6))):
        write_sheet(root / path, [sheet[0]], sheet[1])
    return root


class _Page(HTMLParser):
    """Checks that elements nest, and collects ids, elements, attributes and the words of the page."""

    VOID = frozenset({"meta", "path", "use", "rect", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"


def _page(root: Path) -> _Page:
    path = write_report(root)
    assert path == root / "report.html"
    return _Page(path.read_text("utf-8"))


def test_what_models_and_files_say_is_text_and_never_markup(run: Path) -> None:
    page = _page(run)
    assert "script" not in page.elements
    for said in ("Sampled", "Hi", "Fixed", "Held", "Warned", "Ranked", "Rank", "Top", "data"):
        assert f"{said} {ATTACK}" in page.words, said
    assert "tiny<b>" in page.words


def test_the_page_fetches_nothing(run: Path) -> None:
    attributes = _page(run).attributes
    links = [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert not any(name.startswith("on") for name, _ in attributes)
    assert not re.search(r"@import|url\((?!#)", run.joinpath("report.html").read_text("utf-8"))


def test_ids_of_different_figures_do_not_meet(run: Path) -> None:
    attributes = _page(run).attributes
    ids = [value for name, value in attributes if name == "id"]
    used = [name for _, value in attributes for name in re.findall(r"url\(#([^)]*)\)", value)]
    assert len(ids) == len(set(ids)) and used and set(used) <= set(ids)


def test_numbers_have_their_place_and_their_error(run: Path) -> None:
    words = _page(run).words
    assert words.count("97.3% ± 2.0%") == 2  # SFT and PPO
    assert "+0.379 ± 0.020" in words and "8.600 ± 0.020" in words and "1.557 ± 0.020" in words
    assert "10 min 10 s" in words  # of ten stages, 61 s each
    assert "✗ not above both baselines" in words  # 0.014 is within two errors
    assert "✓ beyond chance" in words and "✓ at least 95%" in words
    assert "reward hacking" in words  # distinct-2 fell from 0.7 to 0.4


def test_every_curve_of_every_stage_is_drawn_in_the_pages_colours(run: Path) -> None:
    page = _page(run)
    assert page.elements.count("svg") == sum(map(len, figures.PANELS.values()))
    text = run.joinpath("report.html").read_text("utf-8")
    assert "var(--first)" in text and "#01020" not in text


def test_drawings_and_four_of_the_sheets_are_in_the_page(run: Path) -> None:
    page = _page(run)
    assert page.elements.count("img") == 5
    assert f"features {ATTACK}" in page.words and "75.0% ± 2.0%" in page.words
    shown = [int(step) for step in re.findall(r"Step (\d+)", page.words)]
    assert shown == [0, 1, 3, 5]  # the first, the last, and those between that are evenly spread
    (run / "evaluate" / "drawings.png").unlink()
    assert "(not drawn)" in _page(run).words


def test_the_ranking_shown_is_the_one_with_an_order_best_first(run: Path) -> None:
    words = _page(run).words
    assert words.index(" 1 good") < words.index("2 (says nothing)") < words.index(f"3 Ranked {ATTACK}")


def test_a_run_under_way_says_what_is_to_come(run: Path) -> None:
    for path in (run / "ppo" / "manifest.json", run / "evaluate" / "manifest.json"):
        path.unlink()
    (run / "evaluate" / "evaluation.json").unlink()
    (run / "evaluate" / "metrics.jsonl").unlink()
    write_atomic(run / "ppo" / "started.json", "{}")
    _write_lines(run / "ppo" / "metrics.jsonl", _metrics("ppo")[:7])
    words = _page(run).words
    assert "not finished: ppo, evaluate to come" in words and "No verdict" in words
    assert "under way" in words and "7/80" in words and "not run" in words


def test_a_run_that_has_only_a_recipe_has_a_page(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").model_copy(update={"evaluate": None, "ppo": None})
    write_atomic(tmp_path / "new" / "run.json", recipe.model_dump_json())
    words = _page(tmp_path / "new").words
    assert "0 of 5 stages" in words and "No stage has logged two steps yet" in words
    assert "leaves out: ppo, evaluate" in words and "is not in this recipe" in words


def test_parts_that_were_not_measured_are_left_out(run: Path) -> None:
    some = _evaluation()
    for name in ("reward", "ppo_against_sft"):
        del some[name]
    some |= {"bits_per_byte": {}, "answers": {"sft": {**_answers(0.1, 0.7), "gold": None, "reward": None}}}
    some["answers"]["sft"]["stop_rate"]["stderr"] = None  # of one prompt alone
    some["samples"] = {"fixed": [{"prompt": "Hi", "sft": "Hello."}], "held_out": []}
    write_atomic(run / "evaluate" / "evaluation.json", json.dumps(some))
    words = _page(run).words
    assert "Gold score" not in words and "PPO against SFT" not in words and "Held-out text" not in words
    assert "97.3%" in words and "97.3% ±" not in words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not found"):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize("stages", [("tokenizer",), ("tokenizer", "pretrain"), figures.PANELS.keys()])
def test_the_picture_of_a_run_is_a_png(run: Path, stages: Any) -> None:
    for path in run.glob("*/metrics.jsonl"):
        if path.parent.name not in stages:
            path.unlink()
    assert figure(run).read_bytes().startswith(b"\x89PNG")


# ---- parts


def test_a_number_that_is_none_leaves_a_gap() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": math.nan},
        {"step": 3},
        {"step": 4, "loss": 0.0},
    ]
    assert figures.series(lines, "loss") == ([1, 4], [2.0, 0.0])
    assert figures.panels("pretrain", lines) == [figures.PANELS["pretrain"][0]]
    assert figures.panels("pretrain", lines[:3]) == []


def test_smoothing_keeps_a_line_and_calms_noise() -> None:
    line = [float(i) for i in range(200)]
    middle = slice(10, 190)
    assert figures.smoothed(line)[middle] == pytest.approx(line[middle])
    zigzag = figures.smoothed([float(i % 2) for i in range(200)])
    assert max(abs(value - 0.5) for value in zigzag[middle]) < 0.1
    assert figures.smoothed([3.0, 1.0]) == [3.0, 1.0]


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "a < b", Html("<i>c</i>"), title='"x"', data_label="y") == (
        '<p title="&quot;x&quot;" data-label="y">a &lt; b<i>c</i></p>'
    )


def test_numbers_and_times_as_people_write_them() -> None:
    assert [number(n) for n in (12, 4096, 4_213_760, 1.75e11)] == ["12", "4.1k", "4.21M", "175B"]
    assert [duration(s) for s in (9.4, 141, 3725)] == ["9 s", "2 min 21 s", "1 h 2 min"]
