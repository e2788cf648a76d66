"""
What a CPU computes slowly with torch's own functions: dropout masks, attention with dropout or in
bfloat16, the backward of some functions, and products with few rows in generation. On other devices
model.py uses torch's own functions; so it does under torch.compile, except for attention.
"""

import math

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F


def fast_bfloat16(device):
    """Does this hardware multiply matrices faster in bfloat16 than in float32?"""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device.type == 'cpu' and any(getattr(torch.cpu, test, bool)() for test in tests)


def fast_dtype(device):
    """The dtype in which this hardware multiplies matrices fastest."""
    if fast_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if torch.device(device).type == 'cuda' else torch.float32


def in_training(x):
    """Is x on a CPU, and will a plain (not compiled) backward pass follow?"""
    return torch.is_grad_enabled() and x.device.type == 'cpu' and not torch.compiler.is_compiling()


# -----------------------------------------------------------------------------
# dropout
def dropout(x, p, training):
    """
    Zero each element with probability p and scale up the rest, in training only.

    On a CPU the mask is cut from 64-bit random numbers, four elements from each: torch draws its
    Bernoulli numbers seven times slower (185 against 27 ms for 25 million on two cores).
    """
    if not training or p == 0.0:
        return x
    if not in_training(x):
        return F.dropout(x, p)
    cut = min(65535, round(p * 65536))  # p in steps of 1/65536
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = torch.empty(x.shape, dtype=torch.bool)
    torch.ge(bits.view(torch.int16)[: x.numel()].view(x.shape), cut - 32768, out=keep)
    return x * keep * (65536 / (65536 - cut))


def seed_dropout(seed, iteration, number):
    """Make dropout a function of the seed, the iteration and the number of its micro-batch."""
    sequence = np.random.SeedSequence((seed, iteration, number))
    torch.manual_seed(int(sequence.generate_state(1)[0]))


# -----------------------------------------------------------------------------
# attention
def explicit_attention_is_faster(q, p):
    """Is attention() faster than torch's for queries q (B, nh, T, hs) and dropout p?"""
    short = q.dtype == torch.bfloat16 and q.size(2) <= 512
    return q.device.type == 'cpu' and (p > 0.0 or short)


def attention(q, k, v, bias, p):
    """scaled_dot_product_attention. bias: added to scores, with the mask; None: causal."""
    if bias is None:
        T = q.size(2)
        bias = torch.full((T, T), float('-inf')).triu(1)
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1)) + bias
    att = torch.softmax(scores, dim=-1)  # (B, nh, T, T)
    return dropout(att, p, training=True).type_as(v) @ v  # (B, nh, T, hs)


# -----------------------------------------------------------------------------
# functions with a backward in fewer operations than autograd's
class RMSNorm(torch.autograd.Function):
    """0.35 instead of 1.4 ms for queries and keys of a small network."""

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(1e-6).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


class ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


class Rotation(torch.autograd.Function):
    """Backward rotates the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        rotated = grad.roll(grad.size(-1) // 2, -1)
        return torch.addcmul(grad * cos, rotated, sin, value=-1), None, None


# -----------------------------------------------------------------------------
# products with few rows: their speed is that of reading the weights, and torch's take twice as long
@torch.no_grad()
def pack(model, rows=1, int8=False):
    """
    Replace the large matrices of `model`, on a CPU, by copies that multiply about `rows` rows at
    the speed of memory. Such a model can only generate and be scored.

    int8: 8-bit weights, scaled by the largest weight of each output; the model must be in bfloat16
    """
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and linear.weight.numel() >= 2**18:
                packed = choose_packed(linear, rows, int8)
                if packed is not None:
                    setattr(parent, name, packed)


def choose_packed(linear, rows, int8):
    """The fastest packed form of a Linear layer, None if torch's own is as fast."""
    dtype = linear.weight.dtype
    if int8:
        return Int8Linear(linear)
    fast = dtype == torch.float32 or dtype == torch.bfloat16 and fast_bfloat16('cpu')
    if not (torch.backends.mkldnn.is_available() and fast):
        return None
    block = max(n for n in range(1, 33) if linear.out_features % n == 0)
    if rows == 1 and dtype == torch.float32 and torch.backends.mkl.is_available() and block > 3:
        return BlockLinear(linear, block)
    return OneDNNLinear(linear, rows)


class PackedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        # without elements; it says the device, and a tied embedding keeps its own weight
        empty = linear.weight.new_empty(0, linear.in_features)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def with_bias(self, y, x):
        """y (any, out_features) in the shape of the input x, plus the bias."""
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Linear(PackedLinear):
    def __init__(self, linear):
        super().__init__(linear)
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1).float() / 127).clamp_min(1e-30)
        self.scale = scale.to(weight.dtype)
        rounded = (weight.float() / self.scale.float()[:, None]).round()
        self.packed = rounded.clamp(-127, 127).to(torch.int8)

    def forward(self, x):
        rows = x.numel() // x.size(-1)
        if rows > 16:  # the 8-bit kernel is slower for many rows
            return F.linear(x, self.packed * self.scale[:, None], self.bias)
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(rows, -1), self.packed, self.scale)
        return self.with_bias(y, x)


class OneDNNLinear(PackedLinear):
    """Weights in the order in which oneDNN reads them."""

    def __init__(self, linear, rows):
        super().__init__(linear)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


class BlockLinear(PackedLinear):
    """Weights in blocks of outputs, which keep all cores reading: fastest for one float32 row."""

    def __init__(self, linear, block):
        super().__init__(linear)
        self.packed = linear.weight.detach()
        self.blocks = self.packed.view(-1, block, linear.in_features)

    def forward(self, x):
        if x.numel() != x.size(-1):
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')
        column = x.view(1, -1).t().expand(len(self.blocks), -1, -1)  # these strides are fast
        return self.with_bias(torch.bmm(self.blocks, column), x)
