"""bench.py --mode=data: the loader's batches, beside those of the simplest loader."""

import os
import tempfile
from statistics import median

import numpy as np
import torch

from data.loader import Loader
from data.tokenizer import dataset_dir, dataset_meta
from support.bench import spread


def run(bench, number=500):
    with tempfile.TemporaryDirectory() as folder:
        taken = time_loaders(bench, number, *get_tokens(bench, folder))
    shape = f'{bench.batch_size} sequences of {bench.block_size} tokens'
    print(f'batches of {shape}, to {bench.device}')
    size = number * bench.batch_size * bench.block_size
    # for each token the loader reads two bytes, and writes eight of X and eight of Y
    ceiling = bench.copy_ceiling('cpu') / 18
    for name, seconds in taken.items():
        speed, each = size / median(seconds), [t / number for t in seconds]
        note = f'{spread(each, 1e6, 0)} us a batch, {speed / ceiling:.0%} of copying'
        bench.report(name, speed / 1e6, 'M tokens/s', note, 1)
    ratio = median(taken['a window at a time']) / median(taken['flatgpt'])
    bench.report('ratio', ratio, 'times')


def time_loaders(bench, number, path, dtype):
    """Seconds for `number` batches; each time from the start, so that none is prefetched."""
    shape = bench.block_size, bench.batch_size, bench.vocab_size, bench.seed
    loader = Loader(path, *shape, device=bench.device)

    def ours():
        for _ in loader.train_batches(range(number)):
            pass

    def simplest():
        for _ in range(number):
            random_windows(bench, path, dtype)

    return bench.interleave({'flatgpt': ours, 'a window at a time': simplest}, bench.steps)


def get_tokens(bench, folder):
    """(path, dtype) of the dataset's tokens, or of random ones that are written into `folder`."""
    if bench.real_data:
        data_dir = dataset_dir(bench.dataset)
        dtype = dataset_meta(data_dir).get('dtype', 'uint16')
        return os.path.join(data_dir, 'train.bin'), dtype
    path = os.path.join(folder, 'train.bin')
    largest = min(bench.vocab_size, 65536)
    ids = np.random.default_rng(bench.seed).integers(0, largest, 10**7)
    ids.astype('uint16').tofile(path)
    return path, 'uint16'


def random_windows(bench, path, dtype):
    """
    A batch (X, Y) as the simplest loader makes it: open the file, copy random windows one by one.
    """
    ids, size = np.memmap(path, dtype=dtype, mode='r'), bench.block_size
    starts = torch.randint(len(ids) - size, (bench.batch_size,)).tolist()
    X = torch.stack([torch.from_numpy(ids[i : i + size].astype(np.int64)) for i in starts])
    Y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + size].astype(np.int64)) for i in starts])
    if bench.kind != 'cuda':
        return X.to(bench.device), Y.to(bench.device)
    X, Y = X.pin_memory(), Y.pin_memory()
    return X.to(bench.device, non_blocking=True), Y.to(bench.device, non_blocking=True)
