"""The curves of a run: which metrics tell a stage's story, drawn as SVG for the report and as one PNG for elsewhere.

An SVG takes its colours from the page's CSS variables, so one drawing serves light and dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

Lines = Sequence[dict[str, Any]]  # of metrics.jsonl

SMOOTHING = 0.06  # of the steps: the width over which a noisy curve is averaged
MANY = 60  # points: a curve that gets a running mean
LEAST_SPAN = 0.2  # of an axis of percents: noise should not fill it
FEW = 20  # points: a curve that shows them


@dataclass(frozen=True)
class Panel:
    """One small chart: up to two metrics of a stage over its steps."""

    title: str
    caption: str  # what the reader should see in it
    metrics: tuple[str, ...]  # the first is what was trained on, a second was held out
    reference: float | None = None  # a dashed line: chance, or where it began
    percent: bool = False


PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (
        Panel("Loss", "Nats per token of the training text.", ("loss",)),
        Panel("Held-out bits per byte", "On text it never saw; lower is better.", ("val_bits_per_byte",)),
    ),
    "sft": (
        Panel("Loss", "Nats per token of the assistant's turns.", ("loss", "val_loss")),
        Panel(
            "Next token right", "How often its first guess is the token that follows.", ("mean_token_accuracy",),
            percent=True,
        ),
    ),
    "reward": (
        Panel("Loss", "Of all pairs of a ranking; the dashed line is a coin's ln 2.", ("loss",), math.log(2)),
        Panel("Pairs in the right order", "The dashed line is chance.", ("accuracy", "val_accuracy"), 0.5, True),
    ),
    "ppo": (
        Panel("Learned reward", "What PPO climbs; 0 is the mean on SFT's samples.", ("reward",), 0.0),
        Panel("KL to SFT", "How far it has gone for that, in nats per completion.", ("kl",)),
        Panel("Completion length", "Tokens; a run-away here: the reward likes length.", ("completion_length",)),
        Panel("Turns ended", "Completions that end by themselves.", ("stop_rate",), percent=True),
        Panel("Variety", "Distinct-2; falling towards 0 is one phrase for everything.", ("distinct_2",)),
        Panel("Entropy", "Nats per token; what is left to explore.", ("entropy",)),
    ),
    "translation": (
        Panel("Loss", "Nats per target token; in training with label smoothing.", ("loss", "val_loss")),
        Panel("Held-out chrF", "Of greedy translations; the bend upwards is where the languages align.", ("val_chrf",)),
    ),
    "image_vae": (
        Panel("Reconstruction", "Mean |x − x̂| of pixels in −1..1.", ("reconstruction", "val_loss")),
        Panel("Adversary", "Its hinge loss; the dashed line is where it tells nothing.", ("discriminator",), 1.0),
        Panel("KL", "Nats per picture: what the latents tell.", ("kl",)),
    ),
    "image": (
        Panel("Loss", "Mean square of what is predicted; held out at the same times and noises.", ("loss", "val_loss")),
    ),
}  # fmt: skip
SUMMARY = (
    *(("pretrain", 0), ("pretrain", 1), ("sft", 0), ("reward", 1), ("ppo", 0), ("ppo", 1)),
    *(("translation", 0), ("translation", 1), ("image_vae", 0), ("image", 0)),
)
NAMES = {
    "pretrain": "Pretrain",
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "translation": "Translation",
    "image_vae": "Image autoencoder",
    "image": "Image",
}


@dataclass(frozen=True)
class Palette:
    ink: str  # words and reference lines
    line: str  # the grid
    first: str
    second: str

    @property
    def colours(self) -> tuple[str, str]:
        return self.first, self.second


PAPER = Palette("#5b616b", "#e3e1dc", "#2f5fd0", "#c2571a")
# Colours that nobody sees: `svg` puts the page's variables in their place.
PAGE = Palette("#010203", "#010204", "#010205", "#010206")
VARIABLES = {
    PAGE.ink: "var(--muted)",
    PAGE.line: "var(--line)",
    PAGE.first: "var(--first)",
    PAGE.second: "var(--second)",
}


def panels(stage: str, lines: Lines) -> list[Panel]:
    """Those of a stage that there are numbers for."""
    return [p for p in PANELS.get(stage, ()) if any(len(series(lines, name)[0]) > 1 for name in p.metrics)]


def series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and is a number."""
    points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over SMOOTHING of the curve; short curves stay as they are."""
    half = int(len(values) * SMOOTHING / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def svg(panel: Panel, lines: Lines, name: str) -> str:
    """The panel as an SVG element that a page can hold; `name` keeps its ids apart from other figures'."""
    with matplotlib.rc_context({**_style(PAGE), "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(4.0, 2.1), layout="constrained")
        draw(figure.add_subplot(), panel, lines, PAGE)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r" font-family: [^;]*;", "", drawn)  # the page's
    drawn = re.sub(r'(id="|#)(?=[A-Za-z])', rf"\g<1>{name}-", drawn)
    size = re.search(r'viewBox="[^"]*"', drawn)
    assert size, "matplotlib's SVG has a viewBox"
    return re.sub(r"<svg [^>]*>", f'<svg {size[0]} role="img" aria-label="{panel.title}">', drawn, count=1)


def png(metrics: Mapping[str, Lines], path: Path, title: str) -> Path:
    """The curves that tell the story of a run, stage → lines, as one picture on light ground."""
    chosen = [(stage, PANELS[stage][i]) for stage, i in SUMMARY]
    shown = [(stage, panel) for stage, panel in chosen if panel in panels(stage, metrics.get(stage, ()))]
    columns = min(3, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    with matplotlib.rc_context(_style(PAPER)):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(3.6 * columns, 2.4 * rows + 0.5), layout=layout, facecolor="white")
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        for i, (stage, panel) in enumerate(shown):
            axes = figure.add_subplot(rows, columns, i + 1)
            draw(axes, panel, metrics[stage], PAPER)
            axes.set_title(f"{NAMES[stage]} · {panel.title}", loc="left", fontsize=9.5)
        figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


def draw(axes: Axes, panel: Panel, lines: Lines, palette: Palette) -> None:
    """Raw values faint, their running mean strong, and where that ends in figures."""
    if panel.reference is not None:
        axes.axhline(panel.reference, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
    curves = [(series(lines, name), colour) for name, colour in zip(panel.metrics, palette.colours, strict=False)]
    ends = [_plot(axes, steps, values, colour) for (steps, values), colour in curves if steps]
    highest = max(value for _, value, _ in ends)
    for step, value, colour in ends:
        shown = f"{value:.1%}" if panel.percent else f"{value:.3g}"
        aside = (0 if len(ends) == 1 else 5) * (1 if value == highest else -1)  # two labels keep off one another
        axes.annotate(shown, (step, value), (5, aside), textcoords="offset points", va="center", color=colour,
                      fontweight="bold", annotation_clip=False)  # fmt: skip
    axes.grid(axis="y")
    axes.margins(x=0.02, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, min(low, high - LEAST_SPAN)), min(high, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _plot(axes: Axes, steps: list[int], values: list[float], colour: str) -> tuple[int, float, str]:
    if len(steps) > MANY:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values = smoothed(values)
    marker = "o" if len(steps) < FEW else None
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.2, solid_capstyle="round")
    return steps[-1], values[-1], colour


def _style(palette: Palette) -> Any:
    return {
        "font.family": "sans-serif",
        "font.size": 8.5,
        "text.color": palette.ink,
        "axes.edgecolor": palette.line,
        "axes.titlecolor": palette.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "grid.color": palette.line,
        "grid.linewidth": 0.8,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
