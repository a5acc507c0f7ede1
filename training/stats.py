"""The statistics of an evaluation, as pure functions of numbers and texts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Numbers = Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent things (prompts, rankings, windows), and how far chance alone may have moved it."""

    mean: float
    stderr: float
    n: int

    def exceeds(self, bound: float, stderrs: float = 2.0) -> bool:
        """Whether it lies above `bound` by more than `stderrs` standard errors: 2 leave chance about 2 %."""
        return self.mean - stderrs * self.stderr > bound


def mean_and_stderr(values: Numbers) -> Estimate:
    """The mean, and the sample's deviation / √n; one value alone has an unknown (infinite) error."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.inf, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def paired_difference(after: Numbers, before: Numbers) -> Estimate:
    """The mean of `after[i] − before[i]`: what is the same in both (the prompt, the seed) leaves no error behind."""
    return mean_and_stderr([a - b for a, b in zip(after, before, strict=True)])


def ratio_and_stderr(parts: Numbers, wholes: Numbers) -> Estimate:
    """Σ parts / Σ wholes over groups whose members are not independent (pairs of a ranking, tokens of a window).

    The error is that of the ratio estimator, by the residuals of whole groups (Cochran 1977, 2.11 and 6.4).
    """
    n, whole = len(parts), math.fsum(wholes)
    ratio = math.fsum(parts) / whole
    if n < 2:
        return Estimate(ratio, math.inf, n)
    residuals = math.fsum((p - ratio * w) ** 2 for p, w in zip(parts, wholes, strict=True))
    return Estimate(ratio, math.sqrt(residuals * n / (n - 1)) / whole, n)


def pearson(x: Numbers, y: Numbers) -> float:
    """Linear correlation, between −1 and 1; 0 where one side does not vary."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [value - mean_x for value in x], [value - mean_y for value in y]
    spread = math.sqrt(math.fsum(d * d for d in dx) * math.fsum(d * d for d in dy))
    return math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / spread if spread else 0.0


def spearman(x: Numbers, y: Numbers) -> float:
    """Correlation of the ranks: whether y rises with x, whatever the curve."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Numbers) -> list[float]:
    """1 for the smallest; equal values share the mean of their places."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            out[index] = (start + 1 + end) / 2
        start = end
    return out


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words, in all texts together (Li et al. 2016).

    It falls where a model says the same things; it also falls with more text, so compare like with like.
    """
    words = [text.casefold().split() for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def most_frequent(texts: Sequence[str]) -> tuple[str, float]:
    """The text that occurs most often, and its share of all; of equals the first."""
    text, count = Counter(texts).most_common(1)[0]
    return text, count / len(texts)
