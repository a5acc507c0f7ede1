"""The report's part on translation: scores beside the baselines, translations right and wrong, where it looked."""

from typing import Any

from training.page import Html, section, table, tag
from training.report_tables import number, percent, sure, tile, verdict_mark

Json = dict[str, Any]

_WHO = (("model", "Model"), ("copy", "Copy"), ("dictionary", "Dictionary"))


def headline(result: Json) -> Html | None:
    """The tile at the top of the page."""
    translation = result.get("translation")
    if not translation:
        return None
    scores = translation["sources"][-1]
    others = ", ".join(f"{name.lower()} {scores[who]['chrf']:.1f}" for who, name in _WHO[1:])
    detail = f"chrF on {scores['pairs']} held-out pairs; {others}"
    mark = verdict_mark(
        all(sure(translation[f"over_{who}"]) for who, _ in _WHO[1:]), "beats both baselines", "not above both baselines"
    )
    return tile("Translation", f"{scores['model']['chrf']:.1f}", "chrF", detail, mark)


def sections(result: Json) -> list[Html]:
    """What evaluation.json has on translation."""
    translation = result.get("translation")
    if not translation:
        return []
    return [_scores(translation), _samples(translation), _attention(translation)]


def _scores(translation: Json) -> Html:
    rows = [
        (
            tag("b", row["name"]) if row is translation["sources"][-1] else row["name"],
            str(row["pairs"]),
            *(_score(row[who]) for who, _ in _WHO),
        )
        for row in translation["sources"]
    ]
    source, target = translation["languages"]
    about = (
        f"{source} → {target}, beam {translation['num_beams']}, learnt from {number(translation['learnt_from'])} "
        "pairs. "
        "BLEU / chrF from 0 to 100. No source or target of these pairs was in training. Copy leaves the source as it "
        "is; the dictionary goes word by word, with what EM found in the same training pairs (IBM Model 1)."
    )
    exact = translation["exact"]
    kinds = (("all", "all"), ("known_words", "those whose words were all in training"), ("new_words", "the others"))
    parts = [f"{percent(exact[key])} of {words} ({exact[key]['n']})" for key, words in kinds if key in exact]
    notes = [
        f"The translation is the reference to the letter for {', '.join(parts)}.",
        f"{translation['bleu_signature']} · {translation['chrf_signature']}",
    ]
    head = ("Source of the pairs", "Pairs", *(name for _, name in _WHO))
    drawn = table(head, rows, class_="fold")
    card = tag("div", drawn, *(tag("p", note, class_="note") for note in notes), class_="card")
    return section("Translation", card, about=about)


def _score(score: Json | None) -> Html | str:
    if score is None:
        return "–"
    return tag("span", f"{score['bleu']:.1f} / {score['chrf']:.1f}", class_="tight")


def _samples(translation: Json) -> Html:
    rows = [(row["source"], row["reference"], _judged(row), f"{row['chrf']:.0f}") for row in translation["samples"]]
    about = "The first of a random order of the held-out pairs: nobody picked them."
    head = ("Source", "Reference", "Translation", "chrF")
    return section(
        "Translations, right and wrong", tag("div", table(head, rows, class_="fold"), class_="card"), about=about
    )


def _judged(row: Json) -> Html:
    right = row["translation"] == row["reference"]
    return tag("span", f"{'✓' if right else '✗'} {row['translation']}", class_="answer")


def _attention(translation: Json) -> Html:
    about = (
        "Cross-attention, the mean over heads and layers: each row is a token of the translation as it is predicted, "
        "and how much it looks at each token of the source. A translator that has aligned the languages looks at the "
        "words that it translates."
    )
    attention = translation["attention"]
    head = tag("tr", tag("th", ""), *(tag("th", tag("span", name)) for name in attention["source"]))
    rows = [
        tag("tr", tag("th", name), *(_cell(weight) for weight in row))
        for name, row in zip(attention["target"], attention["weights"], strict=True)
    ]
    drawn = tag("div", tag("table", head, *rows, class_="heat"), class_="scroll")
    return section("Where it looks", tag("div", drawn, class_="card"), about=about)


def _cell(weight: float) -> Html:
    return tag("td", "", style=f"--weight: {100 * weight:.0f}%", title=f"{weight:.2f}")
