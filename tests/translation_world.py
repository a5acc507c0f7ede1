"""Tiny encoder-decoders with random weights, and a model folder as the translation stage makes them."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS, UNK = 0, 1, 2
VOCAB = 32
_SHARED = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "init_std": 0.1, "scale_embedding": True, "bos_token_id": None, "eos_token_id": EOS, "forced_eos_token_id": None,
}  # fmt: skip
_IDS = {"pad_token_id": PAD, "decoder_start_token_id": PAD}


def tiny_model(family: str, vocab: int = VOCAB, steps: int = 200, **generation: Any) -> Any:
    """A model of marian, bart, m2m100 or t5, in eval mode; `generation` goes into its generation_config.

    It has learnt for some steps to say another word for each: outputs follow the source, end at different lengths, and
    are far from certain. Random weights say one word again and again.
    """
    model = copy.deepcopy(_taught(family, vocab, steps))
    model.generation_config = GenerationConfig(**({"eos_token_id": EOS, **_IDS} | generation))
    return model


@functools.cache
def _taught(family: str, vocab: int, steps: int) -> Any:
    torch.manual_seed(0)
    model = _random_model(family, vocab)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(steps):
        words = torch.randint(3, vocab, (24, int(torch.randint(1, 9, ()))))
        ends = torch.full((24, 1), EOS)
        targets = (words * 5) % (vocab - 3) + 3
        loss = model(input_ids=torch.cat((words, ends), 1), labels=torch.cat((targets, ends), 1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _random_model(family: str, vocab: int) -> Any:
    shared = _SHARED | _IDS | {"vocab_size": vocab}
    if family == "marian":
        model: Any = MarianMTModel(MarianConfig(**shared, activation_function="swish"))
    elif family == "bart":
        model = BartForConditionalGeneration(BartConfig(**shared))
    elif family == "m2m100":
        model = M2M100ForConditionalGeneration(M2M100Config(**shared))
    else:
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=1.0,
            eos_token_id=EOS, **_IDS,
        ))  # fmt: skip
    return model


def sources(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    """Random source sentences, ended by EOS."""
    generator = torch.Generator().manual_seed(1)
    return [[*torch.randint(3, vocab, (n - 1,), generator=generator).tolist(), EOS] for n in lengths]


_WORDS = "Der Hund und die Katze sahen das Haus am See. Ein Buch liegt auf dem Tisch, die Tür ist offen! Wo bist du?"


def build_folder(folder: Path, *, endless: bool = False, **manifest: str) -> Path:
    """A translation model folder, German to English; an endless one's sentences end at max_new_tokens alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([_WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    model = tiny_model("marian", tokenizer.get_vocab_size(), num_beams=3, length_penalty=0.8, bad_words_ids=[[PAD]])
    model.final_logits_bias[0, EOS] = -1e4 if endless else 0.0
    model.save_pretrained(folder)
    card = {"kind": "translation", "source_language": "de", "target_language": "en", "source_script": "LATIN"}
    (folder / "chatforge.json").write_text(json.dumps(card | manifest), "utf-8")
    return folder


def build_opus_folder(folder: Path) -> Path:
    """As Helsinki's are: two sentencepiece models, one vocabulary, pad last and the start, no chatforge.json."""
    import sentencepiece as spm

    folder.mkdir(exist_ok=True)
    sides = {"source": "der hund sah die katze am see", "target": "the dog saw the cat by the lake"}
    pieces: dict[str, None] = {"</s>": None, "<unk>": None}
    for side, words in sides.items():
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([words] * 20), model_prefix=str(folder / side), vocab_size=24, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        model = spm.SentencePieceProcessor(model_file=str(folder / f"{side}.model"))
        pieces |= dict.fromkeys(model.id_to_piece(i) for i in range(3, model.get_piece_size()))
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        (folder / f"{side}.vocab").unlink()
    vocab = {piece: number for number, piece in enumerate([*pieces, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    config = {"source_lang": "de", "target_lang": "en", "tokenizer_class": "MarianTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pad = vocab["<pad>"]
    model = tiny_model(
        "marian", len(vocab), steps=0, pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad,
        forced_eos_token_id=0, bad_words_ids=[[pad]], renormalize_logits=True, num_beams=2,
    )  # fmt: skip
    model.config.pad_token_id = model.config.decoder_start_token_id = pad
    model.config.eos_token_id = 0
    model.save_pretrained(folder)
    return folder
