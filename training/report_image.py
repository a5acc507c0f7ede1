"""The report's part on images: drawings beside the nearest pictures, sheets over training time, scores."""

import base64
from pathlib import Path
from typing import Any

from training.page import Html, section, table, tag
from training.report_tables import number, percent, tile, verdict_mark
from training.sheet import DRAWINGS

Json = dict[str, Any]

SHEETS = 4  # of those that were drawn while it learnt


def headline(result: Json) -> Html | None:
    """The tile at the top of the page."""
    image = result.get("image")
    if not image:
        return None
    near = image["near"][-1]
    match = image["trained"][f"match_{near}"]
    detail = (
        f"of {image['trained']['n']} drawings have a picture of their caption among the {near} nearest; "
        f"chance {match['chance']:.1%}"
    )
    good = match["mean"] > 0.5
    return tile(
        "Images", f"{match['mean']:.0%}", "", detail, verdict_mark(good, "shows most captions", "shows few captions")
    )


def sections(result: Json, root: Path) -> list[Html]:
    """What there is of images in a run: evaluation's drawings, the sheets of both stages."""
    image = result.get("image")
    parts = [] if not image else [_drawings(root), _scores(image)]
    return [*parts, *_over_time(root, "image", _IMAGE), *_over_time(root, "image_vae", _VAE)]


_IMAGE = "The same prompts and seeds whenever a sheet is drawn, with the average of the weights at that step."
_VAE = "Above the pictures, below what comes back of them through the latents."


def _drawings(root: Path) -> Html:
    about = (
        "Drawn from captions alone, the n-th with seed n; they are spread evenly over the data, nobody picked them. "
        "Below each the nearest picture of the training set: where the two are the same, the model knows it by heart."
    )
    return section("Drawings", _picture(root / "evaluate" / DRAWINGS, "drawings"), about=about)


def _scores(image: Json) -> Html:
    near = image["near"]
    rows = [
        (
            name,
            str(side["n"]),
            *(percent(side[f"match_{k}"]) for k in near),
            f"{side[f'match_{near[-1]}']['chance']:.1%}",
        )
        for name, side in (("Captions of its training", image["trained"]), ("Held-out captions", image["held_out"]))
        if side
    ]
    head = ("Drawings of", "How many", *(f"Its picture among the {k} nearest" for k in near), f"Chance ({near[-1]})")
    about = (
        f"By the features {image['features']}, among {number(image['pictures'])} pictures, held-out ones included. "
        "These scores compare with nothing but scores of the same features and the same numbers of pictures."
    )
    note = ""
    if image["frechet"] is not None:
        note = (
            f"Fréchet distance of the drawings to the training pictures {image['frechet']:.2f}; of as many real "
            f"pictures {image['frechet_of_real']:.2f}, which is what a perfect model would have."
        )
    notes = [tag("p", note, class_="note")] if note else []
    return section("Do they show their captions?", tag("div", table(head, rows), *notes, class_="card"), about=about)


def _over_time(root: Path, stage: str, about: str) -> list[Html]:
    sheets = sorted((root / stage / "samples").glob("step-*.png"))
    if not sheets:
        return []
    last = len(sheets) - 1
    chosen = [sheets[i] for i in sorted({last * n // (SHEETS - 1) for n in range(SHEETS)})]
    drawn = [
        tag("figure", _picture(path, path.stem), tag("p", f"Step {int(path.stem.partition('-')[2]):,}"))
        for path in chosen
    ]
    title = "While it learnt to draw" if stage == "image" else "While the autoencoder learnt"
    return [section(title, *drawn, about=about)]


def _picture(path: Path, what: str) -> Html:
    """A PNG inside the page, so that the page is all there is to send."""
    if not path.is_file():
        return tag("p", "(not drawn)", class_="muted")
    encoded = base64.b64encode(path.read_bytes()).decode()
    return tag("div", Html(f'<img alt="{what}" src="data:image/png;base64,{encoded}">'), class_="card sheet")
