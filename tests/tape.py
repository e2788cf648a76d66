"""
A stand-in for CUDA graphs on a CPU. It records the operations of a function and replays them on the
same memory. Like a graph it does not run Python: a number that is not a tensor stays what it was
when it was recorded, and .item() is an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.graphs import Recorder


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storages(tree):
    return {x.untyped_storage()._cdata for x in tensors(tree)}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError('waiting for the device is not supported while it is recorded')
        if func._schema.is_mutable:  # recording does not execute, so restore() undoes all writes
            for x in tensors((args, kwargs)):
                storage = x.untyped_storage()
                self.before.setdefault(storage._cdata, (x, storage.clone()))
        out = func(*args, **kwargs)
        known = storages((args, kwargs))
        fresh = [i for i, x in enumerate(tensors(out)) if x.untyped_storage()._cdata not in known]
        self.operations.append((func, args, kwargs, tensors(out), fresh))
        return out

    def restore(self):
        for x, storage in self.before.values():
            x.untyped_storage().copy_(storage)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, outs, fresh in self.operations:
            new = tensors(func(*args, **kwargs))
            for i in fresh:
                outs[i].copy_(new[i])


def record(self, function, inputs):
    """Recorder.record, on a CPU."""
    tape, state = Tape(), torch.get_rng_state()
    try:
        with tape:
            outputs = function(*inputs)
    finally:
        tape.restore()
        torch.set_rng_state(state)
    return tape.replay, outputs


def install(setattr=setattr):
    """Make every Recorder tape on a CPU what it would record on a GPU."""
    setattr(Recorder, 'record', record)
    setattr(Recorder, 'warm_up', lambda self, function, args: function(*args))
