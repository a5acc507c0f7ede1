"""The evaluate stage on a run of tiny models, and what it says about results that are known."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from serving.engine.api import Completion
from training import evaluate
from training.data.prompts import read_prompts
from training.data.rankings import read_rankings
from training.data.records import DataError
from training.data.split import held_out, split
from training.data.text import tokenize_to_shards
from training.exam import Answers, Exam, compare, summary
from training.recipe import load_recipe
from training.reward import HELD_OUT
from training.run import Run, StageError, write_atomic
from training.tokenizer import encode_prompt
from training.verdict import warnings

RECIPE = """
seed: 3
val_fraction: 0.5
tokenizer: {{text: ["{corpus}"]}}
pretrain: {{text: ["{corpus}"], seq_len: 64, tokens: 1000}}
sft: {{chats: ["{chats}"]}}
reward: {{rankings: ["{rankings}"]}}
ppo: {{prompts: ["{prompts}"], total_episodes: 8}}
evaluate: {{num_prompts: 8, max_new_tokens: 6, prompts: ["Hello!", "What is <b>tea</b>?"]}}
"""


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory) -> Run:  # type: ignore[no-untyped-def]
    """A run whose stages left: pretrain and SFT the same random model, PPO a moved one, a reward that scores "e"s."""
    root = tmp_path_factory.mktemp("runs") / "small"
    recipe = load_recipe(_written(root.parent / "small.yaml", RECIPE.format(**vars(tiny_world))))
    write_atomic(root / "run.json", recipe.model_dump_json())
    run = Run(root, "evaluate", recipe.seed, val_fraction=recipe.val_fraction)
    run.folder.mkdir()
    for stage in ("pretrain", "sft", "ppo", "reward"):
        shutil.copytree(tiny_world.llama, root / stage / "model")
    _move(run.of("ppo").model)
    _reward(run.of("reward").model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_world.tokenizer)
    tokenize_to_shards([str(tiny_world.corpus)], tokenizer, run.of("pretrain"))
    return run


@pytest.fixture(scope="module")
def result(run: Run) -> dict[str, Any]:
    evaluate.run(_recipe(run).evaluate, run)
    return json.loads((run.folder / "evaluation.json").read_text("utf-8"))


def _written(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def _recipe(run: Run):  # type: ignore[no-untyped-def]
    return evaluate.Recipe.model_validate_json((run.root / "run.json").read_text("utf-8"))


def _move(folder: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def _reward(folder: Path) -> None:
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    card = {"kind": "reward", "reward_mean": 0.5, "reward_std": 2.0}
    write_atomic(folder / "chatforge.json", json.dumps(card))


def _rerun(run: Run, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The evaluation of a copy of the run whose recipe has other stages."""
    root = tmp_path / "copy"
    shutil.copytree(run.root, root, ignore=shutil.ignore_patterns("tensorboard", "metrics.jsonl", "evaluation.json"))
    recipe = _recipe(run).model_copy(update=changes)
    write_atomic(root / "run.json", recipe.model_dump_json())
    evaluate.run(recipe.evaluate, Run(root, "evaluate", run.seed, val_fraction=run.val_fraction))
    return json.loads((root / "evaluate" / "evaluation.json").read_text("utf-8"))


def _estimate(mean: float, stderr: float, n: int = 256) -> dict[str, float]:
    return {"mean": mean, "stderr": stderr, "n": n}


# ---- the stage


def test_models_of_equal_weights_get_equal_numbers(result: dict[str, Any]) -> None:
    bits = result["bits_per_byte"]
    assert bits["sft"] == bits["pretrain"]
    assert bits["ppo"]["mean"] != bits["sft"]["mean"]
    assert bits["sft"]["n"] > 1 and bits["sft"]["stderr"] > 0


def test_prompts_are_held_out_and_all_of_them_are_answered(result: dict[str, Any], run: Run) -> None:
    records = read_prompts(_recipe(run).ppo.prompts)
    sides = {r.identity: held_out(r.key, run.seed, run.val_fraction) for r in records}
    assert result["settings"]["num_prompts"] == 8
    assert {sides[row["prompt"][0]["content"]] for row in result["samples"]["held_out"]} == {True}
    for stage in ("sft", "ppo"):
        assert result["answers"][stage]["stop_rate"]["n"] == 8


def test_ppo_against_sft_has_its_kl_and_paired_gains(result: dict[str, Any]) -> None:
    against = result["ppo_against_sft"]
    assert against["kl"]["mean"] > 0
    assert {name: against[name]["n"] for name in ("kl", "gold_gain", "reward_gain", "wins")} == dict.fromkeys(
        ("kl", "gold_gain", "reward_gain", "wins"), 8
    )
    gold = {stage: result["answers"][stage]["gold"]["mean"] for stage in ("sft", "ppo")}
    assert against["gold_gain"]["mean"] == pytest.approx(gold["ppo"] - gold["sft"])


def test_reward_is_measured_on_what_the_reward_stage_held_out(result: dict[str, Any], run: Run) -> None:
    training, kept = split(read_rankings(_recipe(run).reward.rankings), run.seed + 1, HELD_OUT)
    reward = result["reward"]
    assert (reward["learnt_from"], reward["rankings"]) == (len(training), len(kept))
    assert reward["longer_wins"]["mean"] == 1.0  # the tiny world's better completions are longer, and
    assert reward["bag_of_words"]["mean"] == 1.0  # each has words of its own
    assert reward["over_bag_of_words"]["mean"] == pytest.approx(reward["accuracy"]["mean"] - 1.0)


def test_every_stage_answers_the_fixed_prompts_greedily(result: dict[str, Any], run: Run) -> None:
    hello, tea = result["samples"]["fixed"]
    assert tea["prompt"] == "What is <b>tea</b>?" and set(tea) == {"prompt", "pretrain", "sft", "ppo"}
    model, tokenizer = evaluate.measure.load(str(run.of("sft").model), "cpu")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hello!"}])
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert hello["sft"] == tokenizer.decode(greedy, skip_special_tokens=True)


def test_headline_numbers_are_in_the_metrics(result: dict[str, Any], run: Run) -> None:
    metrics = run.final_metrics()
    assert metrics["reward_accuracy"] == result["reward"]["accuracy"]["mean"]
    assert metrics["kl"] == result["ppo_against_sft"]["kl"]["mean"]
    assert metrics["ppo_stop_rate"] == result["answers"]["ppo"]["stop_rate"]["mean"]


def test_random_models_are_not_called_good(result: dict[str, Any]) -> None:
    text = "\n".join(result["warnings"])
    assert "SFT ends its turn" in text and "not better than SFT by two standard errors" in text
    assert "not better than a bag of words" in text


def test_the_same_run_evaluates_to_the_same_file(result: dict[str, Any], run: Run) -> None:
    evaluate.run(_recipe(run).evaluate, run)
    assert json.loads((run.folder / "evaluation.json").read_text("utf-8")) == result
    assert len(run.metrics()) == 1


def test_what_a_recipe_lacks_is_left_out(run: Run, tmp_path: Path) -> None:
    recipe = _recipe(run)
    nobody = recipe.evaluate.model_copy(update={"judge": None})
    got = _rerun(run, tmp_path, evaluate=nobody, ppo=None, reward=None, pretrain=None)
    assert set(got["answers"]) == {"sft"} and got["answers"]["sft"]["gold"] is None
    assert got["bits_per_byte"] == {} and "reward" not in got and "ppo_against_sft" not in got
    assert set(got["samples"]["fixed"][0]) == {"prompt", "sft"}


def test_models_that_ppo_is_given_stand_for_the_stages_it_replaces(
    result: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    named = {"model": str(run.of("sft").model), "reward_model": str(run.of("reward").model)}
    ppo = _recipe(run).ppo.model_copy(update=named)
    got = _rerun(run, tmp_path, ppo=ppo, sft=None, reward=None)
    assert got["ppo_against_sft"] == result["ppo_against_sft"]


def test_a_run_without_models_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no model to measure"):
        _rerun(run, tmp_path, pretrain=None, sft=None, reward=None, ppo=None)


# ---- one folder


def test_a_causal_lm_is_measured_on_given_text(run: Run, tiny_world) -> None:  # type: ignore[no-untyped-def]
    got = evaluate.evaluate_model(str(run.of("sft").model), [str(tiny_world.corpus)])
    text = tiny_world.corpus.read_text("utf-8")
    assert got["kind"] == "causal-lm"
    assert got["bytes"] == len(text.replace("\n\n", "").encode())
    # Random weights know less than a uniform guess over 512 tokens.
    assert got["perplexity"] > 512
    assert got["bits_per_byte"]["mean"] * got["bytes"] / got["tokens"] == pytest.approx(
        torch.tensor(got["perplexity"]).log2().item(), rel=1e-5
    )


def test_texts_that_are_all_blank_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n' * 2)
    with pytest.raises(DataError, match=r"blank\.jsonl: holds no text"):
        evaluate.evaluate_model(str(run.of("sft").model), [str(tmp_path / "blank.jsonl")])


def test_a_reward_model_is_measured_on_given_rankings(run: Run, tiny_world) -> None:  # type: ignore[no-untyped-def]
    got = evaluate.evaluate_model(str(run.of("reward").model), [str(tiny_world.rankings)])
    assert got["kind"] == "reward" and got["rankings"] == 48 and got["longer_wins"]["mean"] == 1.0
    assert 0 <= got["accuracy"]["mean"] <= 1 and "bag_of_words" not in got


def test_other_kinds_are_refused_by_name(run: Run, tiny_world, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(run.of("sft").model, tmp_path / "m")
    write_atomic(tmp_path / "m" / "chatforge.json", json.dumps({"kind": "translation"}))
    with pytest.raises(ValueError, match="llama is no encoder-decoder; a translation model is needed here"):
        evaluate.evaluate_model(str(tmp_path / "m"), [str(tiny_world.corpus)])


# ---- what the numbers say


def _completion(text: str, finish: Any = "stop", tokens: int = 3) -> Completion:
    return Completion(tuple(range(tokens)), text, (), finish, 0)


def test_a_summary_counts_turns_ended_and_what_repeats() -> None:
    texts = ["I am good", "I am good", "I am bad", "So so"]
    finish = ["stop", "stop", "stop", "length"]
    got = summary(Answers([[1]] * 4, [_completion(t, f) for t, f in zip(texts, finish, strict=True)], None, None))
    assert got["stop_rate"]["mean"] == 0.75 and got["length"]["mean"] == 3
    assert got["most_frequent"] == {"text": "I am good", "share": 0.5}
    assert got["distinct_2"] == 4 / 7 and got["gold"] is None


def test_a_policy_that_has_not_moved_has_no_kl_and_no_gain(run: Run) -> None:
    recipe = _recipe(run)
    still = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"model": str(run.of("ppo").model)})})
    exam = Exam(recipe.evaluate, run, still)
    answers = Answers([[5, 6], [7]], [_completion("Hi", tokens=4)] * 2, [0.5, 0.2], [1.0, 2.0])
    got = compare(exam, answers, answers)
    assert got["kl"]["mean"] == got["gold_gain"]["mean"] == got["reward_gain"]["mean"] == 0.0
    assert got["wins"]["mean"] == 0.5


GOOD: dict[str, Any] = {
    "settings": {"num_prompts": 256, "num_prompts_wanted": 256, "max_new_tokens": 24},
    "answers": {
        stage: {
            "stop_rate": _estimate(0.98, 0.01),
            "distinct_2": 0.5,
            "most_frequent": {"text": "Hi!", "share": 0.02},
        }
        for stage in ("sft", "ppo")
    },
    "reward": {
        "accuracy": _estimate(0.9, 0.02),
        "longer_wins": _estimate(0.5, 0.02),
        "over_longer_wins": _estimate(0.4, 0.02),
        "bag_of_words": _estimate(0.8, 0.02),
        "over_bag_of_words": _estimate(0.1, 0.02),
        "length_spearman": 0.1,
    },
    "ppo_against_sft": {"kl": _estimate(6.0, 0.3), "gold_gain": _estimate(0.3, 0.03)},
}


def test_a_good_result_has_no_warnings() -> None:
    assert warnings(GOOD) == []
    assert warnings({name: GOOD[name] for name in ("settings", "answers")}) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("settings", "num_prompts"), 40, "Only 40 held-out prompts"),
        (("answers", "sft", "stop_rate"), _estimate(0.9, 0.01), "SFT ends its turn within 24 tokens on 90.0%"),
        (("reward", "over_bag_of_words"), _estimate(0.03, 0.02), "not better than a bag of words"),
        (("reward", "over_longer_wins"), _estimate(-0.1, 0.02), "not better than “the longer one wins”"),
        (("reward", "length_spearman"), -0.7, "it likes shorter answers"),
        (("ppo_against_sft", "gold_gain"), _estimate(0.05, 0.03), "+0.050 ± 0.030 over 256 prompts"),
        (("answers", "ppo", "distinct_2"), 0.2, "reward hacking"),
        (("answers", "ppo", "most_frequent"), {"text": "Good!", "share": 0.4}, "to 40% of the prompts: “Good!”"),
    ],
)
def test_each_flaw_has_one_warning_in_plain_words(path: tuple[str, ...], value: Any, words: str) -> None:
    flawed = copy.deepcopy(GOOD)
    *parents, leaf = path
    node = flawed
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    [warning] = warnings(flawed)
    assert words in warning
