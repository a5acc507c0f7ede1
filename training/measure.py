"""What is measured of one model: bits per byte, answers, log-probabilities, rewards.

Everything runs in fp32, without gradient, on the device it is given. Shapes as in ppo_models: B episodes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from serving.engine.api import Completion, SamplingParams
from serving.engine.torch_engine import TorchEngine
from serving.model_folder import load_causal_lm
from training import reward
from training.baselines import Ranker
from training.data.rankings import Ranking
from training.data.text import Document, PackedTokens, positions
from training.ppo_models import Episodes, RewardModel, load_scorer, logprobs
from training.stats import Estimate, ratio_and_stderr
from training.tokenizer import encode_completion, encode_prompt

BATCH = 32  # sequences per forward pass
PASS_TOKENS = 4096  # of text in a forward pass: their logits are what takes the memory
MAX_TOKENS = 65_536  # of held-out text: bits per byte to about 0.01, in seconds on two cores
Tokens = Sequence[Sequence[int]]


def load(folder: str, device: str) -> tuple[Any, Any]:
    """(model in fp32, tokenizer); raises ValueError where the folder holds no causal LM."""
    model, tokenizer = load_causal_lm(folder, torch.float32)
    return model.to(device), tokenizer


# ---- bits per byte


@torch.no_grad()
def bits_per_byte(model: Any, batches: Iterable[dict[str, torch.Tensor]], tokens_per_byte: float) -> Estimate:
    """Nats per token / ln 2 × tokens per byte; comparable between tokenizers. The error counts windows, not tokens.

    batches: `input_ids` and `position_ids` [B, T], which start again at every document.
    """
    nats: list[float] = []
    predicted: list[float] = []
    for batch in batches:
        ids, position_ids = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        # Without an attention mask and a cache, transformers keeps documents apart by the positions.
        logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[:, :-1].float()
        nats += F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1).tolist()
        predicted += [ids.shape[1] - 1.0] * len(ids)
    per_token = ratio_and_stderr(nats, predicted)
    scale = tokens_per_byte / math.log(2)
    return Estimate(per_token.mean * scale, per_token.stderr * scale, per_token.n)


def shard_batches(data: PackedTokens, seq_len: int) -> Iterator[dict[str, torch.Tensor]]:
    """Windows of a side of the shards, all of them or MAX_TOKENS' worth at even distances."""
    windows = min(len(data), max(1, MAX_TOKENS // seq_len))
    chosen = [i * len(data) // windows for i in range(windows)]
    rows = max(1, PASS_TOKENS // seq_len)
    for first in range(0, windows, rows):
        yield data.batch(chosen[first : first + rows])


def document_batches(ids: np.ndarray, bos: int, seq_len: int) -> Iterator[dict[str, torch.Tensor]]:
    """All windows of a stream of tokens, [N]; what does not fill one at the end makes a shorter one."""
    whole = len(ids) // seq_len * seq_len
    rows = max(1, PASS_TOKENS // seq_len)
    windows = [ids[:whole].reshape(-1, seq_len)[i : i + rows] for i in range(0, whole // seq_len, rows)]
    if len(ids) - whole > 1:
        windows.append(ids[None, whole:])
    for window in windows:
        yield {"input_ids": torch.from_numpy(window), "position_ids": torch.from_numpy(positions(window, bos))}


def token_stream(documents: Iterable[Document], tokenizer: Any, bos: int) -> np.ndarray:
    """Every document's tokens after a `bos`, [N]; special tokens written in a text are text."""
    encoded = (tokenizer(d.text, add_special_tokens=False, split_special_tokens=True).input_ids for d in documents)
    return np.array([token for ids in encoded for token in (bos, *ids)], np.int64)


# ---- answers


def generate(model: Any, tokenizer: Any, prompts: Tokens, params: Sequence[SamplingParams]) -> list[Completion]:
    """One completion for each prompt of token ids."""
    engine = TorchEngine(model, tokenizer, max_num_seqs=2 * BATCH)
    try:
        return engine.generate_all(prompts, params)
    finally:
        engine.close()


@torch.no_grad()
def completion_logprobs(model: Any, prompts: Tokens, completions: Tokens, temperature: float) -> list[float]:
    """log π(completion | prompt) at a temperature, summed over the tokens, the turn's end among them: [B]."""
    episodes = Episodes.of(prompts, completions, model.device)
    sums = torch.zeros(len(episodes), device=model.device)
    for rows in episodes.micro_batches(torch.arange(len(episodes), device=model.device), BATCH):
        part = episodes.pick(rows)
        sums[rows] = (logprobs(model, part, temperature) * part.mask).sum(1)
    return sums.tolist()


# ---- rewards


def reward_model(folder: str, device: str) -> RewardModel:
    """The learned reward as PPO has it: a callable on token ids, normalised by what the folder stores."""
    return RewardModel(load_scorer(folder, "the reward model").to(device), BATCH, nullcontext)


def reward_scores(model: RewardModel, tokenizer: Any, rankings: Sequence[Ranking]) -> list[list[float]]:
    """The reward of every completion of every ranking."""
    prompts = [encode_prompt(tokenizer, r.prompt) for r in rankings for _ in r.completions]
    completions = [encode_completion(tokenizer, text) for r in rankings for text in r.completions]
    scores = iter(model(prompts, completions).tolist())
    return [[next(scores) for _ in r.completions] for r in rankings]


def ranker_scores(ranker: Ranker, rankings: Sequence[Ranking]) -> list[list[float]]:
    """A baseline's score of every completion of every ranking."""
    return [[ranker(text) for text in ranking.completions] for ranking in rankings]


def pairs_right(scores: Sequence[Sequence[float]], rankings: Sequence[Ranking]) -> tuple[list[float], list[float]]:
    """For every ranking: how many of its pairs the scores order right (equal scores are half right), and all pairs."""
    counts = [reward.pairs_right(torch.tensor(s), r.ranks) for s, r in zip(scores, rankings, strict=True)]
    return [right for right, _ in counts], [float(pairs) for _, pairs in counts]
