import numpy as np
import pytest

from data.loader import Loader, indices, micro_batches, permute


def make(tmp_path, n=1000, block_size=8, batch_size=4, seed=1, vocab_size=1000):
    path = tmp_path / 'train.bin'
    (np.arange(n) % 1000).astype(np.uint16).tofile(path)
    return Loader(str(path), block_size, batch_size, vocab_size, seed)


def take(batches, n):
    return [next(batches) for _ in range(n)]


@pytest.mark.parametrize('n', [1, 2, 3, 7, 64, 1000, 65537])
def test_permute_hits_every_place_once(n):
    assert sorted(permute(np.arange(n), n, seed=3)) == list(range(n))


def test_permute_of_a_huge_range_needs_no_table():
    there = permute(np.arange(100), 10**12, seed=3)
    assert len(set(there)) == 100 and there.max() < 10**12


def test_permute_looks_random():
    n = 4096
    there = permute(np.arange(n), n, seed=5)
    assert abs(np.corrcoef(np.arange(n), there)[0, 1]) < 0.05
    assert 0.45 < np.mean(np.diff(there) > 0) < 0.55
    assert not np.array_equal(there, permute(np.arange(n), n, seed=6))


def test_targets_are_the_inputs_one_later(tmp_path):
    X, Y = next(make(tmp_path).train_batches([0], 'cpu'))
    assert X.shape == Y.shape == (4, 8)
    assert (X[:, 1:] == Y[:, :-1]).all() and (Y - X == 1).all()


def test_no_token_is_seen_twice_within_an_epoch(tmp_path):
    loader = make(tmp_path, n=1000, block_size=8, batch_size=4)
    per_epoch = (1000 - 8) // 8
    for epoch in range(3):
        starts = loader.train_starts(epoch * per_epoch + np.arange(per_epoch))
        tokens = np.concatenate([np.arange(s, s + 8) for s in starts])
        assert len(set(tokens)) == per_epoch * 8 and starts.min() >= 0 and starts.max() + 8 < 1000


def test_epochs_differ_in_order_and_in_where_the_cuts_fall(tmp_path):
    loader = make(tmp_path)
    first, second = loader.train_starts(np.arange(124)), loader.train_starts(np.arange(124, 248))
    assert not np.array_equal(first, second)
    assert len({loader.train_starts(np.array([124 * e]))[0] % 8 for e in range(20)}) > 4


def test_a_batch_depends_on_seed_and_iteration_alone(tmp_path):
    straight = take(make(tmp_path).train_batches(indices(0, 2, 0, 0, 1), 'cpu'), 20)
    resumed = take(make(tmp_path).train_batches(indices(7, 2, 0, 0, 1), 'cpu'), 6)
    for (X, Y), (U, V) in zip(straight[14:], resumed):
        assert (X == U).all() and (Y == V).all()
    other = next(make(tmp_path, seed=2).train_batches([0], 'cpu'))
    assert not (straight[0][0] == other[0]).all()


def test_batches_drawn_many_at_a_time_are_those_drawn_one_by_one(tmp_path):
    loader = make(tmp_path, n=300, block_size=8, batch_size=4)  # 9 batches an epoch
    for number, (X, Y) in enumerate(loader.train_batches(range(700), 'cpu')):
        U, V = loader.gather(loader.train_starts(4 * number + np.arange(4)))
        assert X.equal(U) and Y.equal(V) and X.is_contiguous() and Y.is_contiguous()
    assert number == 699


@pytest.mark.parametrize('world_size', [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(tmp_path, world_size):
    loader = make(tmp_path)
    alone = take(loader.train_batches(indices(0, 4, 0, 0, 1), 'cpu'), 12)
    ranks = [
        take(loader.train_batches(indices(0, 4, 0, rank, world_size), 'cpu'), 12 // world_size)
        for rank in range(world_size)
    ]
    for iteration in range(3):
        want = {
            tuple(row) for X, _ in alone[4 * iteration : 4 * iteration + 4] for row in X.tolist()
        }
        per_rank = 4 // world_size
        got = {
            tuple(row)
            for r in ranks
            for X, _ in r[per_rank * iteration : per_rank * (iteration + 1)]
            for row in X.tolist()
        }
        assert got == want


def test_the_batch_grows_linearly_and_no_micro_batch_is_missed_or_seen_twice():
    counts = [micro_batches(it, 8, 16)[1] for it in range(20)]
    assert counts[0] == 1 and counts[16:] == [8] * 4 and counts == sorted(counts)
    assert max(abs(count - 8 * (it + 1) / 17) for it, count in enumerate(counts[:16])) < 1
    firsts = [micro_batches(it, 8, 16)[0] for it in range(20)]
    assert firsts == [sum(counts[:it]) for it in range(20)]
    assert [micro_batches(it, 8) for it in (0, 5)] == [(0, 8), (40, 8)]


@pytest.mark.parametrize('world_size', [1, 2, 4, 8])
def test_a_growing_batch_is_dealt_whole_to_any_number_of_processes(world_size):
    for it in range(20):
        first, count = micro_batches(it, 8, 16)
        steps = -(-count // world_size)
        dealt = [
            number
            for rank in range(world_size)
            for number in take(indices(it, 8, 16, rank, world_size), steps)
        ]
        assert len(set(dealt)) == len(dealt) == steps * world_size and set(
            range(first, first + count)
        ) <= set(dealt)


@pytest.mark.parametrize('n, max_batches', [(1000, 1000), (1000, 3), (9, 5), (50, 2)])
@pytest.mark.parametrize('world_size', [1, 3])
def test_validation_windows_are_fixed_spread_evenly_and_shared(
    tmp_path, n, max_batches, world_size
):
    loader = make(tmp_path, n=n)
    batches = [
        b
        for rank in range(world_size)
        for b in loader.eval_batches(max_batches, rank, world_size, 'cpu')
    ]
    assert all(X.shape == (4, 8) for X, _ in batches)
    starts = sorted(int(x[0]) for X, Y in batches for x, y in zip(X, Y) if y[0] >= 0)
    count = min((n - 1) // 8, max_batches * 4)
    assert len(set(starts)) == len(starts) == count
    gaps = np.diff(starts)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 8
    assert sum(int((Y >= 0).sum()) for _, Y in batches) == count * 8


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match='token id 999, but vocab_size is 65'):
        make(tmp_path, vocab_size=65)


def test_a_block_longer_than_the_data_is_named(tmp_path):
    with pytest.raises(ValueError, match='block_size=64 needs at least 65'):
        make(tmp_path, n=64, block_size=64)
    X, _ = next(make(tmp_path, n=65, block_size=64).train_batches([0], 'cpu'))
    assert X[0, 0] == 0


def test_a_missing_dataset_says_which_command_prepares_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match='python data/text/prepare.py --input=... --dataset=poems'
    ):
        Loader('data/poems/train.bin', 8, 4, 65)
