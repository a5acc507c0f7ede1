"""Steps to logits: the fast path for the families of `blocks`, and transformers' own cache for any other model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, LlamaForCausalLM

from serving.engine.blocks import Family, Gpt2Family, LlamaFamily
from serving.engine.kv_cache import KVCache
from serving.engine.scheduler import PromptChunk, Request, Step

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    def logits(self, step: Step) -> Tensor:
        """Logits [len(step.sampled), vocab] of the next tokens, in the model's dtype."""
        ...

    def update_weights(self) -> None:
        """Takes over the model's parameters as they are now. No sequence may be running."""
        ...


FamilyClass = Callable[[Any, int], Family]


def make_decoder(model: Any, slots: int, max_len: int) -> Decoder:
    """The fast path where the architecture has one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = _fast_family(inner)
    if family is not None:
        return FastDecoder(family, inner, slots, max_len)
    logger.warning(
        "%s has no fast path (GPT-2 and Llama have): serving it through the transformers cache, one sequence at a time",
        type(inner).__name__,
    )
    return TransformersDecoder(model)


def _fast_family(model: Any) -> FamilyClass | None:
    config = model.config
    if type(model) is LlamaForCausalLM:
        # The other kinds of rope change their frequencies with the length of the sequence.
        static_rope = config.rope_parameters["rope_type"] in ("default", "linear", "llama3", "yarn")
        return LlamaFamily if static_rope and config.hidden_act == "silu" else None
    if type(model) is GPT2LMHeadModel:
        plain = config.activation_function in ("gelu_new", "gelu_pytorch_tanh") and not config.add_cross_attention
        return Gpt2Family if plain else None
    return None


@dataclass(frozen=True)
class _Span:
    """A prompt chunk's rows."""

    slot: int
    rows: slice
    length: int  # of the sequence with this chunk
    mask: Tensor | None  # [rows, length]; None for a prompt's first chunk, which is plainly causal


@dataclass(frozen=True)
class _Rows:
    """The rows of one step: row i < decode is the next token of slot i, then come the chunks."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    addresses: Tensor  # of their keys and values in the cache
    decode: int
    mask: Tensor  # [decode · kv heads, 1, length], 0 or -inf
    spans: list[_Span]
    sampled: Tensor  # rows whose logits are wanted


class FastDecoder:
    """All sequences of a step in one pass over preallocated keys and values."""

    def __init__(self, family: FamilyClass, model: Any, slots: int, max_len: int) -> None:
        self._read_weights = lambda: family(model, max_len)
        self.update_weights()
        like = model.get_input_embeddings().weight
        self._device, self._dtype, self._heads = like.device, like.dtype, self._family.heads
        shape = (len(self._family.blocks), self._heads.kv, self._heads.dim)
        self.cache = KVCache(shape, slots, max_len, self._dtype, self._device)

    @torch.no_grad()
    def update_weights(self) -> None:
        self._family = self._read_weights()

    def logits(self, step: Step) -> Tensor:
        self.cache.fit(step.longest)
        for request, source in step.moves:
            self.cache.move(source, request.slot, request.cached)
        rows, family = self._rows(step), self._family
        angles = family.angles(rows.positions)
        x = family.embed(rows.tokens, rows.positions)
        for layer, block in enumerate(family.blocks):
            projected = block.project(x, angles)
            self.cache.write(layer, rows.addresses, projected[:, self._heads.queries :])
            x = block.mix(x, self._attend(layer, block.scale, projected, rows))
        if not step.sampled:
            return x[:0]
        return family.head(family.norm(x[rows.sampled]))[: len(step.sampled)]

    def _attend(self, layer: int, scale: float, projected: Tensor, rows: _Rows) -> Tensor:
        """Every row's attention [rows, queries · dim] over its own sequence."""
        parts = [self._attend_decoding(layer, scale, projected, rows)] if rows.decode else []
        parts += [self._attend_span(layer, scale, projected, span) for span in rows.spans]
        unattended = len(projected) - rows.decode - sum(span.rows.stop - span.rows.start for span in rows.spans)
        if unattended:
            parts.append(projected.new_zeros(unattended, self._heads.queries * self._heads.dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decoding(self, layer: int, scale: float, projected: Tensor, rows: _Rows) -> Tensor:
        """One query row per slot; the queries that share a key head are the rows of one small matrix.

        Written out: on a CPU these products give a row the same bits whatever the padding and the neighbours, which
        `scaled_dot_product_attention` does not in float32, and are up to twice as fast.
        """
        heads, n = self._heads, rows.decode
        keys, values = self.cache.read(layer, n)
        queries = projected[:n, : heads.queries].reshape(n * heads.kv, -1, heads.dim)
        scores = torch.baddbmm(rows.mask, queries, keys.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(-1), values).view(n, -1)

    def _attend_span(self, layer: int, scale: float, projected: Tensor, span: _Span) -> Tensor:
        heads = self._heads
        chunk = projected[span.rows].transpose(0, 1)
        queries, keys, values = chunk.split((heads.queries, heads.kv, heads.kv))
        if span.mask is not None:
            keys, values = self.cache.read_slot(layer, span.slot, span.length)
        attended = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None],
            attn_mask=span.mask, is_causal=span.mask is None, scale=scale, enable_gqa=heads.queries != heads.kv,
        )  # fmt: skip
        return attended[0].transpose(0, 1).flatten(1)

    def _rows(self, step: Step) -> _Rows:
        """Lays out the step. Slots that do not decode and padding are rows of token 0 that write to the spare slot."""
        slots = 1 + max((s.slot for s in step.decoding), default=-1)
        # Never a single row, see `linear`.
        slots = max(slots, 2) if step.decoding else slots
        table = [(0, 0, self.cache.spare_slot)] * slots  # token, position, slot written to
        for s in step.decoding:
            table[s.slot] = (s.tokens[-1], s.cached, s.slot)
        sampled, spans = [s.slot for s in step.decoding], []
        for chunk in step.chunks:
            s, first = chunk.request, len(table)
            table += [(s.tokens[i], i, s.slot) for i in range(chunk.start, chunk.stop)]
            spans.append(self._span(chunk, first))
            if chunk.ends_prompt:
                sampled.append(len(table) - 1)
        if len(table) == 1:
            table.append((0, 0, self.cache.spare_slot))
        tokens, positions, written = torch.tensor(table, device=self._device).unbind(1)
        mask = self._decode_mask(positions[:slots])
        wanted = torch.tensor(sampled * 2 if len(sampled) == 1 else sampled, dtype=torch.long, device=self._device)
        return _Rows(tokens, positions, self.cache.addresses(written, positions), slots, mask, spans, wanted)

    def _span(self, chunk: PromptChunk, first_row: int) -> _Span:
        start, stop = chunk.start, chunk.stop
        mask = None
        if start:
            mask = torch.ones(stop - start, stop, dtype=torch.bool, device=self._device).tril(start)
        return _Span(chunk.request.slot, slice(first_row, first_row + stop - start), stop, mask)

    def _decode_mask(self, positions: Tensor) -> Tensor:
        """-inf beyond each row's position, [rows · kv heads, 1, capacity]."""
        beyond = torch.arange(self.cache.capacity, device=self._device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self._dtype, device=self._device).masked_fill_(beyond, -torch.inf)
        return mask.repeat_interleave(self._heads.kv, 0)[:, None]


class TransformersDecoder:
    """Any causal LM, through its own forward and cache: right, and slow, since each sequence passes alone."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: WeakKeyDictionary[Request, DynamicCache] = WeakKeyDictionary()

    def update_weights(self) -> None:
        """Nothing to do: the module itself computes."""

    def logits(self, step: Step) -> Tensor:
        was_training = self._model.training
        self._model.eval()
        decoded = [self._forward(s, s.cached, len(s.tokens)) for s in step.decoding]
        prefilled = [(c, self._forward(c.request, c.start, c.stop)) for c in step.chunks]
        self._model.train(was_training)
        return torch.cat(decoded + [logits for chunk, logits in prefilled if chunk.ends_prompt] or [torch.empty(0)])

    def _forward(self, request: Request, start: int, stop: int) -> Tensor:
        """Logits [1, vocab] behind tokens start..stop, whose predecessors are cached."""
        cache = self._caches.setdefault(request, DynamicCache(config=self._model.config))
        tokens = torch.tensor([request.tokens[start:stop]], device=self._model.device)
        return self._model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
