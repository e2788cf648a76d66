"""
The order of the training data: which micro-batches an iteration has, and a random permutation.
"""

import numpy as np


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
