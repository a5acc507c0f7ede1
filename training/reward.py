"""Reward model: learn from ranked completions (Ouyang et al. 2022, eq. 1), through TRL's RewardTrainer.

TRL's trainer takes pairs. Ours gives it a whole ranking of K at once: K forward passes instead of K(K-1), and all pairs
of a prompt in one batch, as the paper has it. Leaves out: margins, more than one reward.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer

from training import zero
from training.config import RewardConfig
from training.data.rankings import Ranking, read_rankings
from training.data.split import split
from training.pretrained import length_limit, pretrained
from training.run import Run, StageError
from training.tokenizer import encode_completion, encode_prompt
from training.trainer import fit, peft_config, trainer_arguments

HELD_OUT = 0.1  # of the rankings, by prompt, beside the recipe's held-out conversations
CHANCE = 0.5


def run(config: RewardConfig, run: Run) -> None:
    """Rankings to a reward model whose folder stores the mean and deviation of its reward on held-out samples.

    Raises StageError where held-out accuracy stays at chance: PPO against such a reward cannot succeed.
    """
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    start = config.model or str(run.of("sft").model)
    tokenizer = pretrained(AutoTokenizer, "reward.model", start)
    padding = with_pad_of_its_own(tokenizer)
    max_length = length_limit(config.max_length, "reward.model", start)
    sources = config.rankings or [str(run.of("rank").folder / "rankings.jsonl")]
    training, held_out = split(read_rankings(sources), run.seed + 1, HELD_OUT)
    kept, kept_out = fitting(training, tokenizer, max_length), fitting(held_out, tokenizer, max_length)
    run.note(f"{len(kept)} of {len(training)} rankings have an order that fits {max_length} tokens")
    for name, some, of in (("learn from", kept, training), ("hold out", kept_out, held_out)):
        if not some:
            raise StageError(
                f"reward.rankings: none to {name}: of {len(of)} none has a pair that fits max_length={max_length}; "
                "give more, or raise reward.max_length"
            )
    trainer = RankingTrainer(
        model=load_reward_model(start, padding),
        args=TRLRewardConfig(
            **trainer_arguments(config, run, config.num_train_epochs),
            max_length=None,
            remove_unused_columns=False,
        ),
        data_collator=RankingCollator(padding.pad_token_id),
        train_dataset=Dataset.from_list(tokenize(kept, tokenizer)),
        processing_class=padding,
        peft_config=peft_config(config.lora, "SEQ_CLS", modules_to_save=["score"]),
    )
    fit(trainer, run)

    rows = tokenize(kept_out, tokenizer)
    scores = [trainer.score(row["completions"]) for row in rows]
    counts = [pairs_right(score, row["ranking"]) for score, row in zip(scores, rows, strict=True)]
    right, pairs = (sum(column) for column in zip(*counts, strict=True))
    accuracy = right / pairs
    flat = torch.cat(scores)
    step = trainer.state.max_steps
    about = {"reward_mean": flat.mean().item(), "reward_std": flat.std().item(), "accuracy": accuracy}
    run.log(step, step, **{f"val_{name}": value for name, value in about.items()})
    if accuracy <= CHANCE + 2 * math.sqrt(CHANCE * (1 - CHANCE) / pairs):
        raise StageError(
            f"reward: {accuracy:.2f} of {pairs} held-out pairs are ordered right, which may be chance: give more "
            f"rankings ({len(training)} were learnt from), or raise num_train_epochs or learning_rate"
        )
    zero.export(trainer.model_wrapped, run, tokenizer, kind="reward", **about)


def with_pad_of_its_own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or where its pad is none or ends a turn, a copy that pads with another token of its vocabulary.

    transformers' models read their score at the last token that is no pad, which must be the one that ends the turn, as
    PPO has it. The copy is for padding alone: what it takes for special is cut out of texts.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    others = (tokenizer.unk_token, tokenizer.bos_token, *tokenizer.convert_ids_to_tokens([0, 1]))
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = next(token for token in others if token and token != tokenizer.eos_token)
    return padding


def load_reward_model(start: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model with a head of zeros in place of the vocabulary's: every reward is 0, every pair's loss ln 2."""
    model = pretrained(
        AutoModelForSequenceClassification,
        "reward.model",
        start,
        num_labels=1,
        dtype="float32",
        use_safetensors=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not _is_reward_model(start):
        torch.nn.init.zeros_(model.score.weight)
    return model


# ---- maths


def ranking_loss(scores: torch.Tensor, ranking: torch.Tensor) -> torch.Tensor:
    """-1/P Σ log σ(r_better − r_worse) over the P pairs of one ranking that are not tied (Ouyang et al. 2022, eq. 1).

    scores: [K]; ranking: [K] ranks, 1 best. Returns a scalar.
    """
    better = ranking[:, None] < ranking[None, :]
    margins = scores[:, None] - scores[None, :]
    return -F.logsigmoid(margins[better]).mean()


def pairs_right(scores: torch.Tensor, ranking: Sequence[int]) -> tuple[float, int]:
    """Of the pairs of one ranking that are not tied: how many the scores order right, equal scores half, and how many
    there are.

    scores: [K]; ranking: K ranks, 1 best.
    """
    ranks = torch.tensor(ranking, device=scores.device)
    margins = (scores[:, None] - scores[None, :])[ranks[:, None] < ranks[None, :]]
    return (margins > 0).sum().item() + 0.5 * (margins == 0).sum().item(), margins.numel()


# ---- data


def fitting(rankings: Iterable[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Ranking]:
    """Rankings without the completions that are too long for the reward model; those left without a pair drop out."""
    kept = []
    for ranking in rankings:
        prompt = len(encode_prompt(tokenizer, ranking.prompt))
        fits = [prompt + len(encode_completion(tokenizer, text)) <= max_length for text in ranking.completions]
        texts = [text for text, fit in zip(ranking.completions, fits, strict=True) if fit]
        ranks = [rank for rank, fit in zip(ranking.ranks, fits, strict=True) if fit]
        if len(set(ranks)) > 1:
            kept.append(replace(ranking, completions=texts, ranks=ranks))
    return kept


def tokenize(rankings: Iterable[Ranking], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """`completions` ([K] lists of prompt and completion ids) and `ranking` ([K]) of every ranking."""
    rows = []
    for r in rankings:
        prompt = encode_prompt(tokenizer, r.prompt)
        completions = [prompt + encode_completion(tokenizer, text) for text in r.completions]
        rows.append({"completions": completions, "ranking": r.ranks})
    return rows


class RankingCollator:
    """Rankings of one batch, completions stacked: `input_ids`, `attention_mask` [N, T], `ranking`, `group` [N]."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [torch.tensor(ids) for row in rows for ids in row["completions"]]
        lengths = torch.tensor([len(ids) for ids in sequences])
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self._pad)
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long(),
            "ranking": torch.tensor([rank for row in rows for rank in row["ranking"]]),
            "group": torch.tensor([i for i, row in enumerate(rows) for _ in row["ranking"]]),
        }


# ---- trainer


class RankingTrainer(RewardTrainer):
    """TRL's RewardTrainer on whole rankings."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].float()
        groups = [inputs["group"] == g for g in inputs["group"].unique()]
        loss = torch.stack([ranking_loss(scores[g], inputs["ranking"][g]) for g in groups]).mean()
        with torch.no_grad():
            counts = [pairs_right(scores[g], inputs["ranking"][g].tolist()) for g in groups]
        right, pairs = (sum(column) for column in zip(*counts, strict=True))
        self._metrics["train"]["accuracy"].append(right / pairs)
        self._metrics["train"]["mean_reward"].append(scores.mean().item())
        return (loss, {"rewards": scores}) if return_outputs else loss

    @torch.no_grad()
    def score(self, completions: list[list[int]]) -> torch.Tensor:
        """Rewards [K] of K prompt-and-completion ids."""
        engine: Any = self.model_wrapped
        engine.eval()
        batch = self.data_collator([{"completions": completions, "ranking": [1] * len(completions)}])
        inputs = {name: batch[name].to(engine.device) for name in ("input_ids", "attention_mask")}
        return engine(**inputs).logits[:, 0].float().cpu()


def _is_reward_model(start: str) -> bool:
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(start).architectures or []
    return any("SequenceClassification" in name for name in names)
