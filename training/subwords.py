"""A byte-level BPE for text that is read whole: sentences to translate, captions to draw."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from training.tokenizer import train_bpe


def train_subwords(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that ends every text with eos; no text is out of its vocabulary.

    Words bear the space before them, and the first one too, so that it is the same token at the start of a sentence.
    `max_length` tells whoever reads with it which lengths the model has learnt from: longer texts are cut.
    """
    from tokenizers import pre_tokenizers, processors

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    bpe = train_bpe(texts, words, vocab_size, list(special.values()))
    bpe.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", bpe.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=max_length, clean_up_tokenization_spaces=False, **special
    )
