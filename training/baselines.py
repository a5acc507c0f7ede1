"""What a reward model must beat on held-out rankings: rankers that understand nothing.

`longer_wins` knows lengths alone; `BagOfWords` knows which words the better completions had, and neither the prompt nor
the order of words.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from training.data.rankings import Ranking

Ranker = Callable[[str], float]  # completion → score, higher is better

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
MAX_WORDS = 20_000


def longer_wins(completion: str) -> float:
    """The number of characters."""
    return float(len(completion))


class BagOfWords:
    """A weight for every word and punctuation mark; a completion's score is the sum of its words' weights."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def __call__(self, completion: str) -> float:
        return sum(self.weights.get(word, 0.0) for word in words(completion))


def fit_bag_of_words(rankings: Sequence[Ranking], penalty: float = 1.0) -> BagOfWords:
    """Logistic regression on the differences of word counts (Bradley & Terry 1952 with linear scores).

    Minimises Σ −log σ(w·(x_better − x_worse)) + penalty/2 · |w|² over all pairs; convex, so L-BFGS finds the minimum.
    """
    texts = [completion for ranking in rankings for completion in ranking.completions]
    vocabulary = {word: i for i, (word, _) in enumerate(_counts(texts).most_common(MAX_WORDS))}
    better, worse = _pair_indices(rankings)
    ids = [[vocabulary[word] for word in words(text) if word in vocabulary] for text in texts]
    flat = torch.tensor([i for row in ids for i in row], dtype=torch.long)
    starts = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)[:-1]
    weights = torch.zeros(max(1, len(vocabulary)), 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = F.embedding_bag(flat, weights, starts, mode="sum")[:, 0]
        value = -F.logsigmoid(scores[better] - scores[worse]).sum() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return BagOfWords(dict(zip(vocabulary, weights[:, 0].tolist(), strict=False)))


def words(text: str) -> list[str]:
    """Lower-case words, and punctuation marks one by one."""
    return _WORD.findall(text.casefold())


def _counts(texts: Sequence[str]) -> Counter[str]:
    return Counter(word for text in texts for word in words(text))


def _pair_indices(rankings: Sequence[Ranking]) -> tuple[list[int], list[int]]:
    """For every pair that is not tied, the places of the better and the worse one among all completions."""
    better, worse, offset = [], [], 0
    for ranking in rankings:
        k = len(ranking.ranks)
        for i, j in ((i, j) for i in range(k) for j in range(k) if ranking.ranks[i] < ranking.ranks[j]):
            better.append(offset + i)
            worse.append(offset + j)
        offset += k
    return better, worse
