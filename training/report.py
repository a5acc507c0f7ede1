"""The picture of a run: one self-contained HTML page, and one PNG of its curves.

It shows what is there and says what is missing, so it can be drawn while a run is under way. How evaluation's numbers
are put into words stands in report_tables.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import figures, report_image, report_tables, report_translation
from training.data.prompts import as_messages
from training.page import Html, document, join, section, table, tag
from training.recipe import PARENTS, STAGES, Recipe
from training.report_tables import Json, duration, number
from training.run import Run, read_jsonl, write_atomic
from training.runs import describe_run

LOOKED_AT = 50  # rankings, of which the one with the clearest order is shown


@dataclass(frozen=True)
class Stage:
    """What one stage has left so far."""

    name: str
    state: str  # done, under way, not run
    manifest: Json  # empty until it is done
    lines: list[Json]  # of metrics.jsonl


@dataclass(frozen=True)
class Story:
    """Everything that the report tells."""

    root: Path
    recipe: Recipe
    stages: list[Stage]
    evaluation: Json  # empty until there is one

    @property
    def manifests(self) -> dict[str, Json]:
        return {stage.name: stage.manifest for stage in self.stages if stage.manifest}


def write_report(root: Path) -> Path:
    """Draws `report.html` into the run's folder. Raises StageError where there is no such run."""
    story = read_story(root)
    parts = [
        _head(story),
        report_tables.verdict(
            story.evaluation,
            story.recipe,
            report_translation.headline(story.evaluation),
            report_image.headline(story.evaluation),
        ),
        _fixed_prompts(story),
        _curves(story),
        *report_tables.evaluation(story.evaluation),
        *report_translation.sections(story.evaluation),
        *report_image.sections(story.evaluation, root),
        _held_out_prompts(story),
        _ranking(story),
        _remarks(story),
        _stages(story),
        _about(story),
        _recipe(story),
    ]
    page = document(f"{root.name} · ChatForge", *(part for part in parts if part))
    path = root / "report.html"
    write_atomic(path, page)
    return path


def figure(root: Path) -> Path:
    """Draws `report.png` into the run's folder: the curves that tell its story. Raises StageError as `write_report`."""
    story = read_story(root)
    metrics = {stage.name: stage.lines for stage in story.stages}
    stages = ", ".join(figures.NAMES[stage] for stage in metrics if stage in figures.NAMES)
    return figures.png(metrics, root / "report.png", f"{root.name}: {_size(story)}{stages}")


def read_story(root: Path) -> Story:
    about = describe_run(root)
    recipe = Recipe.model_validate_json(json.dumps(about["recipe"]))
    stages = []
    for name in recipe.stages:
        manifest = about["stages"].get(name, {})
        lines = Run(root, name).metrics()
        started = lines or (root / name / "started.json").exists()
        state = "done" if manifest else "under way" if started else "not run"
        stages.append(Stage(name, state, manifest, lines))
    path = root / "evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return Story(root, recipe, stages, evaluation)


# ---- what the run is


def _head(story: Story) -> Html:
    seconds = sum(manifest["seconds"] for manifest in story.manifests.values())
    done = [stage for stage in story.stages if stage.state == "done"]
    state = (
        "All stages are done" if len(done) == len(story.stages) else f"{len(done)} of {len(story.stages)} stages done"
    )
    size = _parameters(story)
    sentence = f"{_what(story.recipe)}{f', {number(size)} parameters' if size else ''}. {state}"
    strip = [tag("span", f"{stage.name} ", tag("b", _mark(stage)), class_="mark plain") for stage in story.stages]
    return tag(
        "header",
        tag("div", "ChatForge training report", class_="eyebrow"),
        tag("h1", story.root.name),
        tag("p", f"{sentence}, in {duration(seconds)}." if seconds else f"{sentence}.", class_="lead"),
        tag("div", *strip, class_="strip"),
    )


def _what(recipe: Recipe) -> str:
    if recipe.pretrain:
        return f"From raw text to a chat model: a {_ARCHITECTURES[recipe.pretrain.architecture]} decoder"
    if translation := recipe.translation:
        return f"An encoder-decoder transformer from {translation.source_language} to {translation.target_language}"
    if image := recipe.image:
        what = "fine-tuned" if image.model else {"unet": "UNet", "dit": "diffusion transformer"}[image.denoiser]
        return f"A text-conditioned {what} for pictures of {image.resolution} pixels"
    return "A chat model"


_SIBLINGS = ("translation", "image_vae", "image")  # which a chat model's recipe does not lack
_ARCHITECTURES = {"gpt2": "GPT-2", "llama": "Llama-style"}


def _mark(stage: Stage) -> str:
    if stage.state == "done":
        return f"✓ {duration(stage.manifest['seconds'])}"
    latest = stage.lines[-1] if stage.lines else None
    return f"{latest['step']}/{latest['total']}" if latest else "…" if stage.state == "under way" else "–"


def _about(story: Story) -> Html:
    recipe, manifests = story.recipe, story.manifests
    last = list(manifests.values())[-1] if manifests else {}
    facts = {
        "Recipe": recipe.name,
        "Seed": str(recipe.seed),
        "Workers": f"{recipe.workers} × {last.get('device', recipe.device)}",
        "Held out": f"{recipe.val_fraction:.0%} of all documents, chats and prompts, from every stage",
        "Parameters": number(_parameters(story)) if _parameters(story) else "",
        "Text": _text_seen(recipe),
        "Finished": last.get("finished", ""),
        "Code": last.get("commit") or "",
        "Versions": ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items()),
    }
    items = [tag(kind, value) for name, fact in facts.items() if fact for kind, value in (("dt", name), ("dd", fact))]
    return section("What ran", tag("div", tag("dl", *items), class_="card"))


def _text_seen(recipe: Recipe) -> str:
    pretrain = recipe.pretrain
    if pretrain is None:
        return ""
    return f"{number(pretrain.tokens)} tokens, repeats counted, in {pretrain.steps} steps of {pretrain.batch_tokens}"


def _parameters(story: Story) -> int:
    """As the newest model's weights have them; 0 where there is none yet."""
    from safetensors import safe_open

    for name in ("ppo", "sft", "pretrain", "translation", "image"):
        files = sorted((story.root / name / "model").rglob("*.safetensors"))
        total = 0
        for file in files:
            with safe_open(file, framework="np") as weights:
                total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        if total:
            return total
    return 0


def _size(story: Story) -> str:
    size = _parameters(story)
    return f"{number(size)} parameters, " if size else ""


def _stages(story: Story) -> Html:
    rows = [
        (
            tag("span", stage.name, class_=f"stage {stage.name}"),
            tag("span", stage.state, class_=f"mark {'good' if stage.state == 'done' else 'plain'}"),
            tag("span", duration(stage.manifest["seconds"]) if stage.manifest else "", class_="tight"),
            _made_from(stage, story.recipe),
            " · ".join(f"{name} {value:.4g}" for name, value in _last(stage).items()),
            tag("code", (stage.manifest.get("output") or "")[:10]),
        )
        for stage in story.stages
    ]
    about = "In the order they run. Each made its result from those that it names; the hash is that of the result."
    head = ("Stage", "State", "Time", "Made from", "Last numbers", "Result")
    return section("Stages", tag("div", table(head, rows, class_="fold"), class_="card"), about=about)


def _made_from(stage: Stage, recipe: Recipe) -> str:
    identity = stage.manifest.get("identity", {})
    parents = list(identity.get("parents", ())) or [p for p in PARENTS[stage.name] if p in recipe.stages]
    return ", ".join([*parents, *identity.get("inputs", ())])


def _last(stage: Stage) -> dict[str, float]:
    """A few of the last values: those that are drawn, or the first ones."""
    values = {k: v for line in stage.lines for k, v in line.items() if k not in ("step", "total", "time")}
    drawn = [name for panel in figures.PANELS.get(stage.name, ()) for name in panel.metrics if name in values]
    return {name: values[name] for name in (drawn or list(values))[:4]}


# ---- curves


def _curves(story: Story) -> Html:
    drawn = [
        _figure(stage, i, panel)
        for stage in story.stages
        for i, panel in enumerate(figures.panels(stage.name, stage.lines))
    ]
    if not drawn:
        return section("Curves", tag("p", "No stage has logged two steps yet.", class_="about"))
    about = "Over optimiser steps; PPO's over rollouts. Faint is each step, strong their running mean."
    return section("Curves", tag("div", *drawn, class_="grid figures"), about=about)


def _figure(stage: Stage, index: int, panel: figures.Panel) -> Html:
    drawn = [name for name in panel.metrics if figures.series(stage.lines, name)[0]]
    names = [("training", "first"), ("held out", "second")] if len(drawn) > 1 else []
    keys = [tag("span", name, class_="key", style=f"color: var(--{colour})") for name, colour in names]
    return tag(
        "figure",
        tag("div", figures.NAMES[stage.name], class_=f"who {stage.name}"),
        tag("h3", panel.title, *keys),
        tag("p", panel.caption),
        Html(figures.svg(panel, stage.lines, f"{stage.name}-{index}")),
        class_="card",
    )


# ---- samples


def _fixed_prompts(story: Story) -> Html | None:
    rows = story.evaluation.get("samples", {}).get("fixed")
    if not rows:
        return None
    about = (
        "The recipe's own prompts, answered greedily: what each model holds most likely, with no luck in it. The "
        "pretrained model has never seen a chat; it goes on with the prompt as with the first line of a document."
    )
    return section("Side by side", *(_sample(row["prompt"], row) for row in rows), about=about)


def _held_out_prompts(story: Story) -> Html | None:
    rows = story.evaluation.get("samples", {}).get("held_out")
    if not rows:
        return None
    about = (
        f"Sampled at temperature {story.evaluation['settings']['temperature']:g} with the same seed for each model. "
        "These are the first of a random order: nobody picked them. Gold is the judge's score, reward the learned one."
    )
    return section("Held-out prompts", *(_sample(_spoken(row["prompt"]), row) for row in rows), about=about)


def _sample(prompt: str, row: Json) -> Html:
    answers = [_answer(name, row[name]) for name in ("pretrain", "sft", "ppo") if name in row]
    return tag("div", tag("div", prompt, class_="asked"), tag("div", *answers, class_="answers"), class_="card sample")


def _answer(stage: str, answer: str | Json) -> Html:
    given: Json = {"text": answer} if isinstance(answer, str) else answer
    scores = [tag("span", f"{name} {given[name]:+.2f}", class_="score") for name in ("gold", "reward") if name in given]
    text = tag("div", given["text"], class_="answer") if given["text"].strip() else _nothing()
    return tag("div", tag("div", figures.NAMES[stage], *scores, class_=f"who {stage}"), text)


def _nothing() -> Html:
    return tag("div", "(says nothing)", class_="answer muted")


def _spoken(prompt: Any) -> str:
    """A prompt as it was said; who said what, where it is more than one turn."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _ranking(story: Story) -> Html | None:
    records = read_jsonl(story.root / "rank" / "rankings.jsonl")[:LOOKED_AT]
    if not records:
        return None
    record = max(records, key=lambda r: len(set(r["ranking"])))
    ordered = sorted(zip(record["ranking"], record["completions"], strict=True))
    rows = [
        tag("li", tag("span", str(rank), class_="place"), tag("span", text or "(says nothing)", class_="answer"))
        for rank, text in ordered
    ]
    judge = story.recipe.rank.judge if story.recipe.rank else "a judge"
    about = f"What the reward model learnt from: completions of the SFT model, best first, ranked by {judge}."
    asked = tag("div", _spoken(record["prompt"]), class_="asked")
    return section(
        "A ranking", tag("div", asked, tag("ol", *rows, class_="ranking"), class_="card sample"), about=about
    )


# ---- the end


def _remarks(story: Story) -> Html:
    remarks = report_tables.remarks(story.evaluation, story.recipe)
    missing = [stage.name for stage in story.stages if stage.state != "done"]
    if missing:
        again = "The “chatforge train” command that began it goes on from here."
        remarks.insert(0, f"This run is not finished: {', '.join(missing)} to come. {again}")
    remarks += [f"{stage.name}: {note}" for stage in story.stages for note in Run(story.root, stage.name).notes()]
    absent = [name for name in STAGES if name not in story.recipe.stages and name not in _SIBLINGS]
    if absent and story.recipe.sft:
        remarks.append(f"The recipe leaves out: {', '.join(absent)}.")
    return section("How far to trust this", tag("div", tag("ul", *(tag("li", r) for r in remarks)), class_="card"))


def _recipe(story: Story) -> Html:
    text = story.recipe.model_dump_json(indent=2, exclude_none=True)
    drawn = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return join(
        [
            tag("details", tag("summary", "The resolved recipe"), tag("pre", text)),
            tag("footer", f"Drawn {drawn} from the run folder {story.root.name}."),
        ]
    )
