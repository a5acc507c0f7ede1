"""DeepSpeed for every stage: config, engine set-up, sharded checkpoints, export.

All that is particular to running DeepSpeed on a laptop's CPU as on many GPUs stands in this file: the stages do not ask
where they are. bf16 is DeepSpeed's torch_autocast: weights, their master copy and checkpoints are one set of fp32
tensors under ZeRO 0 to 3 (Rajbhandari et al. 2020), and matrix products run in bf16.
"""

import argparse
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from training import disks, mirror, notice
from training.config import StageConfig, TrainingConfig, TranslationConfig
from training.copies import local_copy
from training.device import ENVIRONMENT, backend
from training.recipe import MODELS, PARENTS
from training.run import Run, StageError, StageInterrupted, commit_folder, folder_atomic, save_model
from training.store import is_uri, join

Config = TrainingConfig | TranslationConfig
WORKERS = "workers"  # the file of a checkpoint that says how many have written it
UNIVERSAL = "universal"
TAG = "deepspeed"  # the folder of a checkpoint that has an engine's part
T = TypeVar("T")


def init_distributed(device: str) -> None:
    """Join the workers' process group (of one where no launcher set RANK), before transformers looks for it.

    Idempotent. On CPU no DeepSpeed op is built: a process killed in mid-build leaves a lock that hangs later starts.
    """
    os.environ.update(ENVIRONMENT)
    os.environ["DS_ACCELERATOR"] = device
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)
    import deepspeed
    import deepspeed.ops
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the ZeRO-3 of an earlier stage in this process would shard what is loaded now
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():  # outside Ray: one alone needs no port
        dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend(device), auto_mpi_discovery=False, verbose=False)


def seed_everything(seed: int) -> None:
    """Python, numpy and torch; the same on every rank: what differs between ranks is their data."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def deepspeed_config(config: Config, run: Run) -> dict[str, Any]:
    """The stage's settings as DeepSpeed takes them."""
    return {
        # It only counts with this; a batch of tokens has no fixed number of sequences.
        "train_micro_batch_size_per_gpu": config.micro_batch(run.workers) if isinstance(config, TrainingConfig) else 1,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(run.workers),
        "gradient_clipping": config.max_grad_norm,
        "torch_autocast": {"enabled": config.dtype == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": config.zero_stage > 0 and is_resized(run)},
        "steps_per_print": 10**9,
    }


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: decay for matrices that multiply; none for norms, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(matrix) >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def initialize(
    model: torch.nn.Module,
    config: Config,
    run: Run,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Any:
    """The model on a DeepSpeedEngine, to be called as DeepSpeed documents."""
    import deepspeed

    if config.gradient_checkpointing:
        _recompute_blocks(model)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=deepspeed_config(config, run)
    )
    return engine


def _recompute_blocks(model: torch.nn.Module) -> None:
    """Every block of transformers' and diffusers' models in it keeps its input alone until the backward pass.

    Chen et al. 2016, section 3. Under ZeRO-3 DeepSpeed 0.19.8 is the first that gathers parameters for it again.
    """
    part: Any = model
    if getattr(part, "supports_gradient_checkpointing", False):  # transformers'
        part.activation_checkpointing_enable({"use_reentrant": False})
    elif getattr(part, "_supports_gradient_checkpointing", False):  # diffusers'
        part.enable_gradient_checkpointing()
    else:
        for child in part.children():
            _recompute_blocks(child)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_first(run: Run, make: Callable[[], T]) -> T | None:
    """What `make` returns on rank 0, None elsewhere; all ranks call it, and what it raises is raised on every one.

    The folders that `make` leaves in the stage's are on every rank's disk afterwards.
    """

    def make_and_send() -> T:
        made = make()
        if run.store:
            mirror.push_prepared(run)
        return made

    made = disks.on_rank_0(run, make_and_send)
    if run.store:
        disks.once_per_disk(run, lambda: mirror.pull_prepared(run) if run.rank else None)
    return made


@contextmanager
def mirrored(config: StageConfig, run: Run) -> Iterator[StageConfig]:
    """Around a stage on every worker: what the run's store has is downloaded before it, and results uploaded after it.

    Yields the config with the models that it names by URIs as folders of this disk. Raises StoreError.
    """
    models = {f: str(local_copy(uri)) for f in MODELS if (uri := getattr(config, f, None)) and is_uri(uri)}
    config = config.model_copy(update=models)
    if run.store is None:
        yield config
        return
    if run.workers > 1:
        init_distributed(run.device)
    disks.once_per_disk(run, lambda: mirror.pull_stage(run, PARENTS[run.stage]))
    try:
        with mirror.sending_files(run) if run.rank == 0 else nullcontext():
            yield config
            if run.rank == 0:
                mirror.push_results(run)
    finally:
        if disks.is_first_on_disk(run):
            mirror.push_logs(run)


def mean_over_workers(value: float) -> float:
    """The mean of one number over all workers."""
    tensor = torch.tensor(value, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).item()


def sum_over_workers(values: list[float]) -> list[float]:
    """Elementwise sums over all workers."""
    tensor = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def checkpoint_is_due(config: Config, run: Run, taken: int, total: int, steps_each: int = 1) -> bool:
    """Whether to save after `taken` of `total` rounds of so many optimiser steps: in its turn, or because somebody
    asked; all ranks call it. Not after the last one: what it leaves is the model.
    """
    every = max(1, config.checkpoint_every // steps_each)
    return taken < total and (heard(run) != notice.NOTHING or taken % every == 0)


def heard(run: Run) -> int:
    """The greatest notice (training.notice) that any worker has got; all ranks call it."""
    told = notice.heard(run)
    if run.workers == 1:
        return told
    most = torch.tensor(told, device=_collective_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())


def require_finite(run: Run, step: int, loss: float, config: Config) -> None:
    """Raises StageError where a loss is no number; what is kept is the checkpoint before."""
    if not math.isfinite(loss):
        raise StageError(
            f"{run.stage}: the loss at step {step} is {loss}: lower {run.stage}.learning_rate={config.learning_rate:g}"
        )


def step_metrics(engine: Any, scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
    """What every stage logs of an optimiser step."""
    return {
        "learning_rate": float(scheduler.get_last_lr()[0]),
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
    }


def save(engine: Any, run: Run, step: int, beside: Callable[[Path], None] | None = None) -> None:
    """An engine as the newest checkpoint, with what `beside` writes into its folder; all ranks call it."""

    def write(folder: Path) -> None:
        engine.save_checkpoint(str(folder), tag=TAG)
        if beside:
            beside(folder)

    save_checkpoint(run, step, write)


def save_checkpoint(run: Run, step: int, write: Callable[[Path], None]) -> None:
    """All ranks call it; `write` puts every rank's part into one folder, which then appears whole under its name.

    Each rank's random state goes along. The checkpoint before it is deleted once the new one is there.
    """
    temporary = run.checkpoints / "writing.tmp"
    if disks.is_first_on_disk(run):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    write(temporary)
    torch.save(random_state(), temporary / f"random-{run.rank}.pt")
    adopt_checkpoint(run, step, temporary)


def adopt_checkpoint(run: Run, step: int, written: Path) -> None:
    """Make a folder that all ranks have written to the newest checkpoint, by one rename; all ranks call it.

    Raises StageInterrupted where somebody has asked the stage to leave: this is what it goes on from.
    """
    if run.rank == 0:
        (written / WORKERS).write_text(str(run.workers))
    barrier()
    if run.store:
        disks.store_checkpoint(run, step, written)
    if disks.is_first_on_disk(run):
        final = run.checkpoint_path(step)
        commit_folder(written, final)
        for other in run.checkpoints.glob("step-*"):
            if other != final:
                shutil.rmtree(other)
    barrier()
    if told := heard(run):
        raise StageInterrupted(stopped=told == notice.STOP)


def resume(engine: Any, run: Run) -> int:
    """Loads the newest checkpoint of an engine, random state included, and returns the step to go on from."""
    latest = run.latest_checkpoint()
    if latest is None:
        run.rewind(0)
        return 0
    step, folder = latest
    load(engine, folder, run)
    restore_random_state(run, folder)
    run.rewind(step)
    return step


def load(engine: Any, folder: Path, run: Run) -> None:
    """An engine's part of a checkpoint, also one that another number of workers has written; all ranks call it."""
    if not engine.load_universal_checkpoint():
        found, _ = engine.load_checkpoint(str(folder), tag=TAG)
        if found is None:  # DeepSpeed only warns, and the stage would go on with fresh weights
            where = join(run.store, run.stage) if run.store else run.folder
            raise StageError(f"{folder}: holds no checkpoint that can be read; delete {where} to start the stage anew")
        return
    disks.once_per_disk(run, lambda: make_universal(folder, TAG))
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(folder), tag=UNIVERSAL)
    mend_universal(engine, decays)


def mend_universal(engine: Any, decays: Sequence[float]) -> None:
    """Three things that DeepSpeed 0.19.8 gets wrong when it loads a universal checkpoint.

    Under ZeRO-3 all parameters get one and the same step counter, which every one of them then counts up; and every
    group of parameters gets the first one's weight decay: `decays` are theirs. Under all levels counters are in main
    memory, and a fused optimizer wants them beside the parameters.
    """
    optimizer = engine.optimizer.optimizer
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        step = torch.as_tensor(state["step"]).clone()
        state["step"] = step.to(parameter.device, torch.float32) if fused else step
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=False):
        group["weight_decay"] = decay


def is_resized(run: Run) -> bool:
    """Whether the newest checkpoint is of another number of workers."""
    latest = run.latest_checkpoint()
    return latest is not None and int((latest[1] / WORKERS).read_text()) != run.workers


def make_universal(folder: Path, tag: str) -> None:
    """DeepSpeed's Universal Checkpoint (Lian et al. 2024) of folder/tag beside it, where it is not there yet.

    It holds each parameter and its moments whole, so any number of workers can take their shards of it.
    """
    if (folder / UNIVERSAL).exists():
        return
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with folder_atomic(folder / UNIVERSAL) as temporary:
        given = {"input_folder": str(folder / tag), "output_folder": str(temporary), "inject_missing_state": True}
        ds_to_universal.main(argparse.Namespace(**given, **options))
    (folder / "latest_universal").write_text(UNIVERSAL)


def random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(run: Run, checkpoint: Path) -> None:
    """This rank's, as it was; where the checkpoint is of another number of workers, one that follows from the seed."""
    if is_resized(run):
        seed_everything(run.seed + int(checkpoint.name.removeprefix("step-")))
        return
    # weights_only would refuse numpy's and Python's states; the file is one that this run wrote.
    state = torch.load(checkpoint / f"random-{run.rank}.pt", weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every rank sees whole parameters also under ZeRO-3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=_is_sharded(model)):
        yield


def whole_parameters(model: torch.nn.Module, run: Run) -> dict[str, torch.Tensor]:
    """Every parameter by name, tied ones once, as rank 0 gets them in host memory; nothing for the others.

    All ranks call it.
    """
    with gathered(model):
        if run.rank:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def export(engine: Any, run: Run, tokenizer: Any, kind: str, **about: Any) -> None:
    """The engine's model as the stage's model folder, adapters merged; all ranks call it, rank 0 writes."""
    model = engine.module
    with gathered(model):
        if run.rank == 0:
            merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
            merged.config.use_cache = True

            def write(folder: Path) -> None:
                merged.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            save_model(run, write, kind, **about)
    barrier()


def _is_sharded(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
