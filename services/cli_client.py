"""The commands that talk to a running server: chat, translate, draw, and what it serves."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from services.address import DEFAULT_ADDRESS
from services.cli_options import JsonOption, show_table

app = typer.Typer()

ServerOption = Annotated[
    str,
    typer.Option(metavar="HOST:PORT", envvar="CHATFORGE_SERVER", help="The server to talk to; https://HOST by TLS."),
]


@app.command()
def chat(
    text: Annotated[list[str], typer.Argument(help="What to say; without it, a conversation (or stdin).")] = [],  # noqa: B006
    server: ServerOption = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="Needed where the server has more than one.")] = "",
    system: Annotated[str, typer.Option(help="How the model should behave.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest answer.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that together have this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens; 0: off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: against what was said before.")] = None,
    stop: Annotated[list[str], typer.Option(metavar="TEXT", help="End before this text. Repeat for more.")] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Talk to a model that a server serves."""
    from services.client import Client
    from services.console import Conversation, converse
    from services.interpreter import read_document

    knobs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    knobs |= {"top_k": top_k, "repetition_penalty": repetition_penalty, "stop": stop, "seed": seed}
    with Client(server) as client:
        conversation = Conversation(client, model, system, knobs)
        if text or not sys.stdin.isatty():
            conversation.say(_typed(text) if text else read_document(None).strip())
        else:
            converse(conversation)


@app.command()
def translate(
    text: Annotated[
        list[str], typer.Argument(help="What to translate; without it, --file, stdin or what you type.")
    ] = [],  # noqa: B006
    file: Annotated[Path | None, typer.Option(help="A document in UTF-8; its lines stay as they are.")] = None,
    source: Annotated[str, typer.Option("--from", metavar="LANGUAGE", help="A BCP-47 tag, as de or pt-BR.")] = "",
    target: Annotated[str, typer.Option("--to", metavar="LANGUAGE", help="The same.")] = "",
    server: ServerOption = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="Instead of the languages; needed where they leave a choice.")] = "",
    num_beams: Annotated[int | None, typer.Option(help="1: greedy.")] = None,
    num_hypotheses: Annotated[
        int | None, typer.Option(help="Above 1: as many translations, with their scores.")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beam search; above 0: longer ones.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of one sentence.")] = None,
) -> None:
    """Translate with a model that a server serves."""
    from services.client import Client
    from services.interpreter import Interpreter, read_document

    if text and file:
        raise ValueError("a text and --file are given; give one of them")
    options: dict[str, Any] = {"source": source, "target": target, "model": model, "num_beams": num_beams}
    options |= {"num_hypotheses": num_hypotheses, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    with Client(server) as client:
        interpreter = Interpreter(client, **options)
        if not (text or file) and sys.stdin.isatty():
            interpreter.converse()
            return
        said = _typed(text) if text else read_document(file)
        if (num_hypotheses or 1) > 1:
            interpreter.show_hypotheses(said)
        else:
            interpreter.translate(said, end="\n" if text else "")  # a document's end is its own


@app.command()
def draw(
    prompt: Annotated[list[str], typer.Argument(help="What to draw.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Ends in .png, .jpg or .webp; several are numbered.")
    ] = Path("drawing.png"),
    n: Annotated[int, typer.Option("--n", help="How many images.")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="All on one sheet.")] = False,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="From noise to picture.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly the prompt pulls; 1: off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image; the next has the next.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, dpm++ or euler; default: the model's own.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw this picture anew.")] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="Only where this one is white.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far from the picture: above 0, to 1.")] = None,
    source: Annotated[
        str, typer.Option("--from", metavar="LANGUAGE", help="Of the prompt, which the server translates first.")
    ] = "",
    server: ServerOption = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="Needed where the server has more than one.")] = "",
) -> None:
    """Draw with a model that a server serves."""
    from services.client import Client
    from services.easel import Easel, in_english

    if image is None and (mask or strength is not None):
        raise ValueError(f"{'--mask' if mask else '--strength'}: needs --image, the picture that is drawn anew")
    options: dict[str, Any] = {"num_images": n, "width": width, "height": height, "num_inference_steps": steps}
    options |= {"guidance_scale": guidance_scale, "seed": seed, "sampler": sampler, "model": model}
    with Client(server) as client:
        easel = Easel(client, output, grid)
        said = [_typed(prompt), negative_prompt]
        if source:
            said = in_english(client, said, source)
            typer.echo(f"prompt: {said[0]}")
        if image is None:
            easel.draw(said[0], negative_prompt=said[1], **options)
        else:
            easel.edit(said[0], image, mask, strength, negative_prompt=said[1], **options)


@app.command()
def models(server: ServerOption = DEFAULT_ADDRESS, json: JsonOption = False) -> None:
    """What a server serves."""
    from services.client import Client
    from services.listing import models_table

    with Client(server, timeout=20) as client:
        show_table(models_table, client.list_models(), json)


@app.command()
def health(server: ServerOption = DEFAULT_ADDRESS) -> None:
    """SERVING (exit code 0) or NOT_SERVING (exit code 1)."""
    from services.client import Client

    with Client(server, timeout=5) as client:
        status = client.health()
    typer.echo(status)
    raise typer.Exit(0 if status == "SERVING" else 1)


def _typed(words: list[str]) -> str:
    """Arguments as one text; raises ValueError where they are not UTF-8."""
    text = " ".join(words)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text: not UTF-8 at character {error.start + 1}") from None
    return text
