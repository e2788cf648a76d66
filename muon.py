"""
Muon: momentum whose update is made orthogonal, for the hidden matrices; AdamW for all else.
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import torch
import torch.distributed as dist

from support.cpu import fast_dtype

# odd quintics that bring singular values to 1 fastest, one after the other: the Polar Express, Amsel et al. 2025, arXiv:2505.16932
QUINTICS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(X, steps=4, dtype=None):
    """
    The orthogonal matrices nearest to X (N, rows, cols), roughly: that many Newton-Schulz steps bring singular values over a
    thousandth of the norm to between 0.4 and 1.6 (four steps; five, to between 0.8 and 1.2, train no better). It needs no
    precision, so dtype None takes bfloat16 where the hardware has it, float16 on older GPUs, else float32.
    """
    wide = X.size(1) <= X.size(2)
    X = X if wide else X.mT  # the smaller side first: fewer multiplications
    X = X / (
        1.02 * X.flatten(1).norm(dim=1)[:, None, None] + 1e-7
    )  # a margin for rounding, beyond 1 the first quintic explodes
    X = X.to(dtype or fast_dtype(X.device))
    for a, b, c in QUINTICS[:steps]:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


def orthogonalize_together(X):
    """orthogonalize(X), each rank doing its share of the matrices and all getting the whole."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalize(X)
    if len(X) < world_size:  # a gather would be filled up to one a rank; zeros add nothing
        mine = orthogonalize(X[dist.get_rank() :][:1])
        whole = mine.new_zeros(X.shape)
        whole[dist.get_rank() :][:1] = mine
        dist.all_reduce(whole)
        return whole
    share = -(-len(X) // world_size)
    mine = orthogonalize(X[dist.get_rank() * share :][:share])
    mine = torch.cat([mine, mine.new_zeros(share - len(mine), *X.shape[1:])])
    whole = mine.new_empty(share * world_size, *X.shape[1:])
    getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)(
        whole, mine
    )  # its name from torch 2.13 on
    return whole[: len(X)]


class Muon(torch.optim.AdamW):
    """
    AdamW, but groups with muon=True take Muon's step with their own lr, momentum and weight_decay.

    An optimizer.found_inf of 1 (a float tensor) skips a step without waiting for the device, as in AdamW's
    fused kernel. State per matrix: momentum_buffer. Works with DDP, and with FSDP2's sharded parameters.
    lr and momentum may be tensors on the device, so that a CUDA graph of the step reads today's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.momenta = {}  # see momentum_of()

    def __setstate__(self, state):  # load_state_dict calls it too
        torch.optim.Optimizer.__setstate__(
            self, state
        )  # AdamW's own looks for a step count in all state
        self.momenta = {}

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in groups:
            by_shape = {}
            for p in group['params'] if group.get('muon') else ():
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                # FSDP2's matrices are gathered for the step, so only a few at a time
                n = dist.get_world_size() if sharded(params[0]) else len(params)
                for i in range(0, len(params), n):
                    self.muon_step(
                        params[i : i + n], group['lr'], group['momentum'], group['weight_decay']
                    )
        self.param_groups = [group for group in groups if not group.get('muon')]
        super().step()
        self.param_groups = groups

    def muon_step(self, params, lr, momentum, weight_decay):
        """One step for matrices of the same shape (rows, cols), all at once. With FSDP2 a rank has `share` of their rows."""
        rows, cols = params[0].shape
        buffer = self.momentum_of(params)
        grad = torch.stack([local(p.grad) for p in params]).float()  # (N, share, cols)
        weight, bad = 1 - momentum, getattr(self, 'found_inf', None)
        if (
            bad is not None
        ):  # a gradient that is not finite counts nothing in the momentum, and the step is of length 0
            grad.nan_to_num_()
            weight, lr = weight * (1 - bad), lr * (1 - bad)
        buffer.lerp_(grad, weight)
        if sharded(params[0]):
            torch._foreach_copy_(
                [local(self.state[p]['momentum_buffer']) for p in params], list(buffer)
            )
        grad.lerp_(buffer, momentum)  # Nesterov
        grad = gather(grad, params)  # (N, rows, cols)
        if (
            rows == 3 * cols
        ):  # c_attn (without n_kv_head): queries, keys and values each by themselves
            grad = grad.view(-1, cols, cols)
        update = orthogonalize_together(grad) * max(1, grad.size(1) / cols) ** 0.5
        update = update.reshape(-1, rows, cols).to(
            buffer.dtype, memory_format=torch.contiguous_format
        )
        update = scatter(update, params) * lr  # (N, share, cols)
        weights = [local(p) for p in params]
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, list(update))

    def momentum_of(self, params):
        """
        The momentum of matrices of the same shape (N, share, cols). The state of each is a view of it, and so never copied;
        but not with FSDP2, whose tensors have a memory each.
        """
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad, dtype=torch.float32)
        buffers = [local(self.state[p]['momentum_buffer']) for p in params]
        if sharded(params[0]):
            return torch.stack(buffers)
        if params[0] not in self.momenta:
            self.momenta[params[0]] = torch.stack(buffers)
            for p, view in zip(params, self.momenta[params[0]]):
                self.state[p]['momentum_buffer'] = view
        return self.momenta[params[0]]


def sharded(p):
    """Is this parameter sharded by FSDP2?"""
    return hasattr(p, 'full_tensor')


def local(x):
    """This rank's shard of x, or x itself where nothing is sharded."""
    return x.to_local() if sharded(x) else x


def as_shard(shard, p):
    """This rank's shard of a tensor that is sharded as the parameter p is, or the tensor itself where nothing is sharded."""
    if not sharded(p):
        return shard
    return dist.tensor.DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def gather(shards, params):
    """The whole tensors (N, rows, cols) of shards (N, share, cols)."""
    if not sharded(params[0]):
        return shards
    return torch.stack([as_shard(shard, p).full_tensor() for shard, p in zip(shards, params)])


def scatter(whole, params):
    """This rank's shards (N, share, cols) of whole tensors (N, rows, cols)."""
    if not sharded(params[0]):
        return whole
    cut = dist.tensor.distribute_tensor
    return torch.stack(
        [
            local(cut(x, p.device_mesh, p.placements, src_data_rank=None))
            for x, p in zip(whole, params)
        ]
    )


def set_rates(optimizer, lr, iteration):
    """
    Set the learning rate of every group, and Muon's momentum, which rises over the first 300 iterations as in
    modded-nanogpt. In capturable groups they are tensors, written in place, which a CUDA graph of the step reads.
    """
    for group in optimizer.param_groups:
        if not group['params']:
            continue
        rates = {'lr': lr * group.get('lr_scale', 1.0)}
        if group.get('muon'):
            rates['momentum'] = min(1.0, (iteration + 1) / 300) * (0.95 - 0.85) + 0.85
        for name, rate in rates.items():
            if not group['capturable']:
                group[name] = rate
            elif torch.is_tensor(group[name]):
                group[name].fill_(rate)
            else:
                group[name] = torch.tensor(rate, device=group['params'][0].device)


def configure(model, rates, weight_decay, learning_rate, betas, device_type, given={}):
    """
    Muon for the matrices in the blocks of `model` (a GPT), AdamW for embeddings, head and vectors.

    rates: {'matrix_lr', 'embed_lr', 'head_lr'}, where None takes the default. Muon's is the same for all sizes,
    since its steps have the same norm whatever the gradient; AdamW's fall with the root of the width (nanochat).
    They rise and fall in step with the schedule of learning_rate, which by itself is that of the vectors; a flag for it
    (`given`, as of configurator.py) is a ValueError where there are none.
    """
    width = (model.config.n_embd / 768) ** -0.5
    matrix_lr, embed_lr, head_lr = (
        default if rates[name] is None else rates[name]
        for name, default in (
            ('matrix_lr', 0.02),
            ('embed_lr', 0.2 * width),
            ('head_lr', 0.004 * width),
        )
    )
    for name, rate in (('matrix_lr', matrix_lr), ('embed_lr', embed_lr), ('head_lr', head_lr)):
        if rate < 0:
            raise ValueError(f'{name}={rate} must not be negative')
    scale = lambda lr: lr / learning_rate if learning_rate else 0.0  # of the schedule's rate
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in params.items() if '.h.' in name and p.dim() == 2]
    head = [p for p in params.values() if p is model.lm_head.weight]  # which may be wte too
    embeddings = [
        p
        for name, p in params.items()
        if name.endswith('wte.weight') and p is not model.lm_head.weight
    ]
    # at the rate of the tokens they are added to, so that neither drowns the other
    positions = [p for name, p in params.items() if name.endswith('wpe.weight')]
    vectors = [p for name, p in params.items() if p.dim() < 2]
    if not vectors and not rates.get('min_lr') and given.get('learning_rate', '').startswith('--'):
        raise ValueError(
            'learning_rate is that of biases and norms beside muon, and none are trained here; set --matrix_lr, --embed_lr or --head_lr'
        )
    groups = [
        dict(
            params=matrices,
            muon=True,
            momentum=0.95,
            weight_decay=weight_decay,
            lr_scale=scale(matrix_lr),
        ),
        dict(params=embeddings, weight_decay=0.0, lr_scale=scale(embed_lr)),
        dict(
            params=positions,
            weight_decay=0.0,
            lr_scale=scale(head_lr if model.config.tie_embeddings else embed_lr),
        ),
        dict(params=head, weight_decay=0.0, lr_scale=scale(head_lr)),
        dict(params=vectors, weight_decay=0.0, lr_scale=1.0),
    ]
    return Muon(
        [group for group in groups if group['params']],
        lr=learning_rate,
        betas=betas,
        fused=device_type in ('cuda', 'cpu', 'mps'),
    )
