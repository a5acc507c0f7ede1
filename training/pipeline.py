"""Which stages a recipe needs, in what order, what is already done, what feeds what.

A stage is identified by its config, the content of its inputs, what its parents made, seed, workers and device. A
manifest with the same identity means done; checkpoints of the same identity mean it goes on; anything else starts anew.
"""

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from training.config import (
    PIXELS,
    ConfigError,
    ImageConfig,
    ImageVaeConfig,
    PPOConfig,
    PretrainConfig,
    RankConfig,
    Recipe,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TokenizerConfig,
    TrainingConfig,
    TranslationConfig,
    padded_vocab,
)
from training.data.sources import fingerprint
from training.run import Run, StageError, write_atomic

RUNS = Path("runs")
# The others take one worker.
GRADIENT_STAGES = frozenset({"pretrain", "sft", "reward", "ppo", "translation", "image_vae", "image"})
LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "tokenizers", "diffusers")

# What each stage reads of the stages before it, where its config does not name another model.
PARENTS: dict[str, dict[str, str | None]] = {
    "tokenizer": {},
    "pretrain": {"tokenizer": None},
    "sft": {"pretrain": "model"},
    "rank": {"sft": "model"},
    "reward": {"sft": "model", "rank": "rankings"},
    "ppo": {"sft": "model", "reward": "reward_model"},
    "translation": {},
    "image_vae": {},
    "image": {"image_vae": "vae"},
    "evaluate": dict.fromkeys(("pretrain", "sft", "reward", "ppo", "translation", "image"), None),
}
MODELS = ("model", "reward_model", "vae", "text_encoder")
SOURCES = ("text", "chats", "prompts", "rankings", "pairs", "images")

State = Literal["done", "resume", "stale", "new"]


@dataclass(frozen=True)
class PlannedStage:
    name: str
    config: StageConfig
    state: State
    why: str  # what made it stale, or where it goes on
    derived: str  # parameters, tokens, steps, batch arithmetic


def train(recipe: Recipe, runs: Path = RUNS, only: str | None = None, say: Callable[[str], None] = print) -> Path:
    """Run what is not done of a recipe, in order, and return the run's folder.

    `only` runs that one stage alone. Raises ConfigError or StageError before or at the stage that cannot succeed; what
    was finished stays, and the same call goes on from there.
    """
    from training import cluster

    root = runs / recipe.name
    if only and only not in recipe.stages:
        raise ConfigError(f"stage {only!r} is not in recipe {recipe.name!r}, which has: {', '.join(recipe.stages)}")
    plans = plan(recipe, runs)
    say(describe(recipe, plans))
    todo = [p.name for p in plans if p.state != "done" and only in (None, p.name)]
    if not todo:
        say("nothing to do: every stage is done")
        return root
    write_atomic(root / "run.json", recipe.model_dump_json(indent=2) + "\n")
    with cluster.ray_session():
        device = cluster.resolve_device(recipe.device, recipe.workers)
        for name in todo:
            _run_stage(recipe, root, name, device, say)
    return root


def _run_stage(recipe: Recipe, root: Path, name: str, device: str, say: Callable[[str], None]) -> None:
    from training import cluster

    config = recipe.stages[name]
    run = stage_run(recipe, root, name, device)
    identity = _identity(recipe, root, name)
    state, why = _state(root, name, identity)
    if state == "done":  # a parent ran again and made the very same thing
        say(f"{name}: already done")
        return
    if state != "resume":
        shutil.rmtree(run.folder, ignore_errors=True)
    write_atomic(run.folder / "started.json", json.dumps(identity, indent=2) + "\n")
    say(f"{name}: {'goes on ' + why if state == 'resume' else 'starts'} on {run.workers} × {device}")
    started = time.time()
    cluster.run_stage(config, run)
    _write_manifest(run, identity, time.time() - started)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # done: nothing will go on from them
    say(f"{name}: done in {time.time() - started:.0f} s  {_brief(run.final_metrics())}")


def stage_run(recipe: Recipe, root: Path, name: str, device: str = "cpu") -> Run:
    workers = recipe.workers if name in GRADIENT_STAGES else 1
    return Run(root.resolve(), name, recipe.seed, workers, device, recipe.val_fraction)


# ---- the plan


def plan(recipe: Recipe, runs: Path = RUNS) -> list[PlannedStage]:
    """Every stage with its state and derived numbers; checks all that can be checked before anything runs."""
    if not recipe.stages:
        raise ConfigError(f"recipe {recipe.name!r} has no stages")
    root = runs / recipe.name
    planned: list[PlannedStage] = []
    again: set[str] = set()
    for name, config in recipe.stages.items():
        _check_parents(recipe, root, name)
        _check_models(config, name)
        numbers = derived(recipe, config)
        state, why = _state(root, name, _identity(recipe, root, name))
        waits = sorted(again & _parents(recipe, name).keys())
        if waits and state in ("done", "resume"):
            state, why = "stale", f"{', '.join(waits)} will run again"
        if state != "done":
            again.add(name)
        planned.append(PlannedStage(name, config, state, why, numbers))
    return planned


def describe(recipe: Recipe, plans: list[PlannedStage]) -> str:
    """The plan as a table of plain lines."""
    lines = [f"recipe {recipe.name}: seed {recipe.seed}, workers {recipe.workers}, device {recipe.device}"]
    for p in plans:
        state = p.state + (f" ({p.why})" if p.why else "")
        lines.append(f"  {p.name:<10} {state:<28} {p.derived}".rstrip())
    return "\n".join(lines)


def derived(recipe: Recipe, config: StageConfig) -> str:
    """The numbers that follow from a stage's settings; raises ConfigError where they do not fit together."""
    match config:
        case TokenizerConfig():
            return f"{config.vocab_size:,} tokens at most"
        case PretrainConfig():
            size = f"{_parameters(recipe, config)} parameters, " if recipe.tokenizer else ""
            return (
                f"{size}{config.tokens:,} tokens = {config.steps:,} steps × {_batch(recipe, config)} × {config.seq_len}"
            )
        case RankConfig():
            return f"{config.num_prompts:,} prompts × {config.num_completions} completions, judge {config.judge}"
        case PPOConfig():
            steps = config.num_rollouts * config.num_ppo_epochs * config.num_mini_batches
            return f"{config.num_rollouts} rollouts × {_batch(recipe, config)} episodes, {steps:,} optimiser steps"
        case SFTConfig() | RewardConfig():
            lora = f", LoRA r={config.lora.r}" if config.lora else ""
            return f"{config.num_train_epochs:g} epochs, batch {_batch(recipe, config)}{lora}"
        case TranslationConfig():
            return _translation(recipe, config)
        case ImageVaeConfig():
            sizes = f"{config.resolution} px → {config.resolution // config.downsampling} × {config.latent_channels}"
            return f"{sizes} channels, {config.steps:,} steps × {_batch(recipe, config)}"
        case ImageConfig():
            return _image(recipe, config)
    return ""


def _parameters(recipe: Recipe, config: PretrainConfig) -> str:
    assert recipe.tokenizer
    return _millions(config.parameters(padded_vocab(recipe.tokenizer.vocab_size)))


def _translation(recipe: Recipe, config: TranslationConfig) -> str:
    passes = config.gradient_accumulation_steps(recipe.workers)
    lora = f", LoRA r={config.lora.r}" if config.lora else ""
    what = f"from {config.model}{lora}" if config.model else ""
    what = what or f"{_millions(config.parameters(padded_vocab(config.vocab_size)))} parameters"
    return (
        f"{config.source_language} → {config.target_language}, {what}, "
        f"{config.steps:,} steps × {config.batch_tokens:,} tokens (workers {recipe.workers} × accumulation {passes})"
    )


def _image(recipe: Recipe, config: ImageConfig) -> str:
    lora = f", LoRA r={config.lora.r}" if config.lora else ""
    what = f"from {config.model}{lora}" if config.model else f"{config.denoiser}, {config.prediction}"
    return f"{what}, {config.resolution} px, {config.steps:,} steps × {_batch(recipe, config)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count:,}"


def _batch(recipe: Recipe, config: TrainingConfig) -> str:
    accumulation = config.gradient_accumulation_steps(recipe.workers)
    parts = f"workers {recipe.workers} × micro {config.micro_batch_size} × accumulation {accumulation}"
    return f"{config.batch_size} ({parts})"


def _check_parents(recipe: Recipe, root: Path, name: str) -> None:
    config = recipe.stages[name]
    for parent, field in PARENTS[name].items():
        if (
            _is_named(config, field)
            or parent in recipe.stages
            or name == "evaluate"
            or (root / parent / "manifest.json").exists()
        ):
            continue
        hint = f", or name {name}.{field}" if field else ""
        raise ConfigError(f"{name}: needs the {parent} stage, which recipe {recipe.name!r} does not have: add it{hint}")


def _check_models(config: StageConfig, name: str) -> None:
    """A model that a stage names is a folder, or may be a hub's: NAME or OWNER/NAME."""
    for field in MODELS:
        model = getattr(config, field, None)
        if (
            model
            and model != PIXELS
            and not Path(model).is_dir()
            and (model.startswith((".", "/", "~")) or model.count("/") > 1)
        ):
            raise ConfigError(f"{name}.{field}={model!r}: no such folder")


def _parents(recipe: Recipe, name: str) -> dict[str, str | None]:
    config = recipe.stages[name]
    fields = PARENTS[name].items()
    return {p: f for p, f in fields if p in recipe.stages and not _is_named(config, f)}


def _is_named(config: StageConfig, field: str | None) -> bool:
    """Whether a stage's config says itself what it would else take from an earlier stage."""
    brought = field == "vae" and getattr(config, "model", None)  # a pipeline folder has all of its parts
    return bool(field and (getattr(config, field, None) or brought))


def _state(root: Path, name: str, identity: dict[str, Any]) -> tuple[State, str]:
    manifest = _read_json(root / name / "manifest.json")
    started = _read_json(root / name / "started.json")
    if manifest:
        difference = _difference(manifest["identity"], identity)
        return ("stale", difference) if difference else ("done", "")
    if not started:
        return "new", ""
    difference = _difference(started, identity)
    if difference:
        return "stale", difference
    latest = Run(root, name).latest_checkpoint()
    return "resume", f"from step {latest[0]}" if latest else "from what it has"


def _difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first thing that differs, in words; empty where nothing does."""
    for key in old.keys() | new.keys():
        where = f"{path}.{key}" if path else key
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return _difference(a, b, where)
        if path in ("inputs", "parents"):
            return f"{key} changed"
        return f"{where.removeprefix('config.')}: {a} → {b}"
    return ""


def _identity(recipe: Recipe, root: Path, name: str) -> dict[str, Any]:
    """All that the stage's result depends on."""
    config = recipe.stages[name]
    settings = config.model_dump(mode="json", exclude=set(config.runtime))
    sources = [s for field in SOURCES for s in (settings.get(field) or []) if name != "evaluate"]
    models = [settings[f] for f in MODELS if settings.get(f)]
    run = stage_run(recipe, root, name)
    return {
        "config": settings,
        "inputs": {**fingerprint(sources), **{m: _folder_hash(Path(m)) for m in models}},
        "parents": {parent: _made_by(root, parent) for parent in _parents(recipe, name)},
        "seed": recipe.seed,
        "workers": run.workers,
        "val_fraction": recipe.val_fraction,
    }


def _made_by(root: Path, stage: str) -> str | None:
    manifest = _read_json(root / stage / "manifest.json")
    return manifest["output"] if manifest else None


# ---- the manifest


def _write_manifest(run: Run, identity: dict[str, Any], seconds: float) -> None:
    manifest = {
        "stage": run.stage,
        "identity": identity,
        "output": _output_hash(run),
        "device": run.device,
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": _git_commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "metrics": run.final_metrics(),
    }
    write_atomic(run.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _output_hash(run: Run) -> str:
    """Of what the stage has made: rankings, an evaluation, or else the model folder."""
    for name in ("rankings.jsonl", "evaluation.json"):
        if (run.folder / name).exists():
            return hashlib.sha256((run.folder / name).read_bytes()).hexdigest()
    return _folder_hash(run.model)


def _folder_hash(folder: Path) -> str:
    """Content of every file; a hub name, which is no folder, stands for itself."""
    if not folder.is_dir():
        return str(folder)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "chatforge.json"):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _git_commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


# ---- what runs there are


def list_runs(runs: Path = RUNS) -> list[dict[str, Any]]:
    """Name, stages done and time of every run."""
    return [describe_run(path.parent) for path in sorted(runs.glob("*/run.json"))]


def describe_run(root: Path) -> dict[str, Any]:
    """A run's recipe, and its stages' manifests by name. Raises StageError where there is no such run."""
    recipe = _read_json(root / "run.json")
    if recipe is None:
        raise StageError(f"run {root.name!r} not found in {root.parent}; `chatforge runs` lists what there is")
    stages = {p.parent.name: _read_json(p) for p in sorted(root.glob("*/manifest.json"))}
    return {"name": root.name, "recipe": recipe, "stages": stages}


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _brief(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:6])
