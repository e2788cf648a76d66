"""
Several processes: how they meet, agree and share one model, and how one is asked to stop. The sharing is
torch's own: torchrun starts them, DDP or FSDP2 spreads the model. Without torchrun there is one process,
and the functions that ask the others answer for it alone.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map
from tqdm import tqdm

from configurator import fail
from support.device import DTYPES


def start(backend, device, timeout, accumulation):
    """
    Join the processes that torchrun launched, which are to share `accumulation` micro-batches an iteration: (rank, number of
    processes), which is (0, 1) where it has launched none.

    backend: 'nccl', 'gloo', or 'auto'; device: where the model lives
    timeout: seconds without an answer after which the others are given up
    """
    if 'RANK' not in os.environ:
        return 0, 1
    missing = [
        name for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f'the environment has RANK but not {", ".join(missing)}; launch with torchrun, or unset RANK'
        )
    n = int(os.environ['WORLD_SIZE'])
    if accumulation % n:
        fits = [n * k for k in (accumulation // n, accumulation // n + 1) if k]
        raise ValueError(
            f'gradient_accumulation_steps={accumulation} cannot be shared by {n} processes; {" or ".join(map(str, fits))} can'
        )
    if 'mps' in device or (backend == 'nccl' and 'cuda' not in device):
        raise ValueError(
            f'several processes on {device} with backend={backend!r} cannot work; use CUDA, or --device=cpu --backend=gloo'
        )
    if backend == 'nccl' and not dist.is_nccl_available():
        raise ValueError("backend='nccl' is not part of this torch; use --backend=gloo")
    if 'cuda' in device:
        torch.cuda.set_device(device)
        if backend in ('auto', 'nccl') and dist.is_nccl_available():
            backend = 'cpu:gloo,cuda:nccl'  # whoever asks about a flag in CPU memory does not wait for the GPU
    sys.excepthook = hook = lost_contact(sys.excepthook)
    timeout = timedelta(seconds=timeout)
    global store
    store, rank, _ = next(rendezvous('env://', timeout=timeout))
    if os.environ.get('LOCAL_WORLD_SIZE') == os.environ['WORLD_SIZE']:
        # torchrun (2.13) keeps one store over its restarts, and in it the addresses of the dead; several machines
        # may count restarts differently and need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, a new store each time
        store = dist.PrefixStore(
            f'attempt-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store
        )
    dist.init_process_group(
        'gloo' if backend == 'auto' else backend,
        store=store,
        rank=rank,
        world_size=n,
        timeout=timeout,
    )
    sys.excepthook = hook  # torch has put one of its own before it
    return rank, n


def destroy():
    """
    The end of all processes together. They meet in the store, which is torchrun's and outlives them: to meet by an
    exchange would leave the first to close its connections while another still reads from them.
    """
    if dist.is_initialized():
        ranks = [f'left-{rank}' for rank in range(dist.get_world_size())]
        store.set(ranks[dist.get_rank()], '')
        store.wait(ranks)
        dist.destroy_process_group()


def lost_contact(report):
    """An excepthook that tells the loss of another process in one line and hands all else to `report`."""

    def hook(kind, error, trace):
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and 'gloo' in str(error).lower()
        ):
            words = (
                'connection closed',
                'connection reset',
                'connection refused',
                'broken pipe',
                'timed out',
            )
            reason = next(
                (w for w in words if w in str(error).lower()), ' '.join(str(error).split())[:200]
            )
            time.sleep(2)  # so that torchrun notices first the process that failed first
            fail(
                f'lost contact with another process ({reason}); the run ends here, --init_from=auto goes on from its last checkpoint',
                1,
            )
        report(kind, error, trace)

    return hook


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
    flag = torch.tensor(float(bool(flag)))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def all_reduce(tensor):
    """`tensor` summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def mean_losses(evaluate, device, *splits, stop=False):
    """
    For each of `splits`, which yield this rank's batches (X, Y): the mean loss in nats per target that counts, and
    the number of these, over all ranks, as a float tensor (splits, 2). None if `stop` becomes true meanwhile on any rank.

    evaluate: called with (X, Y), returns the mean loss of that batch
    """
    sums = torch.zeros(
        len(splits), 2, device=device, dtype=torch.float32 if 'mps' in device else torch.float64
    )
    for i, batches in enumerate(splits):
        quiet = (
            os.environ.get('RANK', '0') != '0' or None
        )  # None: a bar on a terminal, once it has taken a second
        for number, (X, Y) in enumerate(
            tqdm(batches, desc='evaluating', unit='batch', delay=1, leave=False, disable=quiet)
        ):
            loss = evaluate(X, Y)
            count = (Y >= 0).sum()
            sums[i] += torch.stack([torch.where(count > 0, loss * count, 0.0), count])
            if number % 8 == 0:
                if 'cuda' in device:
                    torch.cuda.synchronize()  # else all batches are under way before the first is done
                if any_rank(stop):
                    return None
    sums = all_reduce(sums)
    return torch.stack([sums[:, 0] / sums[:, 1], sums[:, 1]], 1)


def shard(model, device, dtype, compile):
    """
    FSDP2: every rank keeps a share of every block's weights, gradients and optimizer state and fetches
    the rest of a block when it is that block's turn (Zhao et al. 2023, arXiv:2304.11277). Changes
    `model`, on CPU before, in place. In 16 bits weights travel and blocks compute so, the sum over blocks
    included, which DDP keeps in float32; gradients are added in float32.
    """
    if not dist.is_initialized():
        raise ValueError('fsdp=True shares a model between processes; launch them with torchrun')
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.partition(':')[0], (dist.get_world_size(),))
    policy = (
        MixedPrecisionPolicy()
        if dtype == 'float32'
        else MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
    )
    for block in model.transformer.h:
        if compile:
            block.compile(dynamic=False)  # by block, between one exchange and the next
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def no_sync(model, on):
    """
    Context for a backward pass that does (on=True) or does not yet exchange gradients between ranks. FSDP2 exchanges them
    each time: what is not shared out yet would be whole on every rank.
    """
    if hasattr(model, 'no_sync') and not on:  # DDP
        return model.no_sync()
    return contextlib.nullcontext()


def gather(x):
    """The whole of a tensor that FSDP shards, on its device; anything else as it is. All ranks must call it."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def gather_state(tree, keep):
    """A state dict with every sharded tensor put together, in CPU memory, on ranks that `keep` it (elsewhere None)."""
    fetched = {}  # a tied matrix stands in the tree twice, and in the file once

    def fetch(x):
        if not hasattr(x, 'full_tensor'):
            return x
        key = (
            x.to_local().untyped_storage()._cdata,
            x.shape,
        )  # not where its data lies: a rank's empty shares all lie nowhere
        if key not in fetched:
            whole = x.full_tensor()  # one tensor at a time on the GPU
            fetched[key] = whole.cpu() if keep else None
        return fetched[key]

    return tree_map(fetch, tree)


def shard_like(tensor, param):
    """This rank's share of a whole `tensor`, cut as FSDP cut `param`; the tensor itself where nothing is sharded."""
    if not hasattr(param, 'full_tensor') or tensor.shape != param.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(param.device), param.device_mesh, param.placements, src_data_rank=None
    )


def print0(text):
    """Print a line, above the progress bar if there is one, from one process only. A terminal or pipe that is gone ends no run."""
    if os.environ.get('RANK', '0') == '0':
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            sys.stdout = sys.stderr = open(os.devnull, 'w')  # nobody reads on
