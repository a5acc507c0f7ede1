"""Supervised fine-tuning: a causal LM learns to answer in chats (Ouyang et al. 2022, step 1), through TRL's SFTTrainer.

The loss is on the assistant's tokens alone, its turn end among them. Leaves out: packing (chats here are short; padding
is trimmed per batch), tools, images.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from training import zero
from training.config import SFTConfig
from training.data.chats import Chat, read_chats
from training.data.split import split
from training.pretrained import length_limit, pretrained
from training.run import Run, StageError
from training.tokenizer import CHATML, CHATML_MARKED
from training.trainer import fit, peft_config, trainer_arguments

VAL_CHATS = 256  # of the held-out ones, for the validation loss


def run(config: SFTConfig, run: Run) -> None:
    """Chats to a causal LM that ends its turn. Raises StageError where no chat fits `max_length`."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    start = config.model or str(run.of("pretrain").model)
    tokenizer = pretrained(AutoTokenizer, "sft.model", start)
    template = training_template(tokenizer, start)
    max_length = length_limit(config.max_length, "sft.model", start)
    chats, counts = read_chats(config.chats)
    training, held_out = split(chats, run.seed, run.val_fraction)
    run.note(f"chats: {counts}; {len(training)} to learn from, {len(held_out)} held out")
    rows, cut = tokenize(training, tokenizer, max_length, template)
    run.note(f"{len(rows)} of {len(training)} chats fit {max_length} tokens, {cut} of them without their end")
    if not rows:
        raise StageError(
            f"sft.max_length={max_length}: none of {len(training)} chats fits; raise it or shorten the chats"
        )
    validation, _ = tokenize(held_out[:VAL_CHATS], tokenizer, max_length, template)
    if held_out and not validation:
        run.note(f"none of the chats held out fits {max_length} tokens: there is no validation loss")
    arguments = TRLSFTConfig(
        **trainer_arguments(config, run, config.num_train_epochs),
        max_length=None,  # tokenize() has cut whole turns already
    )
    trainer = SFTTrainer(
        model=pretrained(AutoModelForCausalLM, "sft.model", start, dtype="float32", use_safetensors=True),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=tokenizer,
        peft_config=peft_config(config.lora, "CAUSAL_LM"),
    )
    fit(trainer, run)
    zero.export(trainer.model_wrapped, run, tokenizer, kind="causal-lm")


def training_template(tokenizer: PreTrainedTokenizerBase, start: str) -> str | None:
    """A chat template with {% generation %} marks, None where the tokenizer's own has them.

    Raises StageError where it has none that could be marked.
    """
    if not tokenizer.chat_template:
        raise StageError(
            f"sft.model={start}: its tokenizer has no chat template, so nothing says where a turn ends; start from a "
            "chat model, or put a chat_template.jinja with {% generation %} marks into a copy of the folder"
        )
    if isinstance(tokenizer.chat_template, str):  # else there are several, by name
        tokenizer.chat_template = tokenizer.chat_template.replace(CHATML, CHATML_MARKED)
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise StageError(f"sft.model={start}: {error}") from None


def tokenize(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """`input_ids` and `assistant_masks` of every chat that fits, and how many of these lost their end for it.

    A chat loses whole exchanges from its end until it fits. `template`: a chat template with {% generation %} marks,
    where the tokenizer's own has none.
    """
    fitted = [_fitted(chat, tokenizer, max_length, template) for chat in chats]
    rows = [row for row in fitted if row]
    return rows, sum(row.pop("is_cut") for row in rows)


def _fitted(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str | None
) -> dict[str, Any] | None:
    messages = list(chat.messages)
    while messages:
        encoded: Any = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        if len(encoded["input_ids"]) <= max_length:
            names = ("input_ids", "assistant_masks")
            return {name: encoded[name] for name in names} | {"is_cut": len(messages) < len(chat.messages)}
        messages.pop()
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    return None
