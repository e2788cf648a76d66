"""
Batches. The batch of an iteration is a pure function of (seed, iteration): windows of
block_size + 1 tokens, visited in a random order that never repeats within an epoch. So nothing
about the data needs saving, any number of processes sees the same global batches, and a thread
can work ahead.
"""

import glob
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from data.lines import find_starts, mask_targets
from data.tokenizer import dataset_meta

MOST = 2**28  # tokens of a batch
CHECKED = 50_000_000  # tokens that are looked through at the start for ids the model does not have


def mix(x):
    """splitmix64's finaliser: uint64 array -> well-mixed uint64 array (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, seed):
    """
    Where `index` (array of ints in [0, n)) lands in the seed-th random permutation of range(n).

    A Feistel network over the smallest even number of bits that holds n, walked until the result
    falls below n (Black & Rogaway 2002): no table, so a billion windows cost what ten do.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2 or 1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.array(index, dtype=np.uint64, ndmin=1)
    todo = np.ones(len(x), dtype=bool)
    with np.errstate(over='ignore'):
        keys = mix(
            np.uint64(seed % 2**64)
            + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        )
        while todo.any():
            left, right = x[todo] >> half, x[todo] & mask
            for key in keys:
                left, right = right, left ^ (mix(right + key) & mask)
            x[todo] = left << half | right
            todo = x >= n
    return x.astype(np.int64)


def micro_batches(iteration, most, warmup_iters=0):
    """
    (number of the first, how many) micro-batches of an iteration, over all processes: `most`, to which
    they grow linearly during the first warmup_iters iterations.
    """
    if iteration >= warmup_iters:
        grown = floor_sum(warmup_iters + 1, warmup_iters + 1, most, warmup_iters)
        return grown + (iteration - warmup_iters) * most, most
    count = lambda i: (most * (i + 1) + warmup_iters) // (warmup_iters + 1)  # rounded up
    return floor_sum(iteration + 1, warmup_iters + 1, most, warmup_iters), count(iteration)


def floor_sum(n, m, a, b):
    """The sum of (a * i + b) // m for i in range(n), in as many steps as Euclid's algorithm takes for a and m."""
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
    Numbers of the micro-batches that one process is dealt, from `iteration` on. All get equally many: where an
    iteration's do not divide, its last round runs into the numbers of the next, which deals them again.
    """
    while True:
        first, count = micro_batches(iteration, most, warmup_iters)
        yield from range(first + rank, first + -(-count // world_size) * world_size, world_size)
        iteration += 1


def must_exist(path):
    """Raise a FileNotFoundError that tells how to prepare the dataset, if the .bin file at `path` is not there."""
    if os.path.isfile(path):
        return
    folder = os.path.dirname(path)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        there = glob.glob(os.path.join(os.path.dirname(folder), '*', 'train.bin'))
        names = (
            ', '.join(sorted(os.path.basename(os.path.dirname(name)) for name in there)) or 'none'
        )
        script = f'data/text/prepare.py --input=... --dataset={shlex.quote(os.path.basename(folder))} (prepared are: {names})'
    raise FileNotFoundError(f'{path} not found; prepare the dataset first: python {script}')


def must_hold(path, block_size):
    """(tokens, dtype) of the .bin file at `path`; a ValueError if a sequence of block_size and its targets does not fit into it."""
    folder = os.path.dirname(path)
    dtype = np.dtype(dataset_meta(folder).get('dtype', 'uint16'))
    size = os.path.getsize(path)
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        raise ValueError(
            f'{path} has {size:,} bytes, so it is no file of {dtype}; prepare it again: python {folder}/prepare.py'
        )
    if count < block_size + 1:
        raise ValueError(
            f'{path} has {count:,} tokens, block_size={block_size} needs at least {block_size + 1:,}; lower --block_size'
        )
    return count, dtype


class Loader:
    """A .bin file of token ids (uint16, or what the meta.pkl beside it says), cut into training batches and fixed validation windows."""

    def __init__(self, path, block_size, batch_size, vocab_size, seed=1337, lines=None):
        """
        block_size, batch_size: the shape of a batch is (batch_size, block_size)
        lines: a data.lines.Lines, which says what targets count and where windows may begin; None: all, anywhere
        vocab_size: ids at or beyond it raise a ValueError; so do a missing file and one that is too short
        """
        must_exist(path)
        count, dtype = must_hold(path, block_size)
        if batch_size * block_size > MOST:
            raise ValueError(
                f'batch_size={batch_size} x block_size={block_size} is more than {MOST:,} tokens; lower --batch_size'
            )
        self.path, self.block_size, self.batch_size, self.vocab_size, self.seed = (
            path,
            block_size,
            batch_size,
            vocab_size,
            seed,
        )
        self.tokens = np.memmap(path, dtype=dtype, mode='r')
        self.windows = np.lib.stride_tricks.sliding_window_view(
            self.tokens, block_size + 1
        )  # (N - T, T + 1), a view
        self.check(
            self.tokens if lines else self.tokens[:CHECKED]
        )  # the rest is checked batch by batch
        self.lines = lines
        mask, self.mask = (
            path.removesuffix('.bin') + '.mask',
            None,
        )  # a byte for each token: does it count as a target?
        if os.path.exists(mask):
            if os.path.getsize(mask) != count:
                raise ValueError(
                    f'{mask} is not of {path}: {os.path.getsize(mask):,} tokens, not {count:,}; prepare the dataset again'
                )
            self.mask = np.lib.stride_tricks.sliding_window_view(
                np.memmap(mask, dtype=np.uint8, mode='r'), block_size + 1
            )
        self.masked = (
            self.mask is not None or lines is not None and lines.mark is not None
        )  # do some targets not count?
        self.starts = find_starts(self.tokens, lines, block_size) if lines and lines.align else None
        self.targets = batch_size * block_size  # how many of a batch count, on average
        if self.masked:
            share = (self.gather(self.train_starts(np.arange(4096)))[1] >= 0).double().mean().item()
            if not share:
                raise ValueError(
                    f'{path}: in 4096 windows nothing follows a prompt or mask_before_token, so no target counts'
                )
            self.targets *= share

    def check(self, ids):
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f'{self.path} has token id {ids.max()}, but vocab_size is {self.vocab_size}; '
                f'drop --vocab_size, or prepare the dataset again with the tokenizer of these weights'
            )

    def gather(self, starts):
        """The windows that begin at `starts` (B,): inputs and targets, int64 tensors of shape (B, T); a target of -1 does not count."""
        windows = self.windows[starts]
        if len(self.tokens) > CHECKED:
            self.check(windows)
        X, Y = (
            windows[:, :-1].astype(np.int64),
            windows[:, 1:].astype(np.int64),
        )  # copies of one piece each, as a GPU and .view() want them
        if self.lines and self.lines.mark is not None:
            Y[~mask_targets(windows, self.lines)] = -1
        if self.mask is not None:
            Y[self.mask[starts][:, 1:] == 0] = -1
        return torch.from_numpy(X), torch.from_numpy(Y)

    def scale_loss(self, loss, Y):
        """The mean loss of a micro-batch with targets Y, so scaled that a target weighs the same in whichever micro-batch it is."""
        if not self.masked:
            return loss
        counting = (Y >= 0).sum()
        return loss.masked_fill(counting == 0, 0.0) * counting / self.targets

    def train_starts(self, numbers):
        """
        Where the training windows with these numbers (rows,), counted over the whole run, begin (rows,).

        An epoch is as many whole windows as fit side by side, shifted by a random phase that
        changes with the epoch, so that the cuts between windows move. Windows that begin with
        lines are as many lines apart as a window has on average.
        """
        N, T = len(self.tokens), self.block_size
        if self.starts is not None:
            N, T = len(self.starts) + 1, max(1, round(len(self.starts) * T / N))  # counted in lines
        per_epoch = max(1, (N - T) // T)
        starts, epochs = np.empty(len(numbers), dtype=np.int64), numbers // per_epoch
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = self.seed * 1_000_003 + int(epoch)
            phase = permute([0], N - per_epoch * T, key)[0]
            starts[here] = permute(numbers[here] % per_epoch, per_epoch, key) * T + phase
        return starts if self.starts is None else self.starts[starts]

    def train_batches(self, numbers, device):
        """
        The training micro-batches (X, Y) with these numbers (an iterable of ints), on `device`: number n
        holds the windows n * batch_size and on of the run, whoever asks. A thread works ahead, in pinned
        memory for CUDA, by several at a time: numpy's calls cost more than their work on a small batch.
        """
        pin = 'cuda' in device
        numbers, at_a_time = (
            iter(numbers),
            min(256, max(1, 2**19 // (self.batch_size * self.block_size))),
        )
        drawn = max(
            at_a_time, min(4096, 16 * len(self.tokens) // (self.batch_size * self.block_size))
        )  # some epochs at most: each costs a call

        def starts():
            """Where the windows of one batch after the other begin, (batch_size,) each."""
            while some := list(islice(numbers, drawn)):
                rows = np.array(some)[:, None] * self.batch_size + np.arange(self.batch_size)
                yield from self.train_starts(rows.ravel()).reshape(rows.shape)

        def load(batches):
            """Several batches, one below the other; None after the last."""
            some = list(islice(batches, at_a_time))
            loaded = self.gather(np.concatenate(some)) if some else None
            return [z.pin_memory() for z in loaded] if some and pin else loaded

        with ThreadPoolExecutor(1) as thread:
            batches = starts()
            ahead = thread.submit(load, batches)
            while loaded := ahead.result():
                ahead = thread.submit(load, batches)
                yield from zip(
                    *(z.to(device, non_blocking=pin).split(self.batch_size) for z in loaded)
                )

    def eval_batches(self, max_batches, rank, world_size, device):
        """
        This rank's share of the fixed windows that loss is measured on: the whole split, side by side,
        when it fits in max_batches * batch_size windows, else that many spread evenly (so are those that
        begin with lines). All ranks get equally many batches of the same shape; what fills them up has
        targets of -1, which do not count.
        """
        total = (len(self.tokens) - 1) // self.block_size
        count = min(total, max_batches * self.batch_size)
        starts = np.arange(count) * total // count * self.block_size
        if self.starts is not None:
            starts = self.starts[np.arange(count) * len(self.starts) // count]
        for b in range(0, count, world_size * self.batch_size):
            here = starts[b + rank * self.batch_size :][: self.batch_size]
            missing = self.batch_size - len(here)
            X, Y = self.gather(np.append(here, np.repeat(starts[:1], missing)))
            Y[len(here) :] = -1
            pin = 'cuda' in device  # from other memory a copy waits for the work before it
            yield tuple((z.pin_memory() if pin else z).to(device, non_blocking=pin) for z in (X, Y))
