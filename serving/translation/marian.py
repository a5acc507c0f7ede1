"""The fast path for Marian: the decoder's weights in the form that decodes fastest, and caches that no beam copies.

At these widths a step of transformers' module spends more time between the matrix products than in them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from serving.engine.linear import linear

_GRAIN = 16  # steps by which the cache grows


class MarianWeights:
    """The decoder of a MarianMTModel, packed once for all batches."""

    def __init__(self, model: Any) -> None:
        decoder = model.model.decoder
        self.encoder = model.get_encoder()
        self.heads: int = model.config.decoder_attention_heads
        self.layers = [MarianLayer(layer, model.config.activation_function) for layer in decoder.layers]
        self.head = linear(model.lm_head.weight, model.final_logits_bias[0].to(model.dtype))
        self._embedding, self._positions = decoder.embed_tokens.weight.detach(), decoder.embed_positions.weight.detach()
        self._scale: float = decoder.embed_scale

    def embed(self, tokens: Tensor, position: int) -> Tensor:
        """tokens [rows] at one position to [rows, width]."""
        return F.embedding(tokens, self._embedding) * self._scale + self._positions[position]

    def forward(self, sources: Tensor, mask: Tensor, beams: int) -> "MarianForward":
        """Starts a batch, as `TransformersForward` does."""
        return MarianForward(self, sources, mask, beams)


class MarianLayer:
    """Self-attention, attention to the source and MLP, with a layer norm behind each (Vaswani et al. 2017)."""

    def __init__(self, layer: Any, activation: str) -> None:
        own, cross = layer.self_attn, layer.encoder_attn
        self.scale: float = own.scaling
        self.qkv = _stacked(own.q_proj, own.k_proj, own.v_proj)
        self.source_keys_values = _stacked(cross.k_proj, cross.v_proj)
        self.source_query = _stacked(cross.q_proj)
        self._out, self._source_out = _stacked(own.out_proj), _stacked(cross.out_proj)
        self._up, self._down = _stacked(layer.fc1), _stacked(layer.fc2)
        self._activation = ACT2FN[activation]
        self._norms = [layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm]

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        return _norm(self._out.plus(attended, x), self._norms[0])

    def after_source(self, x: Tensor, attended: Tensor) -> Tensor:
        x = _norm(self._source_out.plus(attended, x), self._norms[1])
        return _norm(self._down.plus(self._activation(self._up(x)), x), self._norms[2])


class MarianForward:
    """One batch. Rows as in `search`; every attention is one product for each sentence and head.

    A row's keys and values stay where they were written when beams change: a mask says which of its sentence's entries
    are a beam's own past. So a step copies none of them, and the source's keys and values are there once a sentence.
    """

    def __init__(self, weights: MarianWeights, sources: Tensor, mask: Tensor, beams: int) -> None:
        """Encodes `sources` [sentences, tokens], of which `mask` marks the tokens that are no padding."""
        self._weights, self._beams, self._length = weights, beams, 0
        encoded = weights.encoder(input_ids=sources, attention_mask=mask).last_hidden_state
        self._source_mask = _float_mask(mask.bool(), encoded.dtype)[:, None, None]  # [sentences, 1, 1, tokens]
        self._source = [_heads(layer.source_keys_values(encoded), weights.heads, 2) for layer in weights.layers]
        # One per layer, [keys and values, sentences, heads, capacity · beams, dim]; entry t · beams + b is beam b's of
        # step t. Zeros, since a masked weight of 0 times what was never written must be 0 and not NaN.
        shape = (2, len(sources), weights.heads, 0, encoded.shape[2] // weights.heads)
        self._past = [encoded.new_zeros(shape) for _ in weights.layers]
        self._own = encoded.new_zeros(len(sources), beams, 0, dtype=torch.bool)  # [sentences, beams, entries]

    def logits(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        if self._length * self._beams == self._own.shape[2]:
            self._grow()
        self._trace(parents)
        weights, sentences = self._weights, len(tokens)
        mask = _float_mask(self._own, self._past[0].dtype)[:, None]
        x = weights.embed(tokens.flatten(), self._length)
        for layer, past, source in zip(weights.layers, self._past, self._source, strict=True):
            queries, keys, values = _heads(layer.qkv(x).view(sentences, self._beams, -1), weights.heads, 3)
            now = slice(self._length * self._beams, (self._length + 1) * self._beams)
            past[0, :, :, now], past[1, :, :, now] = keys, values
            x = layer.after_self(x, _attended(queries, past, mask, layer.scale))
            (queries,) = _heads(layer.source_query(x).view(sentences, self._beams, -1), weights.heads, 1)
            x = layer.after_source(x, _attended(queries, source, self._source_mask, layer.scale))
        self._length += 1
        return weights.head(x)

    def keep(self, sentences: Tensor) -> None:
        self._source_mask, self._own = self._source_mask[sentences], self._own[sentences]
        self._source = [source[:, sentences] for source in self._source]
        self._past = [past[:, sentences] for past in self._past]

    def _trace(self, parents: Tensor | None) -> None:
        """Every beam's past is its parent's, and its own entry of this step."""
        if parents is not None:
            self._own = self._own[torch.arange(len(parents), device=parents.device)[:, None], parents]
        for beam in range(self._beams):
            self._own[:, beam, self._length * self._beams + beam] = True

    def _grow(self) -> None:
        more = max(_GRAIN, self._length // 4) * self._beams
        self._past = [F.pad(past, (0, 0, 0, more)) for past in self._past]
        self._own = F.pad(self._own, (0, more))


def _stacked(*modules: nn.Linear) -> Any:
    """Layers of the same input as one."""
    return linear(torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules]))


def _heads(x: Tensor, heads: int, parts: int) -> Tensor:
    """x [sentences, n, parts · width] to [parts, sentences, heads, n, dim], contiguous."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()


def _attended(queries: Tensor, keys_values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention [sentences · beams, width] of queries [sentences, heads, beams, dim]; the mask is added to the scores.

    Written out, which is faster here than `scaled_dot_product_attention`.
    """
    keys, values = keys_values.flatten(1, 2)
    sentences, heads, beams, _ = queries.shape
    scores = torch.bmm(queries.flatten(0, 1), keys.transpose(1, 2)).view(sentences, heads, beams, -1)
    weights = scores.mul_(scale).add_(mask).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), values).view(queries.shape).transpose(1, 2).reshape(sentences * beams, -1)


def _float_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
