"""Saving memory by computing activations again, and time by skipping initialization."""

from functools import partial

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

recompute = partial(checkpoint, use_reentrant=False)


def chunked_cross_entropy(head, x, targets, chunk):
    """
    The mean cross-entropy of head(x) against `targets`. Logits exist for `chunk` positions at a
    time, at the cost of one more matrix product.

    head: (N, n_embd) -> logits (N, vocab_size); x: (B, T, n_embd); targets: (B, T), -1 does not
    count
    """

    def loss_sum(x, y):
        return F.cross_entropy(head(x), y, ignore_index=-1, reduction='sum')

    total = 0
    for x, y in zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk)):
        total = total + recompute(loss_sum, x, y, preserve_rng_state=False)
    return total / (targets >= 0).sum()


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init, which takes long for large models and imports torch._dynamo."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') != 'torch.nn.init':
            return function(*args, **(kwargs or {}))
