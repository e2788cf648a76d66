"""
Several processes. torchrun starts them, DDP or FSDP2 share the model; here they meet, exchange
values, average losses and end together. Without torchrun there is one process, and all functions
that ask other processes answer for it alone.
"""

import contextlib
import os
import re
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map
from tqdm import tqdm

from support.device import DTYPES
from support.errors import UserError, fail


# -----------------------------------------------------------------------------
# start and end
def start(backend, device, timeout, accumulation):
    """
    Join the processes that torchrun launched: (rank, number of processes), (0, 1) without torchrun.

    backend: 'nccl', 'gloo', or 'auto'; device: where the model lives
    timeout: seconds to wait for another process; accumulation: micro-batches per iteration
    Raises UserError if these processes cannot work together.
    """
    if 'RANK' not in os.environ:
        return 0, 1
    names = 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
    missing = ', '.join(name for name in names if name not in os.environ)
    if missing:
        raise UserError(
            f'the environment has RANK but not {missing}; launch with torchrun, or unset RANK'
        )
    check_shares(accumulation, int(os.environ['WORLD_SIZE']))
    backend = resolve_backend(backend, device)
    if 'cuda' in device:
        torch.cuda.set_device(device)
    hook = lost_contact(sys.excepthook)
    sys.excepthook = hook  # others may be lost while the processes meet
    rank, world_size = meet(backend, timedelta(seconds=timeout))
    sys.excepthook = hook  # torch has replaced it
    return rank, world_size


def check_shares(accumulation, n):
    """Raise UserError unless `accumulation` micro-batches can be shared equally by n processes."""
    if accumulation % n:
        below = accumulation // n * n
        fits = f'{below} or {below + n}' if below else n
        raise UserError(
            f'gradient_accumulation_steps={accumulation} cannot be shared by {n} processes; '
            f'{fits} can'
        )


def resolve_backend(backend, device):
    """`backend` as torch.distributed spells it, with 'auto' replaced."""
    on_cuda = 'cuda' in device
    if 'mps' in device or (backend == 'nccl' and not on_cuda):
        raise UserError(
            f'several processes on {device} with backend={backend!r} cannot work; '
            'use CUDA, or --device=cpu --backend=gloo'
        )
    if backend == 'nccl' and not dist.is_nccl_available():
        raise UserError("backend='nccl' is not part of this torch; use --backend=gloo")
    if on_cuda and backend != 'gloo' and dist.is_nccl_available():
        return 'cpu:gloo,cuda:nccl'  # exchanging a flag in CPU memory does not wait for the GPU
    return 'gloo'


def meet(backend, timeout):
    """Create the process group: (rank, number of processes)."""
    global store  # destroy() needs it
    store, rank, world_size = next(rendezvous('env://', timeout=timeout))
    if os.environ.get('LOCAL_WORLD_SIZE') == os.environ['WORLD_SIZE']:
        # torchrun (2.13) keeps its store over restarts, with the addresses of dead processes, so
        # each attempt needs names of its own. Several machines may count restarts differently:
        # there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store each time
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
        store = dist.PrefixStore(f'attempt-{attempt}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return rank, world_size


def destroy():
    """
    Wait for all processes, then destroy the process group. They meet in the store, which is
    torchrun's and outlives them: after a barrier, the first process could close its connections
    while another still reads from them.
    """
    if dist.is_initialized():
        ranks = [f'left-{rank}' for rank in range(dist.get_world_size())]
        store.set(ranks[dist.get_rank()], '')
        store.wait(ranks)
        dist.destroy_process_group()


def lost_contact(report):
    """An excepthook that reports a lost process in one line and passes other errors to `report`."""

    def hook(kind, error, trace):
        text = ' '.join(str(error).split())
        of_gloo = isinstance(error, RuntimeError) and 'gloo' in text.lower()
        if not of_gloo and not isinstance(error, dist.DistError):
            report(kind, error, trace)
            return
        causes = 'connection (closed|reset|refused)|broken pipe|timed out'
        found = re.search(causes, text.lower())
        reason = found[0] if found else text[:200]
        time.sleep(2)  # so that torchrun first notices the process that failed first
        message = f'lost contact with another process ({reason}); the run ends here, '
        fail(message + '--init_from=auto resumes from its last checkpoint', 1)

    return hook


# -----------------------------------------------------------------------------
# values
def broadcast(value):
    """Rank 0's `value`, any small object, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, device=torch.device('cpu'))
    return box[0]


def any_rank(flag):
    """Whether `flag` is true on at least one rank."""
    if not dist.is_initialized():
        return bool(flag)
    largest = torch.tensor(float(bool(flag)))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item() > 0


def all_reduce(tensor):
    """`tensor` summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def divide_work(function, X, dtype):
    """
    function(X) for a batch of matrices X, whose results have the shape of X and this dtype. Each
    rank computes a share of the matrices and returns all results.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return function(X)
    rank = dist.get_rank()
    if len(X) < world_size:  # all_gather would need padding to one matrix per rank
        result = torch.zeros_like(X, dtype=dtype)
        result[rank:][:1] = function(X[rank:][:1])
        dist.all_reduce(result)
        return result
    share = -(-len(X) // world_size)
    mine = X.new_zeros(share, *X.shape[1:], dtype=dtype)
    own = X[rank * share :][:share]
    mine[: len(own)] = function(own)
    result = mine.new_empty(share * world_size, *X.shape[1:])
    # torch 2.13 renames the function
    all_gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)
    all_gather(result, mine)
    return result[: len(X)]


@torch.no_grad()
def mean_losses(evaluate, device, *splits, stop=False):
    """
    Mean loss of each split over all ranks, in nats per target that counts, and the number of these
    targets: a float tensor (number of splits, 2). None if `stop` becomes true on any rank.

    evaluate: evaluate(X, Y) returns the mean loss of a batch; splits: yield this rank's batches
    """
    float_type = torch.float32 if 'mps' in device else torch.float64
    sums = torch.zeros(len(splits), 2, device=device, dtype=float_type)
    for split, batches in zip(sums, splits):
        for number, (X, Y) in enumerate(progress(batches)):
            loss, count = evaluate(X, Y), (Y >= 0).sum()
            split += torch.stack([torch.where(count > 0, loss * count, 0.0), count])
            if number % 8 == 0:
                if 'cuda' in device:
                    torch.cuda.synchronize()  # else all batches start before the first ends
                if any_rank(stop):
                    return None
    loss, count = all_reduce(sums).unbind(1)
    return torch.stack([loss / count, count], 1)


def progress(batches):
    """`batches`, with a progress bar if they take more than a second on rank 0's terminal."""
    on_terminal_only = None  # to tqdm
    hide = on_terminal_only if is_rank0() else True
    return tqdm(batches, desc='evaluating', unit='batch', delay=1, leave=False, disable=hide)


# -----------------------------------------------------------------------------
# a shared model
def shard(model, device, dtype, compile):
    """
    FSDP2: every rank keeps a share of each block's weights, gradients and optimizer state, and
    gathers the rest when it computes the block (Zhao et al. 2023, arXiv:2304.11277). Changes
    `model`, so far on the CPU, in place. In 16 bits, weights are gathered and blocks are computed
    in `dtype`, the residual stream included (DDP keeps it in float32); gradients are summed in
    float32.
    """
    if not dist.is_initialized():
        raise UserError('fsdp=True shares a model between processes; launch them with torchrun')
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.partition(':')[0], (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype != 'float32':
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
    for block in model.transformer.h:
        if compile:
            block.compile(dynamic=False)  # one block at a time, between two exchanges
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def no_sync(model, unless):
    """
    Context for a backward pass that keeps gradients on their rank, `unless` this is true. FSDP2
    exchanges them each time, since unexchanged gradients would be whole on every rank.
    """
    if hasattr(model, 'no_sync') and not unless:  # DDP
        return model.no_sync()
    return contextlib.nullcontext()


def sharded(x):
    """Whether a tensor is sharded by FSDP2."""
    return hasattr(x, 'full_tensor')


def local(x):
    """This rank's shard of a sharded tensor; other tensors as they are."""
    return x.to_local() if sharded(x) else x


def gather(x):
    """A sharded tensor as a whole one, on its device; others as they are. All ranks call it."""
    return x.full_tensor() if sharded(x) else x


def as_shard(shard, param):
    """The tensor whose shard on this rank is `shard`, sharded as `param` is."""
    if not sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    layout = {'shape': param.shape, 'stride': param.stride(), 'run_check': False}
    return DTensor.from_local(shard, param.device_mesh, param.placements, **layout)


def gather_state(tree, keep):
    """
    A state dict with every sharded tensor gathered into CPU memory on the ranks that `keep` it,
    None on others. All ranks call it.
    """
    gathered = {}  # a tied matrix is in the tree twice, and in the file once

    def fetch(x):
        if not sharded(x):
            return x
        # by its storage, since empty shards all have the same data pointer
        key = x.to_local().untyped_storage()._cdata, x.shape
        if key not in gathered:
            whole = x.full_tensor()  # one tensor at a time on the GPU
            gathered[key] = whole.cpu() if keep else None
        return gathered[key]

    return tree_map(fetch, tree)


def shard_like(tensor, param):
    """This rank's shard of a whole `tensor`, cut as FSDP2 cut `param`; the tensor if it did not."""
    if not sharded(param) or tensor.shape != param.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    whole, mesh = tensor.to(param.device), param.device_mesh
    return distribute_tensor(whole, mesh, param.placements, src_data_rank=None)


# -----------------------------------------------------------------------------
# printing
def is_rank0():
    return os.environ.get('RANK', '0') == '0'


def print0(text):
    """Print a line on rank 0, above its progress bar. A closed terminal or pipe ends no run."""
    if is_rank0():
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            sys.stdout = sys.stderr = open(os.devnull, 'w')  # nobody reads any more
