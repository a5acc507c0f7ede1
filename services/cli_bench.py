"""`chatforge bench`: every figure beside that of its peers, in one run. Each benchmark is a module of its own."""

from typing import Annotated

import typer

from services.cli_options import show

app = typer.Typer(no_args_is_help=True, help="The benchmarks, each beside its peers.")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model folder or a run.")] = "models/SmolLM2-135M-Instruct",
) -> None:
    """1 and 16 gRPC clients in bf16, beside transformers.generate one at a time, in the same run."""
    from services.bench_chat import bench_serving

    bench_serving(model, show)


@app.command()
def translate(
    model: Annotated[str, typer.Argument(help="A translation model's folder or a run.")] = "translation-tiny",
    pairs: Annotated[str, typer.Argument(help="Sentence pairs, as a recipe names them.")] = "sample:emoji-names",
) -> None:
    """1, 16 and 64 gRPC clients, beside transformers.generate one by one and in a batch, in the same run."""
    from services.bench_translation import bench_translation

    bench_translation(model, pairs, show)


@app.command()
def draw(
    model: Annotated[str, typer.Argument(help="An image model's folder or a run.")] = "image-tiny",
) -> None:
    """1 and 8 gRPC clients, beside diffusers' own pipeline one by one, in the same run."""
    from services.bench_image import bench_drawing

    bench_drawing(model, show)


@app.command()
def submit() -> None:
    """Time from the command to the first step, and a step's, by a bare process, `train` and `submit`."""
    from services.bench_submit import bench_submission

    bench_submission(show)


@app.command()
def train() -> None:
    """Tokens per second of the pretraining loop, beside a bare PyTorch loop."""
    from training.bench import bench_training

    bench_training()
