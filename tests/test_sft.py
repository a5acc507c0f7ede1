"""Supervised fine-tuning in one process, on a real DeepSpeedEngine."""

import json
import re

import pytest
import torch
from conftest import losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import sft, zero
from training.config import SFTConfig
from training.data.chats import Chat, read_chats
from training.pretrained import length_limit
from training.run import Run, StageError
from training.tokenizer import CHATML


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture
def make_run(tmp_path, tiny_world):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "sft", seed=3, val_fraction=0.1)
        run.folder.mkdir(parents=True)
        settings = {"model": str(tiny_world.llama), "chats": [str(tiny_world.chats)], "batch_size": 16}
        settings |= {"micro_batch_size": 16, "num_train_epochs": 2.0, "learning_rate": 1e-2, "checkpoint_every": 3}
        return SFTConfig(**{**settings, "dtype": "fp32", **changes}), run

    return make


def test_it_learns_on_deepspeed_and_leaves_a_model_folder(make_run):
    config, run = make_run(dtype="bf16")
    sft.run(config, run)  # the callback asserts the DeepSpeedEngine
    assert losses(run)[-1] < losses(run)[0] - 0.5
    assert "val_loss" in run.final_metrics()
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.chat_template and tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert not list((run.folder / "trainer").glob("checkpoint-*"))  # transformers writes one at the last step


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(make_run, goes_on_with_the_same_losses):
    goes_on_with_the_same_losses(sft, make_run, at=11)  # in the second epoch


def test_an_epochs_validation_loss_is_not_lost_with_a_kill_after_its_checkpoint(make_run, monkeypatch):
    config, undisturbed = make_run("undisturbed")
    sft.run(config, undisturbed)
    epoch = undisturbed.metrics()[0]["total"] // 2
    config, killed = make_run("killed", checkpoint_every=epoch)
    adopt = zero.adopt_checkpoint

    def die(run, step, written):
        adopt(run, step, written)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zero, "adopt_checkpoint", die)
        sft.run(config, killed)
    assert killed.latest_checkpoint()[0] == epoch
    sft.run(config, killed)
    measured = [[line["val_loss"] for line in r.metrics() if "val_loss" in line] for r in (undisturbed, killed)]
    assert measured[0] == measured[1] and len(measured[0]) == 2


def test_lora_is_merged_in_the_export(make_run, nothing_stays_whole, tiny_world):
    """And learns the same where everything is sharded, frozen weights too, and blocks are computed again."""
    config, plain = make_run("plain", lora={"r": 4, "alpha": 8})
    sft.run(config, plain)
    config, run = make_run(lora={"r": 4, "alpha": 8}, zero_stage=3, gradient_checkpointing=True)
    sft.run(config, run)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
    zero.init_distributed("cpu")  # else transformers would shard what it loads now, too
    assert not (run.model / "adapter_config.json").exists()
    before = AutoModelForCausalLM.from_pretrained(tiny_world.llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in moved)
    assert not any("embed" in name or "norm" in name for name in moved)


def test_only_the_assistants_tokens_teach_and_its_turn_end_among_them(tiny_world):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.tokenizer)
    chat = Chat([{"role": "user", "content": "What is tea?"}, {"role": "assistant", "content": "It is tea."}], key="k")
    [row], _ = sft.tokenize([chat], tokenizer, 256)
    taught = [i for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(taught) == "It is tea.<|im_end|>"


def test_a_long_chat_loses_whole_exchanges(tiny_world):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.tokenizer)
    chats = [chat for chat in read_chats([str(tiny_world.chats)])[0] if len(chat.messages) == 4]
    [short], _ = sft.tokenize([Chat(chats[0].messages[:2], key="k")], tokenizer, 256)
    assert sft.tokenize(chats[:1], tokenizer, len(short["input_ids"]) + 3) == ([short], 1)


def test_chats_that_do_not_fit_are_refused(make_run):
    config, run = make_run(max_length=4)
    with pytest.raises(StageError, match=r"max_length=4: none of \d+ chats fits"):
        sft.run(config, run)


def test_what_does_not_fit_is_told_and_a_held_out_side_may_be_empty_of_it(make_run, tmp_path, tiny_world):
    """Training could begin, and was refused for the one long chat that was held out."""
    chats = [json.loads(line) for line in tiny_world.chats.read_text().splitlines()]
    _, held_out = sft.split(read_chats([str(tiny_world.chats)])[0], 3, 0.1)
    long = {chat.messages[0]["content"] for chat in held_out}
    for chat in chats:
        if chat["messages"][0]["content"] in long:
            chat["messages"][1]["content"] *= 40
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config, run = make_run(chats=[str(tmp_path / "long.jsonl")], num_train_epochs=0.2)
    sft.run(config, run)
    notes = "\n".join(run.notes())
    assert "none of the chats held out fits 256 tokens: there is no validation loss" in notes
    assert re.search(r"(\d+) of \1 chats fit 256 tokens, 0 of them without their end", notes)


def test_less_memory_a_pass_goes_on_with_the_same_losses(make_run):
    config, undisturbed = make_run("undisturbed")
    sft.run(config, undisturbed)
    log, (_, stopped) = Run.log, make_run("stopped")

    def die(self, step, total, **metrics):
        log(self, step, total, **metrics)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", die)
        sft.run(config, stopped)
    sft.run(config.model_copy(update={"micro_batch_size": 4, "gradient_checkpointing": True}), stopped)
    assert losses(stopped) == pytest.approx(losses(undisturbed), rel=1e-4)


def test_chats_are_no_longer_than_the_model_can_see(tiny_world):
    """A longer one was an index out of range, after all of pretraining."""
    assert length_limit(10_000, "m", str(tiny_world.gpt2)) == length_limit(10_000, "m", str(tiny_world.llama)) == 256
    assert length_limit(100, "m", str(tiny_world.gpt2)) == 100


def with_template(tiny_world, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_a_start_that_is_no_chat_model_is_refused_in_words(tiny_world):
    with pytest.raises(StageError, match=r"sft\.model=gpt2: its tokenizer has no chat template"):
        sft.training_template(with_template(tiny_world, None), "gpt2")
    unknown = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    with pytest.raises(StageError, match=r"sft\.model=mine: "):
        sft.training_template(with_template(tiny_world, unknown), "mine")


def test_chatml_as_other_models_have_it_is_taught_from(tiny_world):
    tokenizer = with_template(tiny_world, f"{{% for message in messages %}}{CHATML}{{% endfor %}}")
    template = sft.training_template(tokenizer, "theirs")
    chat = Chat([{"role": "user", "content": "What is tea?"}, {"role": "assistant", "content": "It is tea."}], key="k")
    [row], _ = sft.tokenize([chat], tokenizer, 256, template)
    taught = [i for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(taught) == "It is tea.<|im_end|>"
