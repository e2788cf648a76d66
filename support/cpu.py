"""
What model.py and generate.py are made of that torch does not have, or computes slowly on a CPU: dropout, norm, activation,
positions, and a Linear that can be fine-tuned by LoRA or packed for generation. On other devices, and under torch.compile,
torch's own functions do the same. Imports no other file of ours.
"""

import os

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F


def amd_cpu():
    """Is this an AMD CPU, on which torch's choice for float32, Intel's MKL, multiplies matrices a fifth slower than oneDNN?"""
    name = os.environ.get('PROCESSOR_IDENTIFIER', '')  # Windows'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            name += f.read(10_000)
    return (
        'AuthenticAMD' in name
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


AMD = amd_cpu()


def fast_bfloat16(device):
    """Does this hardware (a torch.device or its name) multiply matrices faster in bfloat16 than in float32?"""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = [
        getattr(torch.cpu, name, bool)
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    ]
    return device.type == 'cpu' and any(test() for test in tests)


def fast_dtype(device):
    """The type in which this hardware multiplies matrices fastest, where precision does not matter."""
    return (
        torch.bfloat16
        if fast_bfloat16(device)
        else torch.float16
        if torch.device(device).type == 'cuda'
        else torch.float32
    )


def own_way(x):
    """Is our own way to compute faster than torch's: on a CPU, where gradients are wanted and nothing is compiled?"""
    return torch.is_grad_enabled() and x.device.type == 'cpu' and not torch.compiler.is_compiling()


def linear(x, weight, bias=None):
    """F.linear, by the faster of torch's libraries: for small products it makes no difference."""
    if AMD and own_way(x) and x.numel() * len(weight) >= 2**28:  # multiplications
        if x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu'):
            return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Product(torch.autograd.Function):
    """F.linear by oneDNN, which for large float32 matrices on AMD takes 0.8 of MKL's time; but not for the gradient of the weights."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return (
            torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, 'none', [], '')
            if ctx.needs_input_grad[0]
            else None,
            flat.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """
    nn.Linear, until pack() has readied it to multiply few rows at a time.

    lora_rank: learn a correction of this rank, lora_b @ lora_a, beside weights that stay as they are (Hu et al. 2021); 0: none
    """

    packed = scale = blocks = None

    def __init__(self, *args, lora_rank=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_rank = lora_rank
        if lora_rank:
            self.lora_a = nn.Parameter(
                torch.randn(lora_rank, self.in_features) / self.in_features**0.5
            )
            self.lora_b = nn.Parameter(torch.zeros(self.out_features, lora_rank))

    def forward(self, x):
        if self.packed is None:
            y = linear(x, self.weight, self.bias)
            return y + F.linear(F.linear(x, self.lora_a), self.lora_b) if self.lora_rank else y
        rows = x.numel() // x.size(-1)
        if self.scale is not None and rows > 16:  # for so many the kernel for 8 bits does not pay
            return F.linear(x, self.packed * self.scale[:, None], self.bias)
        if self.blocks is not None and rows == 1:
            y = torch.bmm(
                self.blocks, x.view(1, -1).t().expand(len(self.blocks), -1, -1)
            )  # this order of strides is the fast one
        elif self.scale is not None:
            y = torch.ops.aten._weight_int8pack_mm(x.reshape(rows, -1), self.packed, self.scale)
        else:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def pack(model, rows=1, int8=False):
    """
    Ready `model`, on a CPU, for generation and nothing else: from now on its large matrices multiply a few rows, about so
    many, as fast as memory gives them; torch's own choice takes twice as long. They are put into the order in which oneDNN
    reads them; only for a single row in float32 blocks of 32 outputs are faster, which keep all cores reading.

    int8: in 8 bits, scaled by the largest weight of each output; the model must be in bfloat16
    """
    for module in model.modules():
        if (
            not isinstance(module, Linear) or module.weight.numel() < 2**18
        ):  # small ones do not repay a longer call
            continue
        weight, dtype = module.weight.detach(), module.weight.dtype
        if int8:
            module.scale = (weight.abs().amax(1).float() / 127).clamp_min(1e-30).to(weight.dtype)
            module.packed = (
                (weight.float() / module.scale.float()[:, None])
                .round()
                .clamp(-127, 127)
                .to(torch.int8)
            )
        elif torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or dtype == torch.bfloat16 and fast_bfloat16('cpu')
        ):
            size = max(n for n in range(1, 33) if len(weight) % n == 0)
            if (
                rows == 1
                and dtype == torch.float32
                and torch.backends.mkl.is_available()
                and size > 3
            ):
                module.packed, module.blocks = weight, weight.view(-1, size, weight.size(1))
            else:
                module.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        if (
            module.packed is not None
        ):  # free what was copied; a tied embedding keeps its own hold on it
            module.weight = nn.Parameter(weight.new_empty(0, weight.size(1)), requires_grad=False)


def dropout(x, p, training):
    """
    Zero each element with probability p and scale up the rest, in training only.

    On CPU the mask is cut from raw 64-bit random numbers, four elements from each, since torch draws
    its Bernoulli numbers seven times slower (27 against 185 ms for 25 million, measured on two cores).
    """
    if not training or p == 0.0:
        return x
    if not own_way(x):
        return F.dropout(x, p)
    cut = min(65535, round(p * 65536))  # p in steps of 1/65536
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = torch.empty(x.shape, dtype=torch.bool)
    torch.ge(bits.view(torch.int16)[: x.numel()].view(x.shape), cut - 32768, out=keep)
    return x * keep * (65536 / (65536 - cut))


def seed_dropout(seed, iteration, number):
    """Make the dropout of micro-batch `number` of an iteration a function of these three, whatever was drawn before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, iteration, number)).generate_state(1)[0]))


def rms_norm(x):
    """x over the root of its mean square in the last dimension (Zhang & Sennrich 2019)."""
    return RMSNormFunction.apply(x) if own_way(x) else F.rms_norm(x, (x.size(-1),), eps=1e-6)


class RMSNormFunction(torch.autograd.Function):
    """Backward in four operations; torch's takes three times as long (0.35 against 1.4 ms for queries and keys of a small network)."""

    @staticmethod
    def forward(ctx, x):
        square = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True, dtype=torch.float32
        ).square_()  # summed over the row
        scale = square.div_(x.size(-1)).add_(1e-6).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def relu2(x):
    """max(x, 0) squared (So et al. 2021)."""
    if own_way(x):
        return ReLU2.apply(x)
    x = F.relu(x)
    return x * x  # .square() would be float32 in CUDA's autocast


class ReLU2(torch.autograd.Function):
    """Backward in two operations instead of four."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


def rotary_table(at, hs):
    """cos and sin by which positions `at` (T,) turn the hs / 2 pairs (i, i + hs / 2) of a head, each (T, hs)."""
    inv_freq = 10000.0 ** (
        -torch.arange(0, hs, 2, device=at.device) / hs
    )  # Su et al. 2021, section 3.2.2
    angles = torch.outer(at.float(), inv_freq)  # (T, hs / 2)
    return torch.cat((angles.cos(), angles.cos()), 1), torch.cat((angles.sin(), -angles.sin()), 1)


def rotate(x, cos, sin):
    """Turn x (B, nh, T, hs) by its positions."""
    cos, sin = cos.type_as(x), sin.type_as(x)
    return (
        Rotation.apply(x, cos, sin) if own_way(x) else x * cos + x.roll(x.size(-1) // 2, -1) * sin
    )


class Rotation(torch.autograd.Function):
    """Backward turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (
            torch.addcmul(grad * cos, grad.roll(grad.size(-1) // 2, -1), sin, value=-1),
            None,
            None,
        )


def alibi_slopes(n_head, device):
    """How much each head's scores fall with distance (nh,), Press et al. 2021."""
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1, device=device) / n_head)


def alibi_bias(T, n_head, device):
    """What ALiBi adds to attention scores, the causal mask included (nh, T, T): -slope * distance."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(
        T, device=device
    )  # (T, T), queries down, keys across
    return (-alibi_slopes(n_head, device)[:, None, None] * distance).masked_fill(
        distance < 0, float('-inf')
    )
