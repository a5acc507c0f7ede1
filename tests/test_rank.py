"""The rank stage: sampling, the judge, a person at the terminal, and going on after a kill."""

import io
import json
from itertools import combinations

import pytest

from training import rank
from training.config import RankConfig
from training.data.prompts import read_prompts
from training.data.rankings import read_rankings
from training.data.records import DataError
from training.data.split import held_out
from training.judges import judge
from training.rank import choose_prompts, completions_path, parse_order, rank_in_terminal, rankings_path, ranks_of, run
from training.run import Run, StageError, read_jsonl


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "MIN_STOP_RATE", 0.0)  # random weights hardly ever end a turn
    run = Run(tmp_path / "demo", "rank", seed=1, val_fraction=0.2)
    run.folder.mkdir(parents=True)
    return run


def config(tiny_world, **changes) -> RankConfig:
    shared = {"model": str(tiny_world.llama), "prompts": [str(tiny_world.prompts)], "max_new_tokens": 6}
    return RankConfig(**(shared | {"num_prompts": 17, "num_completions": 4} | changes))


# ---- which prompts


def test_prompts_are_distinct_of_the_training_side_and_shuffled_by_the_seed(tiny_world, stage):
    prompts = read_prompts([str(tiny_world.prompts)])
    training = {prompt.identity for prompt in prompts if not held_out(prompt.key, 1, 0.2)}
    twice = config(tiny_world, prompts=[str(tiny_world.prompts)] * 2, num_prompts=100)
    chosen = [prompt.identity for prompt in choose_prompts(twice, stage, lambda prompt: True)]
    assert len(chosen) == len(set(chosen)) and set(chosen) == training != {p.identity for p in prompts}
    few = choose_prompts(config(tiny_world, num_prompts=5), stage, lambda prompt: True)
    assert [prompt.identity for prompt in few] == chosen[:5]
    assert chosen != sorted(chosen, key=[p.identity for p in prompts].index)


def test_prompts_that_leave_no_room_are_passed_over(tiny_world, stage):
    short = choose_prompts(config(tiny_world), stage, lambda prompt: len(prompt.identity) < 15)
    assert f"and {len(short)} of them leave room for a completion" in "".join(stage.notes())
    assert short and all(len(prompt.identity) < 15 for prompt in short)
    with pytest.raises(DataError, match=r"none of 17 prompts leaves room for rank.max_new_tokens=6"):
        choose_prompts(config(tiny_world), stage, lambda prompt: False)


# ---- sampling and the judge


def test_stage_leaves_rankings_that_the_reward_stage_can_read(tiny_world, stage):
    run(config(tiny_world), stage)
    rankings = read_rankings([str(rankings_path(stage))])
    assert len(rankings) == 17
    assert all(len(ranking.completions) == 4 for ranking in rankings)
    assert len({completion for ranking in rankings for completion in ranking.completions}) > 40
    for line in read_jsonl(rankings_path(stage)):
        assert line["ranking"] == ranks_of([judge("vader")(line["prompt"], text) for text in line["completions"]])
    metrics = stage.final_metrics()
    assert metrics["prompts"] == 17
    pairs = sum(a != b for ranking in rankings for a, b in combinations(ranking.ranks, 2))
    assert metrics["pairs"] == pairs == 17 * 6 * (1 - metrics["tied"])


def test_a_kill_at_any_byte_gives_the_files_of_an_undisturbed_run(tiny_world, stage, tmp_path):
    run(config(tiny_world), stage)
    whole = [path(stage).read_bytes() for path in (completions_path, rankings_path)]
    lines = [content.splitlines(keepends=True) for content in whole]
    killed = Run(tmp_path / "killed", "rank", seed=1, val_fraction=0.2)
    killed.folder.mkdir(parents=True)
    completions_path(killed).write_bytes(b"".join(lines[0][:7]) + lines[0][7][:20])
    rankings_path(killed).write_bytes(b"".join(lines[1][:3]) + lines[1][3][:-1])
    run(config(tiny_world), killed)
    assert [path(killed).read_bytes() for path in (completions_path, rankings_path)] == whole


def test_scores_that_are_equal_tie():
    assert ranks_of([0.2, 0.9, 0.2, -1.0]) == [2, 1, 2, 4]


def test_vader_prefers_the_friendly_and_dislikes_silence():
    score = judge("vader")
    texts = ["", "I hate you.", "It is a table.", "What a lovely day, I am so happy!"]
    scores = [score([{"role": "user", "content": "Hi"}], text) for text in texts]
    assert scores[0] == -1.0 == score([], " \n") and sorted(scores) == scores and len(set(scores)) == 4


# ---- a person


@pytest.fixture
def sampled(stage):
    """Three prompts of three completions, waiting for a person."""
    lines = [
        {"id": f"k{i}", "prompt": [{"role": "user", "content": f"Question {i}?"}], "completions": ["x", "y\nz", ""]}
        for i in range(3)
    ]
    completions_path(stage).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stage


def answer(stage, *lines: str) -> tuple[tuple[int, int], str]:
    shown = io.StringIO()
    counts = rank_in_terminal(stage, io.StringIO("".join(line + "\n" for line in lines)), shown)
    return counts, shown.getvalue()


def rankings(stage) -> list[list[int]]:
    return [line["ranking"] for line in read_jsonl(rankings_path(stage))]


def test_a_person_ranks_ties_skips_undoes_quits_and_comes_back(sampled):
    assert answer(sampled, "b a=c", "c b a", "u", "q")[0] == (1, 3)
    assert rankings(sampled) == [[2, 1, 2]]
    counts, shown = answer(sampled, "s", "a > b, c")
    assert counts == (3, 3) and "[1 of 3]" not in shown and "[2 of 3]" in shown
    assert rankings(sampled) == [[2, 1, 2], [1, 1, 1], [1, 2, 3]]
    assert [line.get("skipped") for line in read_jsonl(rankings_path(sampled))] == [None, True, None]
    assert len(read_rankings([str(rankings_path(sampled))])) == 3


def test_what_is_shown(sampled):
    _, shown = answer(sampled)  # the input ends at once
    assert "[1 of 3]\n  user: Question 0?\n\n  a  x\n  b  y\n     z\n  c  (nothing)\n" in shown
    assert shown.endswith("0 of 3 prompts are ranked.\n")


def test_undo_with_nothing_to_undo_asks_the_same_again(sampled):
    counts, shown = answer(sampled, "u", "u", "a b c")
    assert counts == (1, 3) and shown.count("[1 of 3]") == 3
    assert rankings(sampled) == [[1, 2, 3]]


def test_bad_input_says_what_is_wrong_and_asks_again(sampled):
    counts, shown = answer(sampled, "a d b", "a b a", "a=b", "", "A=B c")
    assert counts == (1, 3) and rankings(sampled) == [[1, 1, 3]]
    for message in ("'d' is none of the letters a to c", "a is there twice", "c missing", "a, b, c missing"):
        assert message in shown


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("b a=c d", [2, 1, 2, 4]), ("a=b=c=d", [1, 1, 1, 1]), ("d>c = b , a", [4, 2, 2, 1]), ("D C B A", [4, 3, 2, 1])],
)
def test_parse_order(text, ranks):
    assert parse_order(text, 4) == ranks


@pytest.mark.parametrize("text", ["ab c d", "a == b c d", "a b c d e", "1 2 3 4", "= a b c d", "best"])
def test_parse_order_refuses(text):
    with pytest.raises(ValueError, match="none of the letters a to d"):
        parse_order(text, 4)


def test_the_stage_waits_for_the_person_and_then_goes_on(tiny_world, stage):
    waiting = config(tiny_world, judge="person", num_prompts=2, num_completions=2)
    with pytest.raises(StageError, match="0 of 2 prompts are ranked: rank the rest with `chatforge rank demo`"):
        run(waiting, stage)
    assert answer(stage, "b a", "a=b")[0] == (2, 2)
    run(waiting, stage)
    assert stage.final_metrics()["prompts"] == 2


def test_nothing_to_rank_is_said(stage):
    with pytest.raises(StageError, match="run 'demo' has no completions to rank"):
        rank_in_terminal(stage, io.StringIO(), io.StringIO())


# ---- the gate


def test_a_model_that_does_not_end_its_turns_stops_the_run(tiny_world, tmp_path):
    stage = Run(tmp_path / "endless", "rank", seed=1, val_fraction=0.2)
    with pytest.raises(StageError, match=r"ends its turn in \d+% of 68 completions .* max_new_tokens=6"):
        run(config(tiny_world), stage)


def test_the_gate_counts_completions_that_end():
    lines = [{"finish_reasons": ["stop", "length"]}, {"finish_reasons": ["stop", "stop"]}]
    rank.require_endings(lines, 6)
    with pytest.raises(StageError, match="25% of 4"):
        rank.require_endings([{"finish_reasons": ["length", "length"]}, {"finish_reasons": ["stop", "length"]}], 6)
