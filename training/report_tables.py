"""Evaluation's numbers as tables, each with plain words on what it means."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from training.figures import NAMES
from training.page import Html, join, section, table, tag
from training.recipe import Recipe
from training.verdict import STOP_RATE

Json = dict[str, Any]

SMALL = 1_000_000_000  # tokens: below it a language model knows nothing of the world


# ---- numbers in words


def number(value: float) -> str:
    """1234567 → 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """3725 → 1 h 2 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(estimate: Json) -> str:
    return _with_error(estimate, "{:.1%}", "{:.1%}")


def plain(estimate: Json) -> str:
    return _with_error(estimate, "{:.3f}", "{:.3f}")


def signed(estimate: Json) -> str:
    return _with_error(estimate, "{:+.3f}", "{:.3f}")


def _with_error(estimate: Json, mean: str, error: str) -> str:
    known = estimate["stderr"] is not None
    return mean.format(estimate["mean"]) + (f" ± {error.format(estimate['stderr'])}" if known else "")


def sure(estimate: Json) -> bool:
    """Above 0 by more than two standard errors."""
    return estimate["stderr"] is not None and estimate["mean"] > 2 * estimate["stderr"]


# ---- at a glance


def verdict(result: Json, recipe: Recipe, *more: Html | None) -> Html:
    """A tile for each thing that a run should show, `more` behind them, and the evaluation's warnings."""
    if not result:
        word = "is not in this recipe" if recipe.evaluate is None else "has not run yet"
        return tag("p", f"No verdict: the evaluate stage {word}.", class_="card verdict")
    made = (*(make(result) for make in (_text_tile, _chat_tile, _reward_tile, _ppo_tile)), *more)
    parts = [tag("div", *filter(None, made), class_="grid tiles")]
    if result["warnings"]:
        points = [tag("li", warning) for warning in result["warnings"]]
        parts.append(tag("div", tag("h3", "Not as it should be"), tag("ul", *points), class_="card warnings"))
    return join(parts)


def tile(name: str, value: str, unit: str, detail: str, mark: Html | None = None) -> Html:
    lines = [tag("div", name, class_="name"), tag("div", value, tag("small", f" {unit}"), class_="number")]
    return tag("div", *lines, tag("div", detail, class_="detail"), *([mark] if mark else []), class_="card tile")


def verdict_mark(good: bool, yes: str, no: str) -> Html:
    return tag("span", f"✓ {yes}" if good else f"✗ {no}", class_=f"mark {'good' if good else 'bad'}")


def _text_tile(result: Json) -> Html | None:
    bits = result["bits_per_byte"].get("pretrain")
    if not bits:
        return None
    detail = f"± {bits['stderr']:.3f} on held-out text after pretraining" if bits["stderr"] else "on held-out text"
    return tile("Language", f"{bits['mean']:.2f}", "bits per byte", f"{detail}; 8 is knowing nothing")


def _chat_tile(result: Json) -> Html | None:
    answers = result["answers"].get("sft")
    if not answers:
        return None
    rate, most = answers["stop_rate"], result["settings"]["max_new_tokens"]
    detail = f"of {rate['n']} held-out prompts end the turn within {most} tokens after SFT"
    mark = verdict_mark(rate["mean"] >= STOP_RATE, f"at least {STOP_RATE:.0%}", f"below {STOP_RATE:.0%}")
    return tile("Chat", f"{rate['mean']:.1%}", "", detail, mark)


def _reward_tile(result: Json) -> Html | None:
    reward = result.get("reward")
    if not reward:
        return None
    rivals = [(name, words) for name, words in _BASELINES if name in reward]
    detail = "of held-out pairs in order; " + ", ".join(f"{words} {reward[n]['mean']:.1%}" for n, words in rivals)
    beaten = all(sure(reward[f"over_{n}"]) for n, _ in rivals)
    mark = verdict_mark(beaten, "beats both baselines", "not above both baselines")
    return tile("Reward model", f"{reward['accuracy']['mean']:.1%}", "", detail, mark)


def _ppo_tile(result: Json) -> Html | None:
    against = result.get("ppo_against_sft", {})
    gain = against.get("gold_gain")
    if not gain:
        return None
    detail = f"gold score over SFT on {gain['n']} prompts, at KL {against['kl']['mean']:.1f} nats"
    error = f"± {gain['stderr']:.3f}" if gain["stderr"] is not None else ""
    mark = verdict_mark(sure(gain), "beyond chance", "within chance")
    return tile("PPO", f"{gain['mean']:+.3f}", error, detail, mark)


_BASELINES = (("bag_of_words", "bag of words"), ("longer_wins", "longer wins"))


# ---- tables


def evaluation(result: Json) -> list[Html]:
    """The sections that evaluation.json has numbers for."""
    if not result:
        return []
    parts = (_text_table(result), _answer_table(result), _reward_table(result), _gain_table(result))
    return [part for part in parts if part]


def _text_table(result: Json) -> Html | None:
    bits = result["bits_per_byte"]
    if not bits:
        return None
    rows = [(_stage(stage), plain(bits[stage]), str(bits[stage]["n"])) for stage in bits]
    about = (
        "Bits that a model needs for a byte of text which no stage has learnt from; lower is better, 8 is knowing "
        "nothing, and it can be compared between tokenizers. Chats cost some of what was learnt from documents: that "
        "is the rise from pretrain to SFT and PPO."
    )
    return section("Held-out text", _card(table(("Model", "Bits per byte", "Windows"), rows)), about=about)


def _answer_table(result: Json) -> Html | None:
    answers, settings = result["answers"], result["settings"]
    if not answers:
        return None
    rows = [
        (name, *(show(given) for given in answers.values()), meaning)
        for name, meaning, show in _ANSWER_ROWS
        if all(show(given) for given in answers.values())
    ]
    about = (
        f"{settings['num_prompts']} prompts that no stage has learnt from, at most {settings['max_new_tokens']} "
        f"tokens, temperature {settings['temperature']:g}; every model gets the same prompts and seeds. ± is one "
        "standard error."
    )
    head = ("", *(NAMES[stage] for stage in answers), "What it means")
    return section("Answers to held-out prompts", _card(table(head, rows, class_="fold")), about=about)


_ANSWER_ROWS: Sequence[tuple[str, str, Callable[[Json], str]]] = (
    ("Ends its turn", "Stops by itself within the limit.", lambda a: percent(a["stop_rate"])),
    ("Length", "Tokens, the turn's end among them.", lambda a: _with_error(a["length"], "{:.1f}", "{:.1f}")),
    ("Gold score", "The named judge's; not what PPO was trained on.", lambda a: signed(a["gold"]) if a["gold"] else ""),
    (
        "Learned reward",
        "What PPO was trained on; 0 ± 1 is SFT's own spread.",
        lambda a: signed(a["reward"]) if a["reward"] else "",
    ),
    ("Distinct words", "Different words over all words.", lambda a: f"{a['distinct_1']:.3f}"),
    ("Distinct pairs", "The same of neighbouring words: low is one phrase.", lambda a: f"{a['distinct_2']:.3f}"),
    (
        "Most frequent answer",
        "How often the commonest answer is given.",
        lambda a: f"{a['most_frequent']['share']:.1%}: “{a['most_frequent']['text']}”",
    ),
)


def _reward_table(result: Json) -> Html | None:
    reward = result.get("reward")
    if not reward:
        return None
    rankers = [
        ("accuracy", "Reward model"),
        *((name, words.capitalize()) for name, words in _BASELINES if name in reward),
    ]
    rows = [
        (words.capitalize(), _bar(reward[name]["mean"], name == "accuracy"), percent(reward[name]))
        for name, words in rankers
    ]
    about = (
        f"How many of {reward['pairs']} pairs in {reward['rankings']} held-out rankings each puts in the right order; "
        "a coin gets half. The baselines understand nothing: one prefers the longer text, the other adds up a weight "
        f"for each word, learnt from the same {reward.get('learnt_from', 0)} rankings."
    )
    length = (
        f"Correlation of the reward with a completion's length: {reward['length_spearman']:+.2f} by rank (Spearman), "
        f"{reward['length_pearson']:+.2f} linear (Pearson). Near ±1 the reward would be measuring length."
    )
    drawn = table(("Ranker", "", "Pairs right"), rows, class_="bars")
    return section("The reward model", _card(drawn, tag("p", length, class_="note")), about=about)


def _gain_table(result: Json) -> Html | None:
    against = result.get("ppo_against_sft")
    if not against:
        return None
    rows = []
    if "gold_gain" in against:
        rows.append(("Gold score gained", signed(against["gold_gain"]), "Mean difference, prompt by prompt."))
        rows.append(("Prompts won", percent(against["wins"]), "By the gold judge; ties count half."))
    if "reward_gain" in against:
        rows.append(("Reward gained", signed(against["reward_gain"]), "By the learned reward, in its deviations."))
    rows.append(("KL from SFT", plain(against["kl"]), "Nats per completion: how far it went for this."))
    about = (
        "Both answer the same prompts with the same seeds, so a difference is PPO's doing. Reward that rises without "
        "the gold score is reward hacking: the policy has found what the reward model gets wrong."
    )
    return section(
        "PPO against SFT", _card(table(("", "PPO − SFT", "What it means"), rows, class_="fold")), about=about
    )


def _card(*children: Html) -> Html:
    return tag("div", *children, class_="card")


def _stage(name: str) -> Html:
    return tag("span", NAMES[name], class_=f"stage {name}")


def _bar(share: float, strong: bool) -> Html:
    fill = tag("span", class_="fill" if strong else "fill dim", style=f"width: {100 * share:.1f}%")
    return tag("span", fill, class_="track")


# ---- remarks


def remarks(result: Json, recipe: Recipe) -> list[str]:
    """What a reader should not conclude from the numbers."""
    out = []
    if recipe.pretrain and recipe.pretrain.tokens < SMALL:
        out.append(
            f"The model reads {number(recipe.pretrain.tokens)} tokens, repeats counted; those that people talk to have "
            "read trillions. Its sentences hold together for a few words at a time. It knows nothing of the "
            "world, and what it says of itself is made up."
        )
    if recipe.translation and not recipe.translation.model:
        out.append(
            "The translator knows the words and the kind of sentence that its pairs have, and nothing beside them: on "
            "other text it writes fluent sentences that say something else."
        )
    if recipe.image and not recipe.image.model:
        out.append(
            "The image model draws in the one style of its pictures, and what it was shown: a drawing that equals its "
            "nearest training picture is remembered, not invented."
        )
        if any(source.startswith("sample:openmoji") for source in recipe.image.images):
            out.append("The pictures are OpenMoji's, the open-source emoji and icon project; licence CC BY-SA 4.0.")
    judge = result.get("settings", {}).get("judge") or (recipe.rank.judge if recipe.rank else None)
    if judge == "vader" and result.get("answers"):
        ranked = recipe.rank is not None and recipe.rank.judge == judge
        same = " It also ranked what the reward model learnt from." if ranked else ""
        out.append(
            "The gold judge is VADER, a list of words with a friendliness each. “Better” means friendlier here: not "
            f"true, not to the point.{same}"
        )
    if result.get("ppo_against_sft"):
        out.append(_hacking(result))
    if result:
        out.append(
            "The errors come from the number of prompts, pairs and windows of this one run. Another seed moves the "
            "results too, and that is not in them."
        )
    return out


def _hacking(result: Json) -> str:
    sft, ppo = (result["answers"][stage] for stage in ("sft", "ppo"))
    change = ppo["distinct_2"] / sft["distinct_2"] - 1 if sft["distinct_2"] else math.nan
    text = f"PPO uses {abs(change):.0%} {'fewer' if change < 0 else 'more'} distinct pairs of words than SFT. "
    if change < -0.1:
        return text + (
            "Part of its gain is saying what the judge likes over and over, which is reward hacking and not better "
            "conversation: read the samples before believing the score."
        )
    return text + "Read the samples beside the score: a judge can be pleased by less than an answer."
