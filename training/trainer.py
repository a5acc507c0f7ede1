"""What our TRL trainers share: arguments that run them on DeepSpeed, metrics, atomic checkpoints, resume."""

import os
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from deepspeed import DeepSpeedEngine
from peft import LoraConfig as PeftLoraConfig
from transformers import PrinterCallback, Trainer, TrainerCallback

from training import disks, notice, zero
from training.config import LoraConfig, TrainingConfig
from training.device import backend
from training.run import Run


def trainer_arguments(config: TrainingConfig, run: Run, num_train_epochs: float) -> dict[str, Any]:
    """Arguments with which a transformers trainer runs on DeepSpeed here, and nowhere silently without it.

    On CPU, `use_cpu=True` would give plain DDP without a word; a PartialState made beforehand gives DeepSpeed.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may run one stage after another
    PartialState(backend=backend(run.device))
    return {
        "output_dir": str(run.folder / "trainer"),  # where it writes what then becomes a checkpoint
        "num_train_epochs": num_train_epochs,
        "per_device_train_batch_size": config.micro_batch(run.workers),
        "per_device_eval_batch_size": config.micro_batch(run.workers),
        "gradient_accumulation_steps": config.gradient_accumulation_steps(run.workers),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_ratio,  # below 1: a part of all steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": False,  # DeepSpeed's torch_autocast does it
        "activation_checkpointing": config.gradient_checkpointing,
        "deepspeed": zero.deepspeed_config(config, run),
        "accelerator_config": {"use_configured_state": True},
        "dataloader_pin_memory": run.device == "cuda",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        "data_seed": run.seed,
    }


def peft_config(lora: LoraConfig | None, task_type: str, **extra: Any) -> PeftLoraConfig | None:
    if lora is None:
        return None
    return PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type=task_type, **extra
    )


def fit(trainer: Trainer, run: Run) -> None:
    """Train to the end, from the newest checkpoint where there is one."""
    latest = run.latest_checkpoint()
    run.rewind(latest[0] if latest else 0)
    if latest and zero.is_resized(run):
        disks.once_per_disk(run, lambda: zero.make_universal(latest[1], (latest[1] / "latest").read_text()))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RunCallback(trainer, run))
    trainer.train(resume_from_checkpoint=str(latest[1]) if latest else None)


class _RunCallback(TrainerCallback):
    """Carries the trainer's logs and checkpoints into the run folder."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._last: tuple[float, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine = self._trainer.model_wrapped
        assert isinstance(engine, DeepSpeedEngine), "the trainer runs without DeepSpeed"
        if engine.load_universal_checkpoint():  # which has happened by now
            zero.mend_universal(engine, (args.weight_decay, 0.0))  # transformers' two groups

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "eval_loss" in logs:
            self._run.log(state.global_step, state.max_steps, val_loss=float(logs["eval_loss"]))
        if not logs or "loss" not in logs:
            return
        kept = {k: float(v) for k, v in logs.items() if k not in ("epoch", "num_tokens", "total_flos")}
        rate = self._tokens_per_second(logs.get("num_tokens"))
        if rate:
            kept["tokens_per_second"] = rate
        self._run.log(state.global_step, state.max_steps, **kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Before the step's checkpoint: transformers' own evaluation of an epoch comes after it, and is lost by a kill.
        ends = state.epoch.is_integer() or state.global_step >= state.max_steps
        if self._trainer.eval_dataset is not None and ends:
            control.should_evaluate = True
        if zero.heard(self._run) != notice.NOTHING:
            control.should_save = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # transformers would: the model is exported now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers writes checkpoint-N in place; what it wrote whole becomes a checkpoint under our name."""
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        zero.adopt_checkpoint(self._run, state.global_step, written)

    def _tokens_per_second(self, tokens: float | None) -> float | None:
        now, before = time.perf_counter(), self._last
        self._last = (now, tokens) if tokens is not None else None
        return (tokens - before[1]) / (now - before[0]) if before and tokens is not None else None
