"""How the learning rate of every loop of ours rises and falls; SFT and the reward model have transformers' own."""

import math
from collections.abc import Callable
from typing import Literal

Kind = Literal["constant", "cosine", "wsd", "inverse_sqrt"]


def schedule(
    kind: Kind, steps: int, warmup_ratio: float, min_lr_ratio: float = 0.0, decay_ratio: float = 0.0
) -> Callable[[int], float]:
    """The peak rate's factor at optimiser step 0, 1, ...: up in a line over a part of `steps`, then as `kind` says.

    - constant: 1.
    - cosine: down to min_lr_ratio (Loshchilov & Hutter 2017, eq. 5).
    - wsd: 1 until the last decay_ratio of the steps, then down in a line (Hu et al. 2024, MiniCPM, section 4).
    - inverse_sqrt: √(warm-up/step), which goes on for ever (Vaswani et al. 2017, eq. 3, scaled to 1 at its peak).
    """
    warmup = math.ceil(round(warmup_ratio * steps, 6))  # 0.07 × 100 is a little more than 7

    def after_warmup(progress: float) -> float:
        if kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return min(1.0, (1.0 - progress) / decay_ratio) if kind == "wsd" and decay_ratio else 1.0

    def multiplier(step: int) -> float:
        if kind == "inverse_sqrt":
            taken, peak = step + 1, max(1, warmup)
            return min(taken / peak, math.sqrt(peak / taken))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = after_warmup(min(1.0, (step - warmup) / max(1, steps - warmup)))
        return min_lr_ratio + (1.0 - min_lr_ratio) * left

    return multiplier
