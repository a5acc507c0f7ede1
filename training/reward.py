"""Reward model: learn from ranked completions (Ouyang et al. 2022, eq. 1), through TRL's RewardTrainer.

TRL's trainer takes pairs. Ours gives it a whole ranking of K at once: K forward passes instead of K(K-1), and all pairs
of a prompt in one batch, as the paper has it. Leaves out: margins, more than one reward.
"""

import copy
import math
from collections.abc import Callable, Sequence
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
from training.run import Run, StageError
from training.tokenizer import encode_completion, encode_prompt
from training.trainer import fit, length_limit, peft_config, trainer_arguments

HELD_OUT = 0.1  # of the rankings, by prompt, beside the recipe's held-out conversations
CHANCE = 0.5


def run(config: RewardConfig, run: Run) -> None:
    """Rankings to a reward model whose folder stores the mean and deviation of its reward on held-out samples.

    Raises StageError where held-out accuracy stays at chance: PPO against such a reward cannot succeed.
    """
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    start = config.model or str(run.of("sft").model)
    tokenizer = AutoTokenizer.from_pretrained(start)
    padding = with_pad_of_its_own(tokenizer)
    max_length = length_limit(config.max_length, start)
    sources = config.rankings or [str(run.of("rank").folder / "rankings.jsonl")]
    training, held_out = split(read_rankings(sources), run.seed + 1, HELD_OUT)
    if not held_out:
        raise StageError(f"reward.rankings: {len(training)} rankings leave none to hold out; give more")
    trainer = RankingTrainer(
        model=load_reward_model(start, padding),
        args=TRLRewardConfig(
            **trainer_arguments(config, run, config.num_train_epochs),
            max_length=None,
            remove_unused_columns=False,
        ),
        data_collator=RankingCollator(padding.pad_token_id),
        train_dataset=tokenize(training, tokenizer, max_length, run.note),
        processing_class=padding,
        peft_config=peft_config(config.lora, "SEQ_CLS", modules_to_save=["score"]),
    )
    fit(trainer, run)

    rows = tokenize(held_out, tokenizer, max_length)
    scores = [trainer.score(row["completions"]) for row in rows]
    accuracy = pair_accuracy(scores, [row["ranking"] for row in rows])
    flat = torch.cat(scores)
    step = trainer.state.max_steps
    about = {"reward_mean": flat.mean().item(), "reward_std": flat.std().item(), "accuracy": accuracy}
    run.log(step, step, **{f"val_{name}": value for name, value in about.items()})
    pairs = sum(len(r) * (len(r) - 1) // 2 for r in (row["ranking"] for row in rows))
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
    model = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype="float32", use_safetensors=True, pad_token_id=tokenizer.pad_token_id
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


def pair_accuracy(scores: Sequence[torch.Tensor], rankings: Sequence[Sequence[int]]) -> float:
    """The part of all pairs that are not tied in their ranking which the scores put in the same order."""
    right = total = 0.0
    for score, ranking in zip(scores, rankings, strict=True):
        ranks = torch.tensor(ranking, device=score.device)
        better = ranks[:, None] < ranks[None, :]
        margins = (score[:, None] - score[None, :])[better]
        right += (margins > 0).sum().item() + 0.5 * (margins == 0).sum().item()
        total += margins.numel()
    return right / total


# ---- data


def tokenize(
    rankings: Sequence[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    say: Callable[[str], None] = print,
) -> Dataset:
    """`completions` ([K] lists of prompt and completion ids) and `ranking` ([K]) of every ranking that has an order.

    Completions that do not fit `max_length` leave their ranking. Raises StageError where no ranking is left.
    """
    rows = []
    for r in rankings:
        prompt = encode_prompt(tokenizer, r.prompt)
        ids = [prompt + encode_completion(tokenizer, completion) for completion in r.completions]
        kept = [(c, rank) for c, rank in zip(ids, r.ranks, strict=True) if len(c) <= max_length]
        if len({rank for _, rank in kept}) > 1:
            rows.append({"completions": [c for c, _ in kept], "ranking": [rank for _, rank in kept]})
    if not rows:
        raise StageError(f"reward.max_length={max_length}: none of {len(rankings)} rankings has a pair that fits")
    say(f"{len(rows)} of {len(rankings)} rankings have an order that fits {max_length} tokens")
    return Dataset.from_list(rows)


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
            accuracy = pair_accuracy([scores[g] for g in groups], [inputs["ranking"][g].tolist() for g in groups])
        self._metrics["train"]["accuracy"].append(accuracy)
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
