"""
Batches. The batch of an iteration is a function of (seed, iteration): windows of block_size + 1
tokens in a random order without replacement. So a resumed run needs no saved state, any number of
processes sees the same global batches, and a thread can prefetch.
"""

import glob
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from data.lines import find_starts, mask_targets
from data.order import indices, micro_batches, permute
from data.tokenizer import dataset_meta
from support.errors import FileError, UserError

MOST = 2**28  # maximum number of tokens in a batch
CHECKED = 50_000_000  # number of tokens whose ids are checked at the start


class MicroBatch(NamedTuple):
    X: torch.Tensor  # inputs, int64 token ids (batch_size, block_size)
    Y: torch.Tensor  # targets, the same shape; -1 does not count
    number: int  # within its iteration, over all processes
    divisor: float  # of its loss, so that the gradient is the mean over the iteration
    is_last: bool  # of its iteration, on this rank


def must_exist(path):
    """Raise FileError, with the command to type, if the .bin file at `path` is missing."""
    if os.path.isfile(path):
        return
    folder = os.path.dirname(path)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        others = glob.glob(os.path.join(os.path.dirname(folder), '*', 'train.bin'))
        names = sorted(os.path.basename(os.path.dirname(name)) for name in others)
        dataset = shlex.quote(os.path.basename(folder))
        script = (
            f'data/text/prepare.py --input=... --dataset={dataset} '
            f'(prepared are: {", ".join(names) or "none"})'
        )
    raise FileError(f'{path} not found; prepare the dataset first: python {script}')


def must_hold(path, block_size):
    """
    Return (number of tokens, dtype) of the .bin file at `path`. Raises UserError if it is too
    short for a sequence of block_size and its targets.
    """
    folder = os.path.dirname(path)
    dtype = np.dtype(dataset_meta(folder).get('dtype', 'uint16'))
    size = os.path.getsize(path)
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        raise UserError(
            f'{path} has {size:,} bytes, so it is no file of {dtype}; '
            f'prepare it again: python {folder}/prepare.py'
        )
    if count < block_size + 1:
        raise UserError(
            f'{path} has {count:,} tokens, block_size={block_size} needs at least '
            f'{block_size + 1:,}; lower --block_size'
        )
    return count, dtype


class Loader:
    """
    A .bin file of token ids (uint16, or the dtype in the meta.pkl beside it), cut into training
    batches and fixed validation windows.
    """

    def __init__(
        self,
        path,
        block_size,
        batch_size,
        vocab_size,
        seed=1337,
        lines=None,
        rank=0,
        world_size=1,
        device='cpu',
    ):
        """
        block_size, batch_size: a batch has the shape (batch_size, block_size)
        vocab_size: an id at or above it raises UserError, as does a file that is too short
        lines: a data.lines.Lines, for targets that do not count and windows that start with lines
        rank, world_size: which share of the batches this process takes
        device: where they go

        A missing file raises FileError.
        """
        must_exist(path)
        count, dtype = must_hold(path, block_size)
        if batch_size * block_size > MOST:
            raise UserError(
                f'batch_size={batch_size} x block_size={block_size} is more than {MOST:,} tokens; '
                'lower --batch_size'
            )
        self.path, self.vocab_size, self.seed = path, vocab_size, seed
        self.block_size, self.batch_size = block_size, batch_size
        self.rank, self.world_size, self.device = rank, world_size, device
        self.tokens = np.memmap(path, dtype=dtype, mode='r')
        self.windows = self.as_windows(self.tokens)
        # lines are found by reading all tokens anyway; otherwise each batch is checked too
        self.check(self.tokens if lines else self.tokens[:CHECKED])
        self.lines = lines
        self.mask = self.open_mask(path.removesuffix('.bin') + '.mask', count)
        self.masked = self.mask is not None or (lines is not None and lines.mark is not None)
        self.starts = None
        if lines and lines.align:
            self.starts = find_starts(self.tokens, lines, block_size)
        self.targets = batch_size * block_size  # average number of targets in a batch that count
        if self.masked:
            self.targets *= self.share_of_targets()

    def as_windows(self, array):
        """All windows of block_size + 1 elements, a view of shape (windows, elements)."""
        return np.lib.stride_tricks.sliding_window_view(array, self.block_size + 1)

    def open_mask(self, path, count):
        """Windows of the mask at `path` (uint8: does a token count?), None if it is missing."""
        if not os.path.exists(path):
            return None
        size = os.path.getsize(path)
        if size != count:
            raise UserError(
                f'{path} is not of {self.path}: {size:,} tokens, not {count:,}; '
                'prepare the dataset again'
            )
        return self.as_windows(np.memmap(path, dtype=np.uint8, mode='r'))

    def share_of_targets(self):
        """Share of targets that count, in 4096 training windows."""
        Y = self.gather(self.train_starts(np.arange(4096)))[1]
        share = (Y >= 0).double().mean().item()
        if not share:
            raise UserError(
                f'{self.path}: in 4096 windows nothing follows a prompt or mask_before_token, '
                'so no target counts'
            )
        return share

    def check(self, ids):
        if ids.max() >= self.vocab_size:
            raise UserError(
                f'{self.path} has token id {ids.max()}, but vocab_size is {self.vocab_size}; drop '
                '--vocab_size, or prepare the dataset again with the tokenizer of these weights'
            )

    def gather(self, starts):
        """Inputs and targets of the windows at `starts` (B,): int64 (B, T); -1 does not count."""
        windows = self.windows[starts]
        if len(self.tokens) > CHECKED:
            self.check(windows)
        # contiguous copies, for .view() and for pinned memory
        X, Y = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        if self.lines and self.lines.mark is not None:
            Y[~mask_targets(windows, self.lines)] = -1
        if self.mask is not None:
            Y[self.mask[starts][:, 1:] == 0] = -1
        return torch.from_numpy(X), torch.from_numpy(Y)

    def scale_loss(self, loss, Y):
        """Scale the mean loss of targets Y so that a target has the same weight in any batch."""
        if not self.masked:
            return loss
        count = (Y >= 0).sum()
        return loss.masked_fill(count == 0, 0.0) * count / self.targets

    def train_starts(self, numbers):
        """
        Where the training windows with these numbers start. numbers: (rows,), counted over the run.

        An epoch is all whole windows that fit side by side, shifted by a random phase, so that the
        cuts between windows move from epoch to epoch. Windows that start with lines are as many
        lines apart as a window has on average.
        """
        N, T = len(self.tokens), self.block_size
        if self.starts is not None:  # count in lines
            N, T = len(self.starts) + 1, max(1, round(len(self.starts) * T / N))
        per_epoch = max(1, (N - T) // T)
        starts, epochs = np.empty(len(numbers), dtype=np.int64), numbers // per_epoch
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = self.seed * 1_000_003 + int(epoch)
            phase = permute([0], N - per_epoch * T, key)[0]
            starts[here] = permute(numbers[here] % per_epoch, per_epoch, key) * T + phase
        return starts if self.starts is None else self.starts[starts]

    def iterations(self, first, most, warmup_iters):
        """
        Yield, for each iteration from `first` on, a generator of this rank's MicroBatches.

        most, warmup_iters: see micro_batches(). A rank without a micro-batch in an iteration's last
        round gets one whose divisor is infinite, so it adds nothing.
        """
        rank, world_size = self.rank, self.world_size
        batches = self.train_batches(indices(first, most, warmup_iters, rank, world_size))

        def of_iteration(count):
            for start in range(0, count, world_size):
                number = start + rank
                divisor = count / world_size if number < count else float('inf')
                yield MicroBatch(*next(batches), number, divisor, start + world_size >= count)

        while True:
            yield of_iteration(micro_batches(first, most, warmup_iters)[1])
            first += 1

    def train_batches(self, numbers):
        """
        Yield the training batches (X, Y) with these numbers (an iterable of ints): batch n has the
        windows n * batch_size and on. A thread prefetches, into pinned memory for CUDA, several
        batches at a time: for small batches numpy's calls cost more than their work.
        """
        pin = 'cuda' in self.device
        tokens = self.batch_size * self.block_size  # in a batch
        at_a_time = min(256, max(1, 2**19 // tokens))
        # batches whose order is drawn at once: at most 16 epochs, since each epoch costs a call
        drawn = max(at_a_time, min(4096, 16 * len(self.tokens) // tokens))
        numbers = iter(numbers)

        def starts():
            """Yield where the windows of each batch start, (batch_size,)."""
            while some := list(islice(numbers, drawn)):
                rows = np.array(some)[:, None] * self.batch_size + np.arange(self.batch_size)
                yield from self.train_starts(rows.ravel()).reshape(rows.shape)

        def load(batches):
            """Several batches as one; None after the last."""
            some = list(islice(batches, at_a_time))
            if not some:
                return None
            loaded = self.gather(np.concatenate(some))
            return [z.pin_memory() for z in loaded] if pin else loaded

        with ThreadPoolExecutor(1) as thread:
            batches = starts()
            ahead = thread.submit(load, batches)
            while loaded := ahead.result():
                ahead = thread.submit(load, batches)
                X, Y = (z.to(self.device, non_blocking=pin).split(self.batch_size) for z in loaded)
                yield from zip(X, Y)

    def eval_batches(self, max_batches):
        """
        Yield this rank's share (X, Y) of the fixed windows that a split is evaluated on: all of
        them, side by side, if they fit in max_batches * batch_size, otherwise that number, evenly
        spaced. With align_to_lines they start at evenly spaced lines instead. All ranks get equally
        many batches of the same shape; padding has targets of -1.
        """
        total = (len(self.tokens) - 1) // self.block_size
        count = min(total, max_batches * self.batch_size)
        starts = np.arange(count) * total // count * self.block_size
        if self.starts is not None:
            starts = self.starts[np.arange(count) * len(self.starts) // count]
        pin = 'cuda' in self.device  # a copy from other memory waits for earlier work
        for b in range(0, count, self.world_size * self.batch_size):
            here = starts[b + self.rank * self.batch_size :][: self.batch_size]
            missing = self.batch_size - len(here)
            X, Y = self.gather(np.append(here, np.repeat(starts[:1], missing)))
            Y[len(here) :] = -1
            if pin:
                X, Y = X.pin_memory(), Y.pin_memory()
            yield X.to(self.device, non_blocking=pin), Y.to(self.device, non_blocking=pin)
