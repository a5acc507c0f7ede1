"""The reward model: its loss against the paper's sum, and training in one process on a real DeepSpeedEngine."""

import itertools
import json
import math
import random
import shutil

import pytest
import torch
from conftest import losses
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training import reward, zero
from training.config import RewardConfig
from training.data.rankings import read_rankings
from training.ppo import load_scorer
from training.pretrained import pretrained
from training.run import Run, StageError


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture
def make_run(tmp_path, tiny_world):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "reward", seed=3, val_fraction=0.1)
        run.folder.mkdir(parents=True)
        settings = {"model": str(tiny_world.llama), "rankings": [str(tiny_world.rankings)], "batch_size": 8}
        settings |= {"micro_batch_size": 8, "num_train_epochs": 3.0, "learning_rate": 3e-3, "checkpoint_every": 4}
        return RewardConfig(**{**settings, "dtype": "fp32", **changes}), run

    return make


def by_hand(scores, ranking):
    pairs = [(a, b) for a, b in itertools.permutations(range(len(scores)), 2) if ranking[a] < ranking[b]]
    return sum(-math.log(1 / (1 + math.exp(scores[b] - scores[a]))) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("ranking", [[1, 2], [2, 1], [4, 3, 2, 1], [1, 1, 2, 2], [3, 1, 3, 2]])
def test_ranking_loss_is_the_papers_sum(ranking):
    scores = torch.randn(len(ranking), generator=torch.Generator().manual_seed(0))
    expected = by_hand(scores.tolist(), ranking)
    assert reward.ranking_loss(scores, torch.tensor(ranking)).item() == pytest.approx(expected, rel=1e-5)


def test_ties_are_no_pairs_and_equal_scores_half_right():
    assert reward.pairs_right(torch.tensor([3.0, 2.0, 1.0]), [1, 3, 3]) == (2.0, 2)
    assert reward.pairs_right(torch.tensor([0.0, 0.0]), [1, 2]) == (0.5, 1)
    assert reward.pairs_right(torch.tensor([0.0, 1.0]), [1, 2]) == (0.0, 1)


def test_it_starts_at_ln_2_and_learns_the_order(make_run):
    config, run = make_run(dtype="bf16")
    reward.run(config, run)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.final_metrics()["val_accuracy"] > 0.9
    card = json.loads((run.model / "chatforge.json").read_text())
    assert card["kind"] == "reward" and card["reward_std"] > 0


def test_the_folder_scores_as_the_card_says(make_run, tiny_world):
    """Mean and deviation are those of the held-out completions, scored by the saved folder."""
    config, run = make_run()
    reward.run(config, run)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    _, held_out = reward.split(read_rankings([str(tiny_world.rankings)]), run.seed + 1, reward.HELD_OUT)
    with torch.no_grad():
        ids = [c for row in reward.tokenize(held_out, tokenizer) for c in row["completions"]]
        scores = torch.tensor([model(torch.tensor([c])).logits.item() for c in ids])
    card = json.loads((run.model / "chatforge.json").read_text())
    assert card["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert card["reward_std"] == pytest.approx(scores.std().item(), abs=1e-4)


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_turns_end_that_is_also_the_pad_is_what_is_scored(make_run, tmp_path, tiny_world, pad):
    """As in most models of others. transformers took the last word for the last token; PPO asks for the turn's end."""
    start = tmp_path / "start"
    shutil.copytree(tiny_world.llama, start)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(start)
    config, run = make_run(model=str(start))
    reward.run(config, run)
    _, held_out = reward.split(read_rankings([str(tiny_world.rankings)]), run.seed + 1, reward.HELD_OUT)
    ids = [c for row in reward.tokenize(held_out, tokenizer) for c in row["completions"]]
    assert {c[-1] for c in ids} == {tokenizer.eos_token_id}
    scorer = load_scorer(str(run.model), "m").eval()
    with torch.no_grad():
        scores = torch.cat([scorer(1, input_ids=torch.tensor([c])).flatten() for c in ids])
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-3) and scores.std().item() == pytest.approx(1.0, abs=1e-3)
    assert json.loads((run.model / "chatforge.json").read_text())["accuracy"] > 0.9


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(make_run, goes_on_with_the_same_losses):
    goes_on_with_the_same_losses(reward, make_run, at=6)


def test_lora_is_merged_and_the_head_is_trained(make_run):
    """So it is where blocks are computed again."""
    settings = {"lora": {"r": 4, "alpha": 8}, "learning_rate": 2e-2}
    config, again = make_run("again", **settings, gradient_checkpointing=True)
    reward.run(config, again)
    config, run = make_run(**settings)
    reward.run(config, run)
    assert losses(again) == pytest.approx(losses(run), abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    assert model.score.weight.abs().sum() > 0
    assert not (run.model / "adapter_config.json").exists()


def test_a_reward_at_chance_stops_the_run(make_run, tmp_path, tiny_world):
    records = [json.loads(line) for line in tiny_world.rankings.read_text().splitlines()]
    for number, record in enumerate(records):  # nothing to learn: the order is a die's
        record["ranking"] = random.Random(number).sample(range(1, 5), 4)
    noise = tmp_path / "noise.jsonl"
    noise.write_text("".join(json.dumps(r) + "\n" for r in records))
    config, run = make_run(rankings=[str(noise)], num_train_epochs=0.2, learning_rate=1e-9)
    with pytest.raises(StageError, match="chance"):
        reward.run(config, run)
    assert not run.model.exists()


def test_chance_is_reckoned_with_the_pairs_that_are_not_tied(make_run, tmp_path, tiny_world):
    """Those that tie were counted too, which made chance look narrower than it is."""
    records = [json.loads(line) for line in tiny_world.rankings.read_text().splitlines()]
    for number, record in enumerate(records):
        record["ranking"] = random.Random(number).sample([1, 2, 2, 2], 4)
    tied = tmp_path / "tied.jsonl"
    tied.write_text("".join(json.dumps(r) + "\n" for r in records))
    config, run = make_run(rankings=[str(tied)], num_train_epochs=0.2, learning_rate=1e-9)
    held_out = reward.split(read_rankings([str(tied)]), run.seed + 1, reward.HELD_OUT)[1]
    with pytest.raises(StageError, match=rf"of {3 * len(held_out)} held-out pairs"):
        reward.run(config, run)


def test_a_name_that_is_no_model_is_told_by_its_field(make_run, tmp_path):
    """As a mistake: a crash is tried again three times."""
    (tmp_path / "empty").mkdir()
    config, run = make_run(model=str(tmp_path / "empty"))
    with pytest.raises(StageError, match=r"reward\.model=.*/empty: .*; correct the name, or give a model folder"):
        reward.run(config, run)


def test_what_may_pass_is_no_mistake():
    """A disk or a hub that is away for a moment: the worker dies of it, and is started again."""

    class Away:
        def from_pretrained(self, model):
            if model == "disk":
                raise OSError(5, "Input/output error")
            raise OSError("We couldn't connect") from ConnectionError()

    for model in ("disk", "hub"):
        with pytest.raises(OSError, match=r"error|connect"):
            pretrained(Away(), "reward.model", model)


def test_padding_does_not_change_a_reward(tiny_world):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.llama)
    model = reward.load_reward_model(str(tiny_world.llama), tokenizer).eval()
    torch.nn.init.normal_(model.score.weight)
    collate = reward.RankingCollator(tokenizer.pad_token_id)
    rows = [[5, 6, 7, 2], [5, 9, 10, 11, 12, 13, 2]]
    batch = collate([{"completions": rows, "ranking": [1, 2]}])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        alone = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(together, alone)
