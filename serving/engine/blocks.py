"""The layers of the GPT-2 and Llama families, read from a transformers module into the form that decodes fastest.

Each family is a list of blocks with `project` (norm, queries, keys, values) and `mix` (output projection, MLP, both
residuals); attention lies between the two and belongs to the decoder. Rows are tokens of any sequences, [rows, ...].
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.engine.linear import Linear, linear


@dataclass(frozen=True)
class Heads:
    """How many query and key-value heads, and their width."""

    queries: int
    kv: int
    dim: int


class Block(Protocol):
    scale: float  # of the attention scores

    def project(self, x: Tensor, angles: Any) -> Tensor:
        """x [rows, hidden] to queries, keys, values [rows, heads.queries + 2 · heads.kv, heads.dim]."""
        ...

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream x [rows, hidden] after `attended` [rows, heads.queries · heads.dim] and the MLP."""
        ...


class Family(Protocol):
    """What the decoder needs of an architecture."""

    heads: Heads
    blocks: list[Block]
    head: Linear

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor: ...

    def angles(self, positions: Tensor) -> Any:
        """What `project` needs to know of the rows' positions [rows]."""
        ...

    def norm(self, x: Tensor) -> Tensor: ...


def merged_weight(module: nn.Module) -> Tensor:
    """The module's weight, with the active peft adapters of a wrapped module added."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if hasattr(module, "get_delta_weight") and not module.merged and not module.disable_adapters:
        for adapter in module.active_adapters:  # type: ignore[union-attr]
            if adapter in module.lora_A:  # type: ignore[operator]
                weight = weight + module.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight


class LlamaFamily:
    """RMS norm, rotary positions, grouped queries, gated MLP (Touvron et al. 2023)."""

    def __init__(self, model: Any, max_len: int) -> None:
        """`model` is a LlamaForCausalLM; `max_len` the number of positions to prepare."""
        config, inner = model.config, model.model
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, inner.layers[0].self_attn.head_dim)
        self.blocks: list[Block] = [LlamaBlock(layer, self.heads) for layer in inner.layers]
        self.head = linear(merged_weight(model.lm_head))
        self._embedding = inner.embed_tokens.weight.detach()
        self._norm = inner.norm
        positions = torch.arange(max_len, device=self._embedding.device)[None]
        cos, sin = inner.rotary_emb(self._embedding, positions)
        half = self.heads.dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._cos, self._sin = cos.transpose(0, 1), sin.transpose(0, 1)  # [positions, 1, dim]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, self._embedding)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]

    def norm(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self._norm)


class LlamaBlock:
    def __init__(self, layer: Any, heads: Heads) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.scale: float = attention.scaling
        self._rotated = heads.queries + heads.kv
        self._heads = heads
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [part.bias for part in parts]
        self._qkv = linear(
            torch.cat([merged_weight(p) for p in parts]), None if biases[0] is None else torch.cat(biases)
        )
        self._out = linear(merged_weight(attention.o_proj), attention.o_proj.bias)
        self._gate = linear(merged_weight(mlp.gate_proj), mlp.gate_proj.bias)
        self._up = linear(merged_weight(mlp.up_proj), mlp.up_proj.bias)
        self._down = linear(merged_weight(mlp.down_proj), mlp.down_proj.bias)
        self._norm1, self._norm2 = layer.input_layernorm, layer.post_attention_layernorm

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rows = self._qkv(_rms_norm(x, self._norm1)).unflatten(1, (-1, self._heads.dim))
        cos, sin = angles
        turned = rows[:, : self._rotated]
        # Rotating the halves is a roll; its sign is in the table.
        rolled = turned.roll(self._heads.dim // 2, -1)
        turned.mul_(cos).addcmul_(rolled, sin)
        return rows

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self._out.plus(attended, x)
        normed = _rms_norm(x, self._norm2)
        return self._down.plus(self._up.times(normed, self._gate.silu(normed)), x)


class Gpt2Family:
    """Layer norm before each part, learned positions, GELU (Radford et al. 2019)."""

    def __init__(self, model: Any, max_len: int) -> None:
        """`model` is a GPT2LMHeadModel; `max_len` may not exceed its n_positions."""
        config, inner = model.config, model.transformer
        heads = config.num_attention_heads
        self.heads = Heads(heads, heads, config.hidden_size // heads)
        self.blocks: list[Block] = [Gpt2Block(layer, self.heads) for layer in inner.h]
        self.head = linear(merged_weight(model.lm_head))
        self._embedding, self._positions = inner.wte.weight.detach(), inner.wpe.weight.detach()
        self._norm = inner.ln_f

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, self._embedding).add_(F.embedding(positions, self._positions))

    def angles(self, positions: Tensor) -> None:
        return None

    def norm(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self._norm)


class Gpt2Block:
    def __init__(self, layer: Any, heads: Heads) -> None:
        self.scale: float = layer.attn.scaling
        self._dim = heads.dim
        # transformers' Conv1D holds its weight as [in, out].
        self._qkv = linear(merged_weight(layer.attn.c_attn).T, layer.attn.c_attn.bias)
        self._out = linear(merged_weight(layer.attn.c_proj).T, layer.attn.c_proj.bias)
        self._up = linear(merged_weight(layer.mlp.c_fc).T, layer.mlp.c_fc.bias)
        self._down = linear(merged_weight(layer.mlp.c_proj).T, layer.mlp.c_proj.bias)
        self._norm1, self._norm2 = layer.ln_1, layer.ln_2

    def project(self, x: Tensor, angles: None) -> Tensor:
        return self._qkv(_layer_norm(x, self._norm1)).unflatten(1, (-1, self._dim))

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self._out.plus(attended, x)
        return self._down.plus(self._up.gelu_tanh(_layer_norm(x, self._norm2)), x)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
