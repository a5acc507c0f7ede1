"""Memory: the keys and values of every slot, laid out so that a decode step reads them as they lie.

One buffer per layer, [2 (keys, values), slots + 1, kv_heads, capacity, head_dim]. The rows of the last slot belong to
nobody: padding rows write there. Capacity grows by doubling to what the longest sequence so far has needed, and not to
slots × context at once, which would be 6 GB for a 135M model of 8k context.
"""

import torch
from torch import Tensor

_FIRST_CAPACITY = 256  # tokens per slot


class KVCache:
    """Keys and values of up to `slots` sequences of at most `max_len` tokens."""

    def __init__(
        self, shape: tuple[int, int, int], slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, kv_heads, head_dim)."""
        layers, self.kv_heads, self.head_dim = shape
        self.spare_slot = slots
        self.max_len = max_len
        self.capacity = min(_FIRST_CAPACITY, max_len)
        size = (2, slots + 1, self.kv_heads, self.capacity, self.head_dim)
        # Zeros, since a masked score times a value that was never written must be 0 and not NaN.
        self.layers = [torch.zeros(size, dtype=dtype, device=device) for _ in range(layers)]

    def reserve(self, length: int) -> None:
        """Makes every slot hold `length` tokens at least."""
        assert length <= self.max_len
        if length <= self.capacity:
            return
        old = self.capacity
        while self.capacity < length:
            self.capacity = min(2 * self.capacity, self.max_len)
        for i, layer in enumerate(self.layers):
            grown = layer.new_zeros((*layer.shape[:3], self.capacity, self.head_dim))
            grown[..., :old, :] = layer
            self.layers[i] = grown

    def addresses(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the rows of tokens at [T] positions of [T] slots go: [T, 2 · kv_heads], keys first, for `write`."""
        part = torch.arange(2 * self.kv_heads, device=slots.device)
        key_or_value, head = part // self.kv_heads, part % self.kv_heads
        lane = (key_or_value * (self.spare_slot + 1) + slots[:, None]) * self.kv_heads + head
        return lane * self.capacity + positions[:, None]

    def write(self, layer: int, addresses: Tensor, rows: Tensor) -> None:
        """Stores rows [T, 2 · kv_heads, head_dim] at `addresses`."""
        self.layers[layer].view(-1, self.head_dim)[addresses] = rows

    def read(self, layer: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `slots` slots and `length` tokens, each [slots · kv_heads, length, head_dim]."""
        keys, values = self.layers[layer][:, :slots, :, :length].flatten(1, 2)
        return keys, values

    def read_slot(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one slot's first `length` tokens, copied, each [kv_heads, length, head_dim]."""
        keys, values = self.layers[layer][:, slot, :, :length].contiguous()
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]
