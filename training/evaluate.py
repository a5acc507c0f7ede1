"""Evaluation: what each stage's model is worth on text, prompts and rankings that no stage has learnt from.

    bits per byte    of pretrain, sft and ppo on pretrain's held-out shards: what learning to chat cost in language
    answers          of sft and ppo to the same held-out prompts with the same seeds: turns ended, length, variety, gold
    reward           accuracy on the reward stage's held-out rankings beside two rankers that understand nothing
    ppo against sft  the paired difference of the gold score, at which KL(PPO ‖ SFT)
    fixed prompts    each stage's greedy answer side by side; pretrain, which knows no chats, continues plain text
    translation      BLEU and chrF on the pairs that its stage held out (measure_translation.py)
    image            captions drawn, trained and held out, beside the nearest pictures (measure_image.py)

Nothing here stops a run: `warnings` in evaluation.json says in plain words what did not turn out well. Leaves out:
benchmarks of knowledge (models of this size hold none), a judge that is itself a language model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import AutoTokenizer

from serving.model_folder import describe
from training import measure, zero
from training.baselines import fit_bag_of_words, longer_wins
from training.config import EvaluateConfig, RewardConfig
from training.data.rankings import Ranking, read_rankings
from training.data.records import DataError
from training.data.split import split
from training.data.text import PackedTokens, read_documents
from training.exam import Answers, Exam, answer, compare, fixed_answers, shown, side_by_side, summary
from training.measure_translation import measure_translation, score_pairs
from training.pretrained import length_limit
from training.rank import rankings_path
from training.recipe import Recipe
from training.reward import HELD_OUT, fitting
from training.run import Run, StageError, write_atomic
from training.stats import Estimate, pearson, ratio_and_stderr, spearman
from training.verdict import Result, finite, headline, warnings

LANGUAGE_MODELS = ("pretrain", "sft", "ppo")
MAX_CONTEXT = 1024  # tokens of a window in evaluate_model


def run(config: EvaluateConfig, run: Run) -> None:
    """Leaves evaluation.json; raises StageError where the run has no model to measure."""
    zero.init_distributed(run.device)
    recipe = Recipe.model_validate_json((run.root / "run.json").read_text("utf-8"))
    exam = Exam(config, run, recipe)
    models = {stage: folder for stage in LANGUAGE_MODELS if (folder := exam.folder(stage))}
    if not models and not any(exam.folder(stage) for stage in ("reward", "translation", "image")):
        raise StageError(f"evaluate: run {run.root.name!r} has no model to measure: it needs a stage that trains one")
    result = {"settings": settings(exam), **measure_models(exam, models)}
    if recipe.reward and exam.folder("reward"):
        result["reward"] = measure_reward(exam, recipe.reward)
    if recipe.translation and (folder := exam.folder("translation")):
        result["translation"] = measure_translation(folder, recipe.translation, run, config.num_pairs)
    if recipe.image and (folder := exam.folder("image")):
        from training.measure_image import measure_image  # diffusers takes seconds to import

        result["image"] = measure_image(folder, recipe.image, run, config.num_drawings)
    result["warnings"] = warnings(result)
    write_atomic(run.folder / "evaluation.json", json.dumps(finite(result), indent=2) + "\n")
    run.rewind(0)
    run.log(1, 1, **headline(result))


def measure_models(exam: Exam, models: dict[str, str]) -> Result:
    """Everything that is asked of the language models, stage → folder; one of them at a time is in memory."""
    bits: Result = {}
    answers: dict[str, Answers] = {}
    fixed: dict[str, list[str]] = {}
    for stage, folder in models.items():
        print(f"evaluate: {stage}", flush=True)
        model, tokenizer = measure.load(folder, exam.run.device)
        if estimate := held_out_bits(exam, model, tokenizer):
            bits[stage] = asdict(estimate)
        fixed[stage] = fixed_answers(exam, stage, model, tokenizer)
        if stage != "pretrain" and exam.prompts:
            answers[stage] = answer(exam, model, tokenizer)
    out: Result = {
        "bits_per_byte": bits,
        "answers": {stage: summary(given) for stage, given in answers.items()},
        "samples": {"fixed": side_by_side(exam, fixed), "held_out": shown(exam, answers)},
    }
    if {"sft", "ppo"} <= answers.keys():
        out["ppo_against_sft"] = compare(exam, answers["sft"], answers["ppo"])
    return out


def settings(exam: Exam) -> Result:
    return {
        "num_prompts": len(exam.prompts),
        "num_prompts_wanted": exam.config.num_prompts,
        "max_new_tokens": exam.config.max_new_tokens,
        "temperature": exam.temperature,
        "seed": exam.run.seed,
        "judge": exam.config.judge,
    }


def held_out_bits(exam: Exam, model: Any, tokenizer: Any) -> Estimate | None:
    """On windows that pretrain validated on; None where there are none, or the model has another vocabulary."""
    pretrain, shards = exam.recipe.pretrain, exam.run.of("pretrain").folder / "shards"
    if pretrain is None or not shards.is_dir():
        return None
    if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(exam.run.of("pretrain").model).get_vocab():
        return None
    data = PackedTokens(shards, "val", pretrain.seq_len)
    return measure.bits_per_byte(
        model, measure.shard_batches(data, pretrain.seq_len), data.side.tokens / data.side.bytes
    )


# ---- reward


def measure_reward(exam: Exam, config: RewardConfig) -> Result:
    """Accuracy on the rankings that the reward stage held out, beside the two baselines; and what length has in it."""
    sources = config.rankings or [str(rankings_path(exam.run.of("rank")))]
    training, held_out = split(read_rankings(sources), exam.run.seed + 1, HELD_OUT)
    folder, device = str(exam.run.of("reward").model), exam.run.device
    max_length = length_limit(config.max_length, "reward", folder)
    return {"learnt_from": len(training), **score_rankings(folder, training, held_out, max_length, device)}


def score_rankings(
    folder: str, training: Sequence[Ranking], rankings: Sequence[Ranking], max_length: int, device: str
) -> Result:
    """The reward model against `longer_wins`, and against a bag of words where there are rankings to learn it from."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rankings = fitting(rankings, tokenizer, max_length)
    if not rankings:
        raise StageError(f"no ranking to measure {folder} on: each is one tie, or longer than {max_length} tokens")
    reward = measure.reward_model(folder, device)
    scores = {"accuracy": measure.reward_scores(reward, tokenizer, rankings)}
    scores["longer_wins"] = measure.ranker_scores(longer_wins, rankings)
    if training:
        scores["bag_of_words"] = measure.ranker_scores(fit_bag_of_words(training), rankings)
    right = {name: measure.pairs_right(score, rankings) for name, score in scores.items()}
    learned, pairs = right["accuracy"]
    out: Result = {"rankings": len(rankings), "pairs": int(sum(pairs))}
    for name, (ours, _) in right.items():
        out[name] = asdict(ratio_and_stderr(ours, pairs))
        if name != "accuracy":
            gain = [a - b for a, b in zip(learned, ours, strict=True)]
            out[f"over_{name}"] = asdict(ratio_and_stderr(gain, pairs))
    rewards = [score for group in scores["accuracy"] for score in group]
    lengths = [longer_wins(text) for ranking in rankings for text in ranking.completions]
    return out | {"length_pearson": pearson(rewards, lengths), "length_spearman": spearman(rewards, lengths)}


# ---- one folder


def evaluate_model(
    folder: str,
    sources: Sequence[str],
    device: str = "cpu",
    source_language: str | None = None,
    target_language: str | None = None,
) -> Result:
    """What a model folder is worth on given data, by its kind.

    causal-lm: `sources` are texts, and the result has `bits_per_byte` and `perplexity` (per token). reward: they are
    rankings, and it has `accuracy` beside `longer_wins`. translation: they are sentence pairs of the given languages,
    by default the folder's, and it has `bleu` and `chrf` with sacreBLEU's signatures. Raises ValueError for other kinds
    and for data that is wrong.
    """
    about = describe(folder)
    kind, context = about.kind, min(about.context_length or MAX_CONTEXT, MAX_CONTEXT)
    if kind == "reward":
        return {"kind": kind, **score_rankings(folder, [], read_rankings(sources), context, device)}
    if kind == "translation":
        return {"kind": kind, **score_pairs(folder, sources, device, source_language, target_language)}
    if kind != "causal-lm":
        raise ValueError(f"{folder}: holds a {kind} model; evaluate measures causal-lm, reward and translation")
    model, tokenizer = measure.load(folder, device)
    documents = list(read_documents(sources))
    if not documents:
        raise DataError(f"{', '.join(sources)}: holds no text")
    text_bytes = sum(len(document.text.encode()) for document in documents)
    bos = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = measure.token_stream(documents, tokenizer, bos)
    windows = measure.document_batches(ids, bos, context)
    bits = measure.bits_per_byte(model, windows, len(ids) / text_bytes)
    perplexity = math.exp(bits.mean * math.log(2) * text_bytes / len(ids))
    counts = {"documents": len(documents), "tokens": len(ids), "bytes": text_bytes}
    return {"kind": kind, "bits_per_byte": asdict(bits), "perplexity": perplexity, **counts}
