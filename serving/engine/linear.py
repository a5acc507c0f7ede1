"""Linear layers with what follows them fused in.

On a CPU with oneDNN the weight is reordered once into the kernel's own blocks, which is worth 1.5 to 2 times the speed
of `F.linear` for a few rows, and the row-wise operation behind it costs nothing. From two rows on, these kernels give a
row the same bits whatever the number of rows; callers never pass a single one.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_EXPECTED_ROWS = 16  # what oneDNN chooses its block layout for; any number of rows is correct


class Linear(Protocol):
    """x [rows, in] to [rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def silu(self, x: Tensor) -> Tensor: ...

    def gelu_tanh(self, x: Tensor) -> Tensor: ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor: ...

    def times(self, x: Tensor, other: Tensor) -> Tensor: ...


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest form for the device and dtype of `weight` [out, in]."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return PackedLinear(weight, bias) if _packs(weight) else PlainLinear(weight, bias)


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32


class PlainLinear:
    """Any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        return F.gelu(self(x), approximate="tanh")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)


class PackedLinear:
    """CPU, float32 or bfloat16, by the operators that torch.compile uses for frozen weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self.bias = bias
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return self._unary(x, self.weight, self.bias, "swish", [], "")

    def gelu_tanh(self, x: Tensor) -> Tensor:
        return self._unary(x, self.weight, self.bias, "gelu", [], "tanh")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, self.weight, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, self.weight, self.bias, "mul")
