"""The tokenizer stage, and each pitfall of prompts, masks and special tokens."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from training.config import TokenizerConfig
from training.data.records import DataError
from training.run import Run
from training.tokenizer import SPECIAL_TOKENS, encode_completion, encode_prompt, run, stop_ids

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi! How are you?"},
    {"role": "user", "content": "Fine.\n\nYou?"},
    {"role": "assistant", "content": "Fine too."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return AutoTokenizer.from_pretrained(tiny_world.tokenizer)


def test_stage_leaves_a_tokenizer_folder_and_its_compression(tiny_world, tmp_path):
    stage = Run(tmp_path, "tokenizer", val_fraction=0.1)
    run(TokenizerConfig(text=[str(tiny_world.corpus)], vocab_size=400), stage)
    assert json.loads((stage.model / "chatforge.json").read_text())["kind"] == "tokenizer"
    assert len(AutoTokenizer.from_pretrained(stage.model)) == 400
    metrics = stage.final_metrics()
    assert metrics["vocab_size"] == 400 and metrics["bytes_per_token"] > 1.3


def test_same_text_gives_the_same_tokenizer_and_another_split_another(tiny_world, tmp_path):
    config = TokenizerConfig(text=[str(tiny_world.corpus)], vocab_size=400)
    made = []
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        stage = Run(tmp_path / name, "tokenizer", seed=seed, val_fraction=0.3)
        run(config, stage)
        made.append((stage.model / "tokenizer.json").read_bytes())
    assert made[0] == made[1] != made[2]


def test_nothing_held_out_is_an_error_that_names_the_fraction(tmp_path):
    (tmp_path / "one.txt").write_text("one document alone\n")
    with pytest.raises(DataError, match=r"val_fraction=1e-09"):
        config = TokenizerConfig(text=[str(tmp_path / "one.txt")], vocab_size=300)
        run(config, Run(tmp_path, "tokenizer", val_fraction=1e-9))


def test_special_tokens_are_distinct_and_single(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert all(tokenizer(token)["input_ids"] == [index] for index, token in enumerate(SPECIAL_TOKENS))


@pytest.mark.parametrize("text", ["Hello  world\n\n\n\tx = 1  \n", "naïve — 你好 🙂", "\r\n \n", "\x00\x7f"])
def test_bytes_in_are_bytes_out(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_mask_holds_the_assistants_words_and_turn_end_alone(tokenizer):
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    spans = "".join(
        tokenizer.decode([token]) if marked else "·"
        for token, marked in zip(out["input_ids"], out["assistant_masks"], strict=True)
    )
    assert [span for span in spans.split("·") if span] == ["Hi! How are you?<|im_end|>", "Fine too.<|im_end|>"]


@pytest.mark.parametrize(
    "completion", ["Hi", " Hi", "  two spaces", "\nnewline", "\n\n\n", "\t", "1", "…", "<|im_end|>", "'s", " "]
)
@pytest.mark.parametrize("history", [CHAT[:2], CHAT[:4]])
def test_prompt_tokens_are_a_prefix_of_prompt_and_completion(tokenizer, history, completion):
    prompt = encode_prompt(tokenizer, history)
    chat = [*history, {"role": "assistant", "content": completion}]
    whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*encode_completion(tokenizer, completion), *tokenizer("\n")["input_ids"]]


def test_there_is_one_bos_however_a_chat_is_tokenized(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    at_once = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == at_once
    assert at_once.count(tokenizer.bos_token_id) == 1 and at_once[0] == tokenizer.bos_token_id


def test_padding_never_hides_a_turn_end(tokenizer):
    batch = tokenizer(["Hi<|im_end|>", "Hello there, friend<|im_end|>"], padding=True)
    ends = [row.count(tokenizer.eos_token_id) for row in batch["input_ids"]]
    attended = [sum(mask) for mask in batch["attention_mask"]]
    assert ends == [1, 1]
    assert attended == [len(tokenizer("Hi<|im_end|>")["input_ids"]), len(batch["input_ids"][1])]


def test_folder_survives_a_round_trip(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again("Hello  there\n\nfriend")["input_ids"] == tokenizer("Hello  there\n\nfriend")["input_ids"]
