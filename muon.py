"""
Muon: momentum whose update is orthogonalized, for the matrices in the blocks; AdamW for all else.
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import torch
import torch.distributed as dist

from support.cpu import fast_dtype
from support.distributed import as_shard, divide_work, gather, local, shard_like, sharded
from support.graphs import set_value

# Odd quintic polynomials that bring singular values to 1 fastest when they are applied one after
# another: the Polar Express, Amsel et al. 2025, arXiv:2505.16932.
QUINTICS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(X, steps=4, dtype=None):
    """
    Return roughly the nearest orthogonal matrices to X (N, rows, cols), by Newton-Schulz iteration.

    Four steps bring singular values above a thousandth of the norm to between 0.4 and 1.6. Five
    bring them to between 0.8 and 1.2 and train no better. dtype None: bfloat16 where the hardware
    has it, float16 on older GPUs, else float32; precision does not matter here.
    """
    wide = X.size(1) <= X.size(2)
    X = X if wide else X.mT  # fewer multiplications with the smaller side first
    # a norm above 1 would make the first quintic diverge, so leave a margin for rounding
    X = X / (1.02 * X.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    X = X.to(dtype or fast_dtype(X.device))
    for a, b, c in QUINTICS[:steps]:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


class Muon(torch.optim.AdamW):
    """
    AdamW, except that groups with muon=True take Muon's step, with their own momentum.

    If optimizer.found_inf (a float tensor) is 1, the step changes nothing, without a device sync,
    as in AdamW's fused kernel. The state of a matrix is its momentum_buffer. Works with DDP and
    with FSDP2's sharded parameters. For CUDA graphs lr and momentum may be tensors on the device.
    """

    def __setstate__(self, state):  # load_state_dict calls this too
        # not AdamW's own, which expects a step count in the state of every parameter
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in groups:
            if group.get('muon'):
                for params in same_shapes(group['params']):
                    self.muon_step(params, group['lr'], group['momentum'], group['weight_decay'])
        self.param_groups = [group for group in groups if not group.get('muon')]
        super().step()
        self.param_groups = groups

    def muon_step(self, params, lr, momentum, weight_decay):
        """
        One step for matrices of the same shape (rows, cols), all at once. With FSDP2 a rank holds
        `share` of the rows.
        """
        rows, cols = params[0].shape
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad, dtype=torch.float32)
        buffers = [local(self.state[p]['momentum_buffer']) for p in params]
        buffer = torch.stack(buffers)  # (N, share, cols)
        grad = torch.stack([local(p.grad) for p in params]).float()
        weight, bad = 1 - momentum, getattr(self, 'found_inf', None)
        if bad is not None:  # a bad gradient leaves the momentum alone, and the step has length 0
            grad.nan_to_num_()
            weight, lr = weight * (1 - bad), lr * (1 - bad)
        buffer.lerp_(grad, weight)
        torch._foreach_copy_(buffers, list(buffer))
        grad.lerp_(buffer, momentum)  # Nesterov
        if sharded(params[0]):
            grad = torch.stack([gather(as_shard(g, p)) for g, p in zip(grad, params)])
        if rows == 3 * cols:  # c_attn: queries, keys and values are matrices of their own
            grad = grad.view(-1, cols, cols)
        update = divide_work(orthogonalize, grad, fast_dtype(grad.device))
        update = (update * max(1, grad.size(1) / cols) ** 0.5).reshape(-1, rows, cols)
        update = update.to(buffer.dtype, memory_format=torch.contiguous_format)
        if sharded(params[0]):
            update = torch.stack([local(shard_like(u, p)) for u, p in zip(update, params)])
        update = update * lr
        weights = [local(p) for p in params]
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, list(update))


def same_shapes(params):
    """Yield lists of parameters with gradients, each of one shape; short ones with FSDP2."""
    by_shape = {}
    for p in params:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for same in by_shape.values():
        # FSDP2's matrices are gathered for the step, so take only a few at a time
        n = dist.get_world_size() if sharded(same[0]) else len(same)
        yield from (same[i : i + n] for i in range(0, len(same), n))


def set_rates(optimizer, lr, iteration):
    """
    Set the learning rate of each group, and Muon's momentum, which rises over the first 300
    iterations as in modded-nanogpt.
    """
    for group in optimizer.param_groups:
        set_value(group, 'lr', lr * group.get('lr_scale', 1.0))
        if group.get('muon'):
            set_value(group, 'momentum', min(1.0, (iteration + 1) / 300) * (0.95 - 0.85) + 0.85)


def configure(model, rates, weight_decay, learning_rate, betas, device_type):
    """
    Muon for the matrices in the blocks of `model` (a GPT), AdamW for embeddings, head and vectors.

    rates: {'matrix_lr', 'embed_lr', 'head_lr'}, None for the default. Muon's is the same for all
    sizes, because its steps have the same norm for any gradient. AdamW's fall with the root of the
    width (nanochat). Runs of less than 600 iterations (rates['lr_decay_iters']) need higher rates
    (docs/figures.md, E). All follow the schedule of learning_rate, which is itself the rate of the
    vectors.
    """
    width = (model.config.n_embd / 768) ** -0.5
    short = (600 / max(100, rates.get('lr_decay_iters', 600))) ** 0.6
    lr = {'matrix_lr': 0.02, 'embed_lr': 0.2 * width, 'head_lr': 0.004 * width}
    for name in lr:
        lr[name] = lr[name] * max(1.0, short) if rates[name] is None else rates[name]
    # positions learn at the rate of the embeddings that they are added to
    lr['positions'] = lr['head_lr' if model.config.tie_embeddings else 'embed_lr']
    lr['vectors'] = learning_rate
    groups = {name: [] for name in ('matrix_lr', 'embed_lr', 'positions', 'head_lr', 'vectors')}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[group_of(name, p, head=model.lm_head.weight)].append(p)
    param_groups = []
    for name, params in groups.items():
        scale = lr[name] / learning_rate if learning_rate else 0.0
        group = {'params': params, 'weight_decay': 0.0, 'lr_scale': scale}
        if name == 'matrix_lr':
            group |= {'muon': True, 'momentum': 0.95, 'weight_decay': weight_decay}
        if params:
            param_groups.append(group)
    fused = device_type in ('cuda', 'cpu', 'mps')
    return Muon(param_groups, lr=learning_rate, betas=betas, fused=fused)


def group_of(name, p, head):
    """The name of the rate that a parameter learns at."""
    if p.dim() < 2:
        return 'vectors'
    if '.h.' in name:
        return 'matrix_lr'
    if p is head:  # a tied wte too
        return 'head_lr'
    return 'positions' if name.endswith('wpe.weight') else 'embed_lr'
