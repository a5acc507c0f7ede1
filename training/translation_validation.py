"""Validation of a translation model in training: early stopping on chrF, and averaging of weights.

Held-out sources are translated exactly as the service would, from a model folder. What is exported is the mean of the
last validations' weights up to the best one (Vaswani et al. 2017, 6.1).
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training import zero
from training.config import TranslationConfig
from training.data.pairs import Pair
from training.measure_translation import chrf, translated
from training.run import Run, file_atomic, save_model

Weights = dict[str, torch.Tensor]  # parameters by name


@dataclass(frozen=True)
class HeldOut:
    """What rank 0 validates with."""

    pairs: list[Pair]
    source_script: str


class Validation:
    """Rank 0's copy of the model: it is given the weights of a step, translates, and keeps the mean of the best.

    Beside the checkpoints, `averages/step-N` has the weights of the validation at step N. If it was the best so far,
    `averages/best-N` has the mean of the last `average_last`, or N's own where these translate better. What a restart
    from the newest checkpoint needs is kept. Every rank calls every method; the others only give what they hold of the
    weights.
    """

    def __init__(
        self, config: TranslationConfig, run: Run, tokenizer: Any, eval_model: Any, held_out: HeldOut | None
    ) -> None:
        """`eval_model`, a second copy of the model, and `held_out` are rank 0's."""
        self._config, self._run, self._tokenizer = config, run, tokenizer
        self._eval_model, self._held_out = eval_model, held_out
        self._folder = run.checkpoints / "averages"
        self._scores: dict[int, float] = {}  # step → chrF

    def rewind(self, step: int) -> None:
        """Forgets the validations after `step`."""
        logged = {line["step"]: line["val_chrf"] for line in self._run.metrics() if "val_chrf" in line}
        self._scores = {at: score for at, score in logged.items() if at <= step}
        if self._run.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if path.suffix == ".tmp" or _step_of(path) > step:  # a kill left the first
                    path.unlink()
        zero.barrier()

    @property
    def _best(self) -> int:
        """The step of the highest chrF, the first of equals."""
        return max(self._scores, key=lambda step: (self._scores[step], -step))

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` validations brought nothing better."""
        return bool(self._scores) and sum(step > self._best for step in self._scores) >= self._config.patience

    def measure(self, engine: Any, step: int) -> float:
        """chrF of the validation side, decoded greedily."""
        weights = zero.whole_parameters(engine.module, self._run)
        score = 0.0
        if self._run.rank == 0:
            _save(weights, self._folder / f"step-{step:08d}.safetensors")
            score = self._score(weights)
        self._scores[step] = zero.sum_over_workers([score])[0]
        if self._run.rank == 0:
            if self._best == step:
                _save(self._better(weights, score), self._folder / f"best-{step:08d}.safetensors")
            self._prune()
        zero.barrier()
        return self._scores[step]

    def _better(self, weights: Weights, score: float) -> Weights:
        """The mean of the last validations where it translates at least as well as the newest, which has `score`."""
        window = sorted(self._folder.glob("step-*.safetensors"))[-self._config.average_last :]
        mean = mean_of([load_file(path) for path in window])
        return mean if len(window) > 1 and self._score(mean) >= score else weights

    def _prune(self) -> None:
        """Deletes what neither this run nor a restart from its newest checkpoint will read."""
        latest = self._run.latest_checkpoint()
        for prefix, kept in (("step", self._config.average_last), ("best", 1)):
            paths = sorted(self._folder.glob(f"{prefix}-*.safetensors"))
            for path in [path for path in paths if _step_of(path) <= (latest[0] if latest else 0)][:-kept]:
                path.unlink()

    def export(self) -> None:
        """The stage's model folder, from the best weights; logs their chrF."""
        if self._held_out:
            weights = load_file(sorted(self._folder.glob("best-*.safetensors"))[-1])
            about = dict(zip(("source_language", "target_language"), self._languages, strict=True))
            about["source_script"] = self._held_out.source_script
            step = max(self._scores)
            self._run.log(step, step, val_chrf_exported=self._score(weights))
            save_model(self._run, lambda folder: self._write(weights, folder), "translation", **about)
        zero.barrier()

    @property
    def _languages(self) -> tuple[str, str]:
        return self._config.source_language, self._config.target_language

    def _score(self, weights: Weights) -> float:
        assert self._held_out
        pairs, folder = self._held_out.pairs, self._run.checkpoints / "validated"
        self._write(weights, folder)
        made = translated(folder, [pair.source for pair in pairs], self._languages, self._run.device, num_beams=1)
        shutil.rmtree(folder)
        return chrf(made, [pair.target for pair in pairs])

    def _write(self, weights: Weights, folder: Path) -> None:
        """A model folder of these weights, adapters merged."""
        with torch.no_grad():
            for name, parameter in self._eval_model.named_parameters():
                parameter.copy_(weights[name])
        adapted = hasattr(self._eval_model, "merge_and_unload")
        model = copy.deepcopy(self._eval_model).merge_and_unload() if adapted else self._eval_model
        model.config.use_cache = True
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


def mean_of(states: Sequence[Weights]) -> Weights:
    """The elementwise mean of several models' weights."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def _step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _save(weights: Weights, path: Path) -> None:
    """Whole or not at all."""
    with file_atomic(path) as temporary:
        save_file(weights, temporary)
