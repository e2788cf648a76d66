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


def mix(x):
    """splitmix64's finalizer, uint64 array -> well-mixed uint64 array (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, seed):
    """
    Map `index` (array of ints in [0, n)) by the random permutation of range(n) that `seed` picks.

    This is a Feistel network over the smallest even number of bits that holds n, applied until the
    result is below n (Black & Rogaway 2002). It needs no table, so n may be a billion.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2 or 1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.array(index, dtype=np.uint64, ndmin=1)
    todo = np.ones(len(x), dtype=bool)
    with np.errstate(over='ignore'):
        rounds = np.arange(1, 7, dtype=np.uint64)
        keys = mix(np.uint64(seed % 2**64) + rounds * np.uint64(0x9E3779B97F4A7C15))
        while todo.any():
            left, right = x[todo] >> half, x[todo] & mask
            for key in keys:
                left, right = right, left ^ (mix(right + key) & mask)
            x[todo] = left << half | right
            todo = x >= n
    return x.astype(np.int64)


def micro_batches(iteration, most, warmup_iters=0):
    """
    (number of the first, number of micro-batches) of an iteration, over all processes. The second
    rises linearly to `most` during the first warmup_iters iterations.
    """
    steps = warmup_iters + 1
    if iteration >= warmup_iters:
        before = floor_sum(steps, steps, most, warmup_iters)
        return before + (iteration - warmup_iters) * most, most
    count = (most * (iteration + 1) + warmup_iters) // steps  # rounded up
    return floor_sum(iteration + 1, steps, most, warmup_iters), count


def floor_sum(n, m, a, b):
    """Sum of (a * i + b) // m for i in range(n), in as many steps as Euclid's algorithm takes."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b, m, a = top // m, top % m, a, m  # count the same points column by column


def indices(iteration, most, warmup_iters, rank, world_size):
    """
    Yield the numbers of one rank's micro-batches, from `iteration` on. All ranks get equally many.
    If an iteration's micro-batches do not divide evenly, its last round runs into the next one's.
    """
    while True:
        first, count = micro_batches(iteration, most, warmup_iters)
        rounds = -(-count // world_size)
        yield from range(first + rank, first + rounds * world_size, world_size)
        iteration += 1


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

    def __init__(self, path, block_size, batch_size, vocab_size, seed=1337, lines=None):
        """
        block_size, batch_size: a batch has the shape (batch_size, block_size)
        vocab_size: an id at or above it raises UserError, as does a file that is too short
        lines: a data.lines.Lines, for targets that do not count and windows that start with lines

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

    def iterations(self, first, most, warmup_iters, rank, world_size, device):
        """
        Yield, for each iteration from `first` on, a generator of this rank's MicroBatches.

        most, warmup_iters: see micro_batches(). A rank without a micro-batch in an iteration's last
        round gets one whose divisor is infinite, so it adds nothing.
        """
        numbers = indices(first, most, warmup_iters, rank, world_size)
        batches = self.train_batches(numbers, device)

        def of_iteration(count):
            for start in range(0, count, world_size):
                number = start + rank
                divisor = count / world_size if number < count else float('inf')
                yield MicroBatch(*next(batches), number, divisor, start + world_size >= count)

        while True:
            yield of_iteration(micro_batches(first, most, warmup_iters)[1])
            first += 1

    def train_batches(self, numbers, device):
        """
        Yield the training batches (X, Y) with these numbers (an iterable of ints), on `device`:
        batch n has the windows n * batch_size and on. A thread prefetches, into pinned memory for
        CUDA, several batches at a time: for small batches numpy's calls cost more than their work.
        """
        pin = 'cuda' in device
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
                X, Y = (z.to(device, non_blocking=pin).split(self.batch_size) for z in loaded)
                yield from zip(X, Y)

    def eval_batches(self, max_batches, rank, world_size, device):
        """
        Yield this rank's share (X, Y) of the fixed windows that a split is evaluated on: all of
        them, side by side, if they fit in max_batches * batch_size, otherwise that number, evenly
        spaced. All ranks get equally many batches of the same shape; padding has targets of -1.
        """
        total = (len(self.tokens) - 1) // self.block_size
        count = min(total, max_batches * self.batch_size)
        starts = np.arange(count) * total // count * self.block_size
        if self.starts is not None:
            starts = self.starts[np.arange(count) * len(self.starts) // count]
        pin = 'cuda' in device  # a copy from other memory waits for earlier work
        for b in range(0, count, world_size * self.batch_size):
            here = starts[b + rank * self.batch_size :][: self.batch_size]
            missing = self.batch_size - len(here)
            X, Y = self.gather(np.append(here, np.repeat(starts[:1], missing)))
            Y[len(here) :] = -1
            if pin:
                X, Y = X.pin_memory(), Y.pin_memory()
            yield X.to(device, non_blocking=pin), Y.to(device, non_blocking=pin)
