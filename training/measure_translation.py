"""What a translation model is worth: sacreBLEU's BLEU and chrF on held-out pairs, beside two baselines.

Every text is translated as the service would. Leaves out: learned metrics (COMET), which need a model of their own.
"""

import random
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF

from serving.model_folder import load_translation
from serving.translation.api import TranslationParams
from serving.translation.translator import Translator
from training.config import TranslationConfig
from training.data.pairs import Pair, read_pairs, read_sides
from training.dictionary import fit_dictionary, words
from training.run import Run, StageError
from training.stats import mean_and_stderr, paired_difference

SHOWN = 10  # translations that are kept, the first of a random order: nobody picked them
DRAWN = range(5, 10)  # words of the sentence whose cross-attention is drawn
MAX_ATTENTION = 20  # tokens a side of it

Result = dict[str, Any]
Languages = tuple[str, str]  # BCP-47: source, target


def measure_translation(folder: str, config: TranslationConfig, run: Run, num_pairs: int) -> Result:
    """The stage's model on its own test pairs, at most `num_pairs` of each source of the recipe."""
    languages = config.source_language, config.target_language
    sides = read_sides(config.pairs, *languages, run.seed, run.val_fraction)
    tested = [p for name in config.pairs for p in _first(sides.test, name, num_pairs)]
    texts = [pair.source for pair in tested]
    dictionary = fit_dictionary(sides.training)
    made = {
        "model": translated(folder, texts, languages, run.device, config.num_beams, config.length_penalty),
        "copy": texts,
        "dictionary": [dictionary(text) for text in texts],
    }
    known = {word for pair in sides.training for word in words(pair.source)}
    return {
        "languages": list(languages),
        "learnt_from": len(sides.training),
        "dropped": sides.dropped,
        "num_beams": config.num_beams,
        **signatures(languages[1]),
        "sources": [
            _of_source(name, tested, made, languages[1])
            for name in (*config.pairs, *([""] if len(config.pairs) > 1 else []))
        ],
        **{f"over_{name}": _gain(tested, made["model"], made[name]) for name in ("copy", "dictionary")},
        "exact": _exact(tested, made["model"], known),
        "samples": _samples(tested, made["model"], run.seed),
        "attention": cross_attention(folder, _drawn(tested, made["model"])),
    }


def score_pairs(folder: str, sources: Sequence[str], device: str, source: str | None, target: str | None) -> Result:
    """Any translation folder on any pairs of its languages, which are given or its own, decoded as it recommends."""
    with closing(Translator(folder, source_language=source, target_language=target, device=device)) as translator:
        languages = translator.source_language, translator.target_language
        pairs = [pair for pair in read_pairs(sources, *languages) if pair.source and pair.target]
        if not pairs:
            raise StageError(f"{', '.join(sources)}: no pair has two sides")
        done = translator.translate_all([pair.source for pair in pairs], translator.defaults)
    made, references = [translation.hypotheses[0].text for translation in done], [pair.target for pair in pairs]
    scores = {"bleu": bleu(made, references, languages[1]), "chrf": chrf(made, references)}
    return {"pairs": len(pairs), "languages": " → ".join(languages), **scores, **signatures(languages[1])}


def translated(
    folder: str | Path,
    texts: Sequence[str],
    languages: Languages,
    device: str,
    num_beams: int,
    length_penalty: float = 1.0,
) -> list[str]:
    """The best hypothesis of every text."""
    params = TranslationParams(num_beams, length_penalty)
    with closing(Translator(folder, source_language=languages[0], target_language=languages[1], device=device)) as it:
        return [done.hypotheses[0].text for done in it.translate_all(texts, params)]


# ---- scores


# Languages that are written without spaces; sacreBLEU's 13a would count their sentences as single words.
_TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}


def _bleu(language: str) -> BLEU:
    return BLEU(tokenize=_TOKENIZERS.get(re.split("[-_]", language)[0].lower(), "13a"))


def bleu(made: Sequence[str], references: Sequence[str], language: str = "en") -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018)."""
    return _bleu(language).corpus_score(list(made), [list(references)]).score


def chrf(made: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, 0 to 100 (Popović 2015)."""
    return CHRF().corpus_score(list(made), [list(references)]).score


def signatures(language: str) -> dict[str, str]:
    """How sacreBLEU computes the two, in its own words; others' scores compare where these are equal."""
    out = {}
    for name, metric in (("bleu_signature", _bleu(language)), ("chrf_signature", CHRF())):
        metric.corpus_score(["a"], [["a"]])  # a signature tells the number of references, so it needs some
        out[name] = str(metric.get_signature())
    return out


def sentence_chrf(made: Sequence[str], references: Sequence[str]) -> list[float]:
    metric = CHRF()
    return [metric.sentence_score(text, [wanted]).score for text, wanted in zip(made, references, strict=True)]


# ---- parts of the result


def _first(pairs: Sequence[Pair], origin: str, count: int) -> list[Pair]:
    return [pair for pair in pairs if pair.origin == origin][:count]


def _of_source(name: str, tested: Sequence[Pair], made: dict[str, list[str]], language: str) -> Result:
    """Scores on the pairs of one source, on all of them for the empty name."""
    chosen = [i for i, pair in enumerate(tested) if not name or pair.origin == name]
    references = [tested[i].target for i in chosen]
    row: Result = {"name": name.rsplit("/", 1)[-1] or "all", "pairs": len(chosen)}
    for who, texts in made.items():
        own = [texts[i] for i in chosen]
        row[who] = {"bleu": bleu(own, references, language), "chrf": chrf(own, references)} if chosen else None
    return row


def _gain(tested: Sequence[Pair], ours: Sequence[str], theirs: Sequence[str]) -> Result:
    """The mean difference of the sentences' chrF."""
    references = [pair.target for pair in tested]
    return asdict(paired_difference(sentence_chrf(ours, references), sentence_chrf(theirs, references)))


def _exact(tested: Sequence[Pair], made: Sequence[str], known: set[str]) -> Result:
    """How often the translation is the reference, also for the sources that have only words of the training side."""
    right = [text == pair.target for text, pair in zip(made, tested, strict=True)]
    familiar = [known.issuperset(words(pair.source)) for pair in tested]
    groups = {
        "all": right,
        "known_words": [r for r, f in zip(right, familiar, strict=True) if f],
        "new_words": [r for r, f in zip(right, familiar, strict=True) if not f],
    }
    return {name: asdict(mean_and_stderr(group)) for name, group in groups.items() if group}


def _samples(tested: Sequence[Pair], made: Sequence[str], seed: int) -> list[Result]:
    rows = [
        {"source": pair.source, "reference": pair.target, "translation": text}
        for pair, text in zip(tested, made, strict=True)
    ]
    random.Random(seed).shuffle(rows)
    scores = sentence_chrf([r["translation"] for r in rows[:SHOWN]], [r["reference"] for r in rows[:SHOWN]])
    return [row | {"chrf": score} for row, score in zip(rows[:SHOWN], scores, strict=True)]


def _drawn(tested: Sequence[Pair], made: Sequence[str]) -> tuple[str, str]:
    """The sentence whose attention is drawn: of those with DRAWN words, the one translated best."""
    scores = sentence_chrf(made, [pair.target for pair in tested])
    fits = [bool(text) and len(words(pair.source)) in DRAWN for pair, text in zip(tested, made, strict=True)]
    best = max(range(len(tested)), key=lambda i: (fits[i], scores[i]))
    return tested[best].source, made[best]


@torch.no_grad()
def cross_attention(folder: str, sentence: tuple[str, str]) -> Result:
    """How much each target token, as it is predicted, looks at each source token: the mean over heads and layers.

    `weights` is [target tokens][source tokens], rows of sum 1.
    """
    model, tokenizer = load_translation(folder, torch.float32)
    model.set_attn_implementation("eager")  # the others do not give their weights
    source, target = sentence
    inputs = tokenizer([source], return_tensors="pt")
    labels = tokenizer(text_target=[target], return_tensors="pt").input_ids
    out = model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        output_attentions=True,
    )
    weights = torch.stack(out.cross_attentions).mean((0, 1, 2))[:MAX_ATTENTION, :MAX_ATTENTION]
    names = [[tokenizer.decode([i]) for i in row[:MAX_ATTENTION]] for row in (labels[0], inputs.input_ids[0])]
    return {"target": names[0], "source": names[1], "weights": [[round(w, 4) for w in row] for row in weights.tolist()]}
