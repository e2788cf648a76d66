import numpy as np
import pytest

from data.loader import Loader
from data.order import indices, micro_batches, permute
from support.errors import FileError


def make(tmp_path, n=1000, block_size=8, batch_size=4, seed=1, vocab_size=1000, **share):
    """A Loader of the tokens 0, 1, ... n - 1."""
    path = tmp_path / 'train.bin'
    np.arange(n, dtype=np.uint16).tofile(path)
    return Loader(str(path), block_size, batch_size, vocab_size, seed, **share)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def batches_of(loader, n, iteration=0, most=2, rank=0, world_size=1):
    """The next n training batches of a rank, from `iteration` on."""
    return take(loader.train_batches(indices(iteration, most, 0, rank, world_size)), n)


@pytest.mark.parametrize('n', [1, 2, 3, 7, 64, 1000, 65537])
def test_permute_hits_every_place_once(n):
    assert sorted(permute(np.arange(n), n, seed=3)) == list(range(n))


def test_permute_of_a_huge_range_needs_no_table():
    there = permute(np.arange(100), 10**12, seed=3)
    assert len(set(there)) == 100
    assert there.max() < 10**12


def test_permute_looks_random():
    n = 4096
    there = permute(np.arange(n), n, seed=5)
    assert abs(np.corrcoef(np.arange(n), there)[0, 1]) < 0.05
    assert 0.45 < np.mean(np.diff(there) > 0) < 0.55
    assert not np.array_equal(there, permute(np.arange(n), n, seed=6))


def test_targets_are_the_inputs_one_later(tmp_path):
    X, Y = next(make(tmp_path).train_batches([0]))
    assert X.shape == Y.shape == (4, 8)
    assert (X[:, 1:] == Y[:, :-1]).all()
    assert (Y - X == 1).all()


def test_no_token_is_seen_twice_within_an_epoch(tmp_path):
    loader = make(tmp_path, n=1000, block_size=8)
    per_epoch = (1000 - 8) // 8
    for epoch in range(3):
        starts = loader.train_starts(epoch * per_epoch + np.arange(per_epoch))
        tokens = starts[:, None] + np.arange(8)
        assert len(np.unique(tokens)) == per_epoch * 8
        assert starts.min() >= 0 and starts.max() + 8 < 1000


def test_epochs_differ_in_order_and_in_where_the_cuts_fall(tmp_path):
    loader = make(tmp_path)
    first, second = loader.train_starts(np.arange(124)), loader.train_starts(np.arange(124, 248))
    assert not np.array_equal(first, second)
    phases = loader.train_starts(124 * np.arange(20)) % 8
    assert len(set(phases)) > 4


def test_a_batch_depends_on_seed_and_iteration_alone(tmp_path):
    straight = batches_of(make(tmp_path), 20)
    resumed = batches_of(make(tmp_path), 6, iteration=7)
    for (X, Y), (U, V) in zip(straight[14:], resumed, strict=True):
        assert X.equal(U) and Y.equal(V)
    other = batches_of(make(tmp_path, seed=2), 1)
    assert not straight[0][0].equal(other[0][0])


def test_batches_drawn_many_at_a_time_are_those_drawn_one_by_one(tmp_path):
    loader = make(tmp_path, n=300)  # 9 batches an epoch
    for number, (X, Y) in enumerate(loader.train_batches(range(700))):
        U, V = loader.gather(loader.train_starts(4 * number + np.arange(4)))
        assert X.equal(U) and Y.equal(V)
        assert X.is_contiguous() and Y.is_contiguous()
    assert number == 699


def rows_of(batches):
    """The input windows of some batches, a set."""
    return {tuple(row) for X, _ in batches for row in X.tolist()}


@pytest.mark.parametrize('world_size', [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(tmp_path, world_size):
    loader, share = make(tmp_path), 4 // world_size
    alone = batches_of(loader, 12, most=4)
    ranks = [batches_of(loader, 3 * share, 0, 4, rank, world_size) for rank in range(world_size)]
    for it in range(3):
        together = set()
        for batches in ranks:
            together |= rows_of(batches[share * it : share * (it + 1)])
        assert together == rows_of(alone[4 * it : 4 * (it + 1)])


def test_the_batch_grows_linearly_and_no_micro_batch_is_missed_or_seen_twice():
    firsts, counts = zip(*(micro_batches(it, 8, 16) for it in range(20)))
    assert counts[0] == 1 and counts[16:] == (8, 8, 8, 8)
    assert list(counts) == sorted(counts)
    for it, count in enumerate(counts[:16]):
        assert abs(count - 8 * (it + 1) / 17) < 1
    assert list(firsts) == [sum(counts[:it]) for it in range(20)]
    assert micro_batches(0, 8) == (0, 8)
    assert micro_batches(5, 8) == (40, 8)


@pytest.mark.parametrize('world_size', [1, 2, 4, 8])
def test_a_growing_batch_is_shared_completely_by_any_number_of_processes(world_size):
    for it in range(20):
        first, count = micro_batches(it, 8, 16)
        rounds = -(-count // world_size)
        shared = []
        for rank in range(world_size):
            shared += take(indices(it, 8, 16, rank, world_size), rounds)
        assert len(set(shared)) == len(shared) == rounds * world_size
        assert set(range(first, first + count)) <= set(shared)


@pytest.mark.parametrize('n, max_batches', [(1000, 1000), (1000, 3), (9, 5), (50, 2)])
@pytest.mark.parametrize('world_size', [1, 3])
def test_validation_windows_are_fixed_and_evenly_spaced(tmp_path, n, max_batches, world_size):
    """And divided among the ranks, padded with windows that do not count."""
    starts, targets = [], 0
    for rank in range(world_size):
        loader = make(tmp_path, n=n, rank=rank, world_size=world_size)
        for X, Y in loader.eval_batches(max_batches):
            assert X.shape == (4, 8)
            starts += X[Y[:, 0] >= 0, 0].tolist()
            targets += int((Y >= 0).sum())
    count = min((n - 1) // 8, max_batches * 4)
    assert len(set(starts)) == len(starts) == count
    assert targets == count * 8
    gaps = np.diff(sorted(starts))
    assert count == 1 or gaps.max() - gaps.min() <= 8


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match='token id 999, but vocab_size is 65'):
        make(tmp_path, vocab_size=65)


def test_a_block_longer_than_the_data_is_named(tmp_path):
    with pytest.raises(ValueError, match='block_size=64 needs at least 65'):
        make(tmp_path, n=64, block_size=64)
    X, _ = next(make(tmp_path, n=65, block_size=64).train_batches([0]))
    assert X[0, 0] == 0


def test_a_missing_dataset_error_gives_the_command_that_prepares_it():
    command = 'python data/text/prepare.py --input=... --dataset=poems'
    with pytest.raises(FileError, match=command):
        Loader('data/poems/train.bin', 8, 4, 65)
