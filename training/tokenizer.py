"""Tokenizer: byte-level BPE (Radford et al. 2019, 2.2), four special tokens, and the ChatML template.

Learnt from the training side of the split; held-out text only measures it. The same text gives the same tokenizer.

Every newline is a token of its own, never part of a longer one. So nothing merges across the newline that ends the
header `<|im_start|>assistant`, and the tokens of a prompt are always a prefix of those of prompt plus completion,
whatever the completion starts with.

Leaves out: sampling from a corpus that is too large to count (list a part of it under tokenizer.text), and
normalisation (bytes in, the same bytes out).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import TokenizerConfig
from training.data.chats import Message
from training.data.records import DataError
from training.data.split import held_out
from training.data.text import Document, read_documents
from training.device import tokenizing_on_all_cores
from training.run import Run, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS = "<|endoftext|>"  # starts a document
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # eos: where generation stops
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, TURN_START, TURN_END, PAD)  # ids 0 to 3

# The marks of {% generation %} hold what the assistant has to produce: its words and the end of its turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ChatML as other models' folders have it, and the same with those marks.
CHATML = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
CHATML_MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}"
    "{{'\n'}}"
)


def run(config: TokenizerConfig, run: Run) -> None:
    """Leaves the tokenizer's folder as the stage's model. One process does it all; other workers return at once."""
    if run.rank:
        return
    measured: list[str] = []

    def training_side(documents: Iterable[Document]) -> Iterable[str]:
        for document in documents:
            if held_out(document.key, run.seed, run.val_fraction):
                measured.append(document.text)
            else:
                yield document.text

    tokenizer = train_tokenizer(training_side(read_documents(config.text)), config.vocab_size)
    if not measured:
        raise DataError(f"val_fraction={run.val_fraction} holds out no document of {config.text}: raise it")

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    save_model(run, write, kind="tokenizer")
    run.log(1, 1, vocab_size=len(tokenizer), bytes_per_token=bytes_per_token(tokenizer, measured))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of at most `vocab_size` tokens, special ones included; a small text gives fewer."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe = train_bpe(texts, words, vocab_size, SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_bpe(texts: Iterable[str], words: Any, vocab_size: int, special_tokens: Sequence[str]) -> Any:
    """A byte-level BPE (Sennrich et al. 2016) over all cores, as `tokenizers` has it; ids begin with `special_tokens`.

    `words` is the pre-tokenizer: nothing merges beyond a word. No text is out of the vocabulary, which has every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = words
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tokenizing_on_all_cores():
        bpe.train_from_iterator(texts, trainer)
    return bpe


def bytes_per_token(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> float:
    """UTF-8 bytes of `texts` over their tokens: how far the vocabulary compresses them."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(text.encode()) for text in texts) / sum(len(one.ids) for one in encoded)


def stop_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """What generation_config.eos_token_id of every model of ours is: the end of a turn, and of a document."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[TURN_END], vocabulary[BOS]]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """The tokens that the assistant's turn comes after: the rendered conversation and the header of a new turn.

    With `encode_completion` the one place where training makes tokens of a conversation.
    """
    rendered: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def encode_completion(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """What the assistant produced: the tokens of its words, and of the end of its turn."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
