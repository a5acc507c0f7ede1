"""The translation stage in one process: it learns, goes on after a stop, and what must not matter does not."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import losses
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from workers import two_workers

from training import translation, translation_validation, zero
from training.config import ConfigError, TranslationConfig
from training.data.examples import Example
from training.run import Run, StageError
from training.subwords import train_subwords

NUMBERS = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"num_layers": 1, "num_heads": 2, "hidden_size": 32, "vocab_size": 340, "max_length": 24, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four digits in words: a language of which every sentence can be translated word by word."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    digits = [f"{number:04d}" for number in range(0, 10_000, 9)]
    lines = ("\t".join(" ".join(names[int(d)] for d in number) for names in (NUMBERS, ENGLISH)) for number in digits)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture
def make_run(tmp_path, corpus):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "translation", seed=3, val_fraction=0.05)
        run.folder.mkdir(parents=True)
        settings = {"pairs": [str(corpus)], "steps": 12, "batch_tokens": 512, "micro_batch_tokens": 512}
        settings |= {"dtype": "fp32", "learning_rate": 3e-3, "checkpoint_every": 4, "eval_every": 3}
        return TranslationConfig(**{**SIZES, **settings, **changes}), run

    return make


def test_it_learns_to_translate_and_leaves_a_model_folder(make_run):
    config, run = make_run(steps=300, batch_tokens=1024, learning_rate=1e-2, eval_every=100, hidden_size=64)
    translation.run(config, run)
    assert losses(run)[0] == pytest.approx(math.log(384), abs=1.5)  # 340 tokens, padded to 64s: it knows nothing
    metrics = run.final_metrics()
    assert metrics["val_chrf"] > 80 and metrics["val_loss"] < 0.7
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    trained = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" not in name)
    assert trained == config.parameters(model.config.vocab_size)
    out = model.generate(**tokenizer(["drei eins vier eins"], return_tensors="pt"))
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == "three one four one"
    card = json.loads((run.model / "chatforge.json").read_text("utf-8"))
    assert (card["kind"], card["source_language"], card["target_language"]) == ("translation", "de", "en")
    assert card["source_script"] == "LATIN"


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(make_run, goes_on_with_the_same_losses):
    goes_on_with_the_same_losses(translation, make_run, at=10)


def test_a_run_that_was_stopped_ends_with_the_same_average(make_run, monkeypatch):
    """Stopped after validations that the checkpoint has not seen: their weights are made again."""
    config, undisturbed = make_run("undisturbed")
    translation.run(config, undisturbed)
    _, stopped = make_run("stopped")
    monkeypatch.setattr(translation_validation.Validation, "export", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        translation.run(config, stopped)
    monkeypatch.undo()
    assert stopped.latest_checkpoint()[0] == 8
    translation.run(config, stopped)
    both = [(run.model / "model.safetensors").read_bytes() for run in (undisturbed, stopped)]
    assert both[0] == both[1]
    assert undisturbed.final_metrics()["val_chrf_exported"] == stopped.final_metrics()["val_chrf_exported"]


def test_micro_batches_are_a_matter_of_memory_alone(make_run):
    config, whole = make_run("whole")
    translation.run(config, whole)
    config, parts = make_run("parts", micro_batch_tokens=150)
    assert config.gradient_accumulation_steps(1) == 4
    translation.run(config, parts)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_zero_stages_and_blocks_that_are_computed_again_give_the_same_losses(make_run, nothing_stays_whole, zero_stage):
    config, reference = make_run("reference")
    translation.run(config, reference)
    config, sharded = make_run("sharded", zero_stage=zero_stage, gradient_checkpointing=True)
    translation.run(config, sharded)
    assert losses(sharded) == pytest.approx(losses(reference), abs=1e-4)
    scores = [[line["val_chrf"] for line in r.metrics() if "val_chrf" in line] for r in (reference, sharded)]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)


@pytest.mark.parametrize("mean_score", [5.0, 4.0])
def test_what_is_exported_is_the_best_and_not_the_last(make_run, monkeypatch, mean_score):
    """Validations of 1, 5 and then 2: the mean of the first two where it translates as well, else the second's own."""
    scripted = iter([1.0, 5.0, mean_score, 2.0, 2.0, 0.0])
    monkeypatch.setattr(translation_validation.Validation, "_score", lambda self, weights: next(scripted))
    saved = {}
    save = translation_validation._save

    def watched(weights, path):
        saved[path.name] = weights
        save(weights, path)

    monkeypatch.setattr(translation_validation, "_save", watched)
    config, run = make_run()
    translation.run(config, run)
    first, second = (saved[f"step-{step:08d}.safetensors"] for step in (3, 6))
    mean = translation_validation.mean_of([first, second])
    exported = AutoModelForSeq2SeqLM.from_pretrained(run.model).state_dict()
    wanted, other = (mean, second) if mean_score == 5.0 else (second, mean)
    assert all(torch.equal(exported[name], weights) for name, weights in wanted.items())
    assert any(not torch.equal(exported[name], weights) for name, weights in other.items())


def test_what_a_restart_does_not_need_is_deleted(make_run):
    config, run = make_run(steps=30, eval_every=2, average_last=3)
    translation.run(config, run)  # checkpoints at 4, 8, ... 28
    steps = sorted(int(path.stem[5:]) for path in (run.checkpoints / "averages").glob("step-*.safetensors"))
    assert steps == [24, 26, 28, 30]


def test_a_restart_forgets_later_weights_and_what_a_kill_left_of_them(make_run):
    config, run = make_run()
    averages = run.checkpoints / "averages"
    averages.mkdir(parents=True)
    for name in ("step-00000003.safetensors", "step-00000006.safetensors", ".best-00000003.safetensors.tmp"):
        (averages / name).touch()
    translation_validation.Validation(config, run, None, None, None).rewind(4)
    assert [path.name for path in averages.iterdir()] == ["step-00000003.safetensors"]


def test_a_batch_smaller_than_its_passes_is_learnt_from_once(make_run):
    """One pair a batch in four passes, three of them empty."""
    config, whole = make_run("whole", steps=4, batch_tokens=48)
    translation.run(config, whole)
    config, parts = make_run("parts", steps=4, batch_tokens=48, micro_batch_tokens=12)
    assert config.gradient_accumulation_steps(1) == 4
    translation.run(config, parts)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def test_two_workers_give_the_losses_of_one(make_run, tmp_path):
    config, alone = make_run("alone")
    translation.run(config, alone)
    codes, told = two_workers("translation", config, tmp_path / "both")
    assert codes == [0, 0], told
    both = Run(tmp_path / "both", "translation")
    assert losses(both) == pytest.approx(losses(alone), abs=1e-4)
    assert both.final_metrics()["val_loss"] == pytest.approx(alone.final_metrics()["val_loss"], abs=1e-3)


def test_data_that_is_wrong_ends_every_worker_with_its_message(make_run, tmp_path):
    """Rank 0 alone reads it; the other must not wait for it."""
    (tmp_path / "bad.tsv").write_text("Ja\tYes\n1\t2\t3\n", "utf-8")
    config, _ = make_run("unused", pairs=[str(tmp_path / "bad.tsv")])
    codes, told = two_workers("translation", config, tmp_path / "both")
    assert codes == [1, 1] and all("bad.tsv:2: has 3 columns" in words for words in told)


def test_it_ends_where_nothing_gets_better(make_run):
    config, run = make_run(steps=60, learning_rate=1e-9, eval_every=2, patience=3)
    translation.run(config, run)
    assert run.metrics()[-1]["step"] == 8  # the first validation is the best, and three more are no better


def test_a_model_that_is_there_is_fine_tuned_with_adapters(make_run):
    config, start = make_run("start", steps=6)
    translation.run(config, start)
    config, tuned = make_run("tuned", model=str(start.model), lora={"r": 4, "alpha": 8}, learning_rate=1e-2)
    translation.run(config, tuned)
    assert losses(tuned)[-1] < losses(tuned)[0]
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(r.model).state_dict() for r in (start, tuned))
    assert before.keys() == after.keys()  # merged: an ordinary model folder
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name or "fc" in name for name in changed)


def test_a_start_that_cannot_be_used_is_refused_in_words(make_run, tiny_world, tmp_path):
    for model, said in (
        (tiny_world.llama, "translation.model=.*: holds a causal-lm model"),
        (tmp_path / "nowhere", "translation.model=.*: no such model folder"),
        (tiny_world.translation, "translation.max_length=1000: .* takes [0-9]+ tokens at most"),
    ):
        config, run = make_run(f"from-{model.name}", model=str(model), max_length=1000, batch_tokens=2000)
        with pytest.raises(StageError, match=said):
            translation.run(config, run)


def test_an_opus_mt_folder_is_fine_tuned_and_stays_one(make_run, tmp_path):
    """Its two SentencePiece vocabularies: sources by the one, targets by the other."""
    from translation_world import build_opus_folder

    start = build_opus_folder(tmp_path / "opus")
    config, run = make_run("tuned", model=str(start), steps=6, max_length=40)
    translation.run(config, run)
    assert (run.model / "source.spm").is_file() and (run.model / "target.spm").is_file()
    assert losses(run)[-1] < losses(run)[0]


# ---- maths


def test_token_loss_against_the_definition():
    torch.manual_seed(0)
    logits, labels, smoothing = torch.randn(2, 3, 7), torch.tensor([[1, 2, translation.IGNORED], [0, 6, 5]]), 0.1
    by_hand = 0.0
    for row in range(2):
        for t in range(3):
            if labels[row, t] == translation.IGNORED:
                continue
            logprobs = F.log_softmax(logits[row, t], -1)
            wanted = torch.full((7,), smoothing / 7)
            wanted[labels[row, t]] += 1 - smoothing
            by_hand -= (wanted * logprobs).sum().item()
    assert translation.token_loss(logits, labels, smoothing).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_mean_of_weights():
    states = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    assert translation_validation.mean_of(states)["a"].tolist() == [2.0, 4.0]


def test_collate_pads_on_the_right():
    import numpy as np

    rows = [Example(np.array([5, 6, 1]), np.array([7, 1])), Example(np.array([5, 1]), np.array([7, 8, 1]))]
    batch = translation.collate(rows, 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, translation.IGNORED], [7, 8, 1]]


def test_the_tokenizer_gives_every_text_back_and_one_token_to_a_word_wherever_it_stands():
    tokenizer = train_subwords(["eins zwei drei zwei"] * 50, 300, 24)
    for text in ("zwei eins", "Ünïcode 🙂 \t x", "123"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == text
    first, again = tokenizer("zwei zwei").input_ids[:2]
    assert first == again


REFUSED = {
    "a batch that holds no pair": ({"batch_tokens": 100, "max_length": 64}, "batch_tokens to at least 128"),
    "one language": ({"target_language": "DE"}, "target_language='DE' is the source language"),
    "no language": ({"source_language": "German!"}, "source_language='German!'"),
    "adapters of nothing": ({"lora": {}}, "lora adapts a model that is there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_setting_is_refused(case, tmp_path):
    from training.recipe import load_recipe

    changes, said = REFUSED[case]
    sets = [f"translation.{key}={json.dumps(value)}" for key, value in changes.items()]
    with pytest.raises(ConfigError, match=said):
        load_recipe("translation-tiny", sets)
