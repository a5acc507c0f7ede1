"""Prompts to what the denoiser looks at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.image.components import Components


@dataclass(frozen=True)
class Encoded:
    """Texts as the text encoder sees them, each padded to the same length."""

    states: Tensor  # [texts, tokens, width] in the text encoder's dtype
    mask: Tensor | None  # [texts, tokens], 0 where padding is; None for a unet, which looks at all

    def keep(self, rows: Tensor) -> "Encoded":
        return Encoded(self.states[rows], None if self.mask is None else self.mask[rows])


def encode(components: Components, texts: Sequence[str]) -> Encoded:
    """The texts in order. Each different one is encoded once and alone: what it becomes depends on no other."""
    known = {text: _encode(components, text) for text in dict.fromkeys(texts)}
    states = torch.cat([known[text][0] for text in texts])
    return Encoded(states, None if components.is_unet else torch.cat([known[text][1] for text in texts]))


def _encode(components: Components, text: str) -> tuple[Tensor, Tensor]:
    """States [1, tokens, width] and mask [1, tokens], as the family's own pipeline makes them."""
    tokens = components.tokenizer(
        text if components.is_unet else text.lower().strip(),
        padding="max_length", max_length=components.prompt_tokens, truncation=True, return_tensors="pt",
    )  # fmt: skip
    mask = tokens.attention_mask.to(components.device)
    # Stable Diffusion's text encoders see the padding too, those excepted whose config says otherwise.
    masked = not components.is_unet or getattr(components.text_encoder.config, "use_attention_mask", False)
    ids = tokens.input_ids.to(components.device)
    return components.text_encoder(ids, attention_mask=mask if masked else None)[0], mask
