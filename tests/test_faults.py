"""
Runs that are killed, stopped, out of disk space, damaged: what is lost, and is the result the same?
`python -m pytest tests/test_faults.py` ends with the table of docs/training.md.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY

from support import checkpoint as ckpt
from support.runlog import read_log

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals and fork are those of POSIX')
LONG = [
    *TINY,
    '--dropout=0.2',
    '--gradient_accumulation_steps=3',
    '--eval_interval=20',
    '--max_iters=100',
]


PLAIN_NAMES = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
import support.files
support.files.partial_name = lambda path: path + '.partial'
runpy.run_path('train.py', run_name='__main__')
"""


class Runs:
    """Runs of train.py that can be killed. Their output is appended to the file OUT_DIR.txt."""

    def __init__(self, project):
        self.project, self.wait = project, project.spawner.wait
        (project.path / 'plain_names.py').write_text(PLAIN_NAMES)

    def start(self, out, *flags, script=('train.py',)):
        path = self.project.path / f'{out}.txt'
        command = [*script, *flags, f'--out_dir={out}']
        return self.project.spawner.start(command, self.project.path, path, path)

    def run(self, out, *flags, **kwargs):
        return self.wait(self.start(out, *flags, **kwargs)), self.text(out)

    def text(self, out):
        path = self.project.path / f'{out}.txt'
        return path.read_text() if path.exists() else ''


@pytest.fixture(scope='module')
def runs(project):
    return Runs(project)


@pytest.fixture(scope='module')
def straight(runs):
    """The run LONG without any fault."""
    assert runs.run('straight', *LONG)[0] == 0
    return runs.project.path / 'straight'


def equal(a, b):
    """Are two values (dicts, lists, tensors, ...) the same, bit for bit?"""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def outcome(folder):
    """Everything that faults must not change: weights, optimizer, best weights, log."""
    checkpoint = ckpt.load(str(folder / 'ckpt.pt'))
    names = ('model', 'iter_num', 'best_val_loss', 'best_iter', 'best_file')
    columns = 'iter tokens loss train_loss val_loss lr grad_norm weight_norm'.split()
    return [
        {name: checkpoint[name] for name in names},
        ckpt.read(str(folder / checkpoint['optimizer_file'])),
        ckpt.load(str(folder / 'best.pt'))['model'] if (folder / 'best.pt').exists() else None,
        [[row.get(name) for name in columns] for row in read_log(folder / 'log.csv')],
    ]


def until(condition, seconds=60):
    """Wait for condition() to be true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.005)


def saved_at(folder):
    """Iteration of the checkpoint in `folder`, 0 without one."""
    if not (folder / 'ckpt.pt').exists():
        return 0
    names = [p.stem for p in folder.glob('optimizer-*.pt')]
    return max([int(name.split('-')[1]) for name in names], default=0)


SAVES = ['--eval_interval=16', '--save_interval=1', '--max_iters=32', '--keep_checkpoints=3']


def kill_at_random(runs, pid, folder, length, kills, moment):
    """Kill a run that takes `length` seconds: (exit code, was it saving?)."""
    time.sleep(moment.uniform(0.0, 0.6 * length))
    end = time.time() + 0.2 * (kills % 2)  # every second time, wait for the next save
    saving = any(folder.glob('*.partial'))
    while not saving and time.time() < end:
        saving = any(folder.glob('*.partial'))
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.kill(pid, signal.SIGKILL)
    return runs.wait(pid), saving


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same_bit_for_bit(runs, tried):
    flags = [*TINY, *SAVES, '--dropout=0.2', '--gradient_accumulation_steps=2']
    flags += ['--always_save_checkpoint=False', '--init_from=auto']
    runs.run('warm', *flags)  # the first run waits for the import of torch
    start = time.time()
    assert runs.run('unkilled', *flags)[0] == 0
    length = time.time() - start
    want, moment = outcome(runs.project.path / 'unkilled'), random.Random(1337)
    folder = runs.project.path / 'killed'
    kills = while_saving = ends = different = 0
    while kills < 100 or folder.exists():  # the last run completes too
        pid = runs.start('killed', *flags)
        saving = False
        if kills < 100:
            code, saving = kill_at_random(runs, pid, folder, length, kills, moment)
        else:
            code = runs.wait(pid)
        if code == -signal.SIGKILL:
            kills, while_saving = kills + 1, while_saving + saving
        else:
            ends, different = ends + 1, different + (not equal(outcome(folder), want))
            shutil.rmtree(folder)
    tried(
        'kill -9 at a random moment, restart with --init_from=auto',
        f'{kills} kills, {while_saving} of them within a save',
        f'{ends} runs completed, {different} results different',
    )
    assert different == 0 and while_saving > 0


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_a_signal_ends_a_run_with_all_its_work_saved(runs, straight, tried, name):
    out = f'stopped-{name}'
    pid = runs.start(out, *LONG)
    until(lambda: len(read_log(runs.project.path / out / 'log.csv')) > 30)
    os.kill(pid, getattr(signal, name))
    assert runs.wait(pid) == 0
    text = runs.text(out)
    assert 'stopped: iteration ' in text
    assert 'next: the same command with --init_from=resume' in text
    stopped = saved_at(runs.project.path / out)
    assert 20 < stopped < 100 and f'iteration {stopped},' in text
    last = max(row['iter'] for row in read_log(runs.project.path / out / 'log.csv'))
    code, text = runs.run(out, *LONG, '--init_from=resume')
    assert code == 0 and f'resuming {out}/ckpt.pt at iteration {stopped}' in text
    assert last == stopped - 1 and equal(outcome(runs.project.path / out), outcome(straight))
    tried(name, 'once', 'saved at that iteration, exit code 0, nothing lost')


@pytest.mark.parametrize('name, code', [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_signal_in_the_first_iteration_ends_a_run_at_once(runs, tried, name, code):
    pid = runs.start(f'hurry-{name}', *TINY, '--gradient_accumulation_steps=100000')
    until(lambda: 'step 0:' in runs.text(f'hurry-{name}'))
    start = time.time()
    os.kill(pid, getattr(signal, name))
    assert runs.wait(pid) == code and time.time() - start < 2
    result = f'ended at once, exit code {code}; there was nothing to lose'
    tried(f'{name} within the first iteration', 'once', result)


def test_a_pipe_that_nobody_reads_any_more_ends_no_run(project, straight, tried):
    """Such as that of a `| tee` that was killed, or a closed terminal."""
    command = f'{sys.executable} train.py {" ".join(LONG)} --out_dir=unread 2>&1'
    done = subprocess.run(
        command + ' | head -n 3; exit ${PIPESTATUS[0]}',
        shell=True,
        executable=shutil.which('bash'),
        cwd=project.path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert equal(outcome(project.path / 'unread'), outcome(straight))
    tried(
        'output into a pipe whose reader has exited',
        'once',
        'the run continues, the same result, exit code 0',
    )


LINKED = ('plain_names.py', 'train.py')  # writes to the temporary files that a test has linked


def test_a_full_disk_costs_no_more_than_that_save(runs, straight, tried):
    folder = runs.project.path / 'full'
    folder.mkdir()
    # the kernel answers "no space left on device" to every write: at iteration 20 to the second
    # file of a save, at iteration 40 to the first
    (folder / 'ckpt.pt.partial').symlink_to('/dev/full')
    (folder / 'optimizer-40.pt.partial').symlink_to('/dev/full')
    code, text = runs.run('full', *LONG, script=LINKED)
    lines = [line for line in text.splitlines() if 'No space left on device' in line]
    assert [line.split(':')[0] for line in lines] == ['iteration 20', 'iteration 40']
    assert 'training continues' in lines[0]
    assert code == 0 and equal(outcome(folder), outcome(straight))
    result = 'one line each; the previous pair stays, the next save is complete; exit code 0'
    tried('disk full at a save', '2 saves', result)


def test_a_disk_that_stays_full_leaves_the_last_good_pair_and_an_exit_code(runs, straight, tried):
    folder = runs.project.path / 'fuller'
    assert runs.run('fuller', *LONG, '--max_iters=80')[0] == 0
    (folder / 'ckpt.pt.partial').symlink_to('/dev/full')
    code, text = runs.run('fuller', *LONG, '--init_from=resume', script=LINKED)
    assert code == 1 and 'error: ckpt.pt could not be written at the last attempt' in text
    assert ckpt.load(str(folder))['iter_num'] == 80 and (folder / 'optimizer-80.pt').exists()
    assert runs.run('fuller', *LONG, '--init_from=auto')[0] == 0
    assert equal(outcome(folder), outcome(straight)) and not list(folder.glob('*.partial'))
    tried('disk full at the last save', 'once', 'the previous pair stays valid, exit code 1')


def assert_explained(text, causes):
    """Every line about a failed write names one of the causes."""
    for line in text.splitlines():
        assert 'training continues' not in line or any(cause in line for cause in causes), line


def test_a_folder_that_goes_away_and_comes_back(runs, straight, tried):
    folder, away = runs.project.path / 'gone', runs.project.path / 'gone-elsewhere'
    pid = runs.start('gone', *LONG, '--save_interval=5')
    until(lambda: saved_at(folder) >= 10)
    os.kill(pid, signal.SIGSTOP)  # otherwise it might make a new folder in between
    folder.rename(away)
    folder.write_text('a file where the folder was')
    os.kill(pid, signal.SIGCONT)
    until(lambda: 'training continues, the next save' in runs.text('gone'))
    first = runs.text('gone')
    folder.unlink()
    assert runs.wait(pid) == 0
    causes = ['Not a directory', 'File exists']
    assert_explained(first, causes)
    causes.append('No such file or directory')  # until a save makes a new folder
    assert_explained(runs.text('gone'), causes)
    assert ckpt.load(str(away))['iter_num'] >= 5  # its optimizer file came first
    assert equal(outcome(folder)[:2], outcome(straight)[:2])
    result = 'one line per save, then a new folder; lost: rows of the log'
    tried('out_dir removed during a run', 'once', result)


def test_a_flipped_bit_is_noticed_or_harmless(runs, straight, tmp_path, tried):
    """Every bit that matters is under a checksum; some of the zip file's padding is not."""
    rng = np.random.default_rng(1337)
    refused = 0
    for name in ('ckpt.pt', 'optimizer-100.pt'):
        content = (straight / name).read_bytes()
        want = torch.load(straight / name, weights_only=True)
        for _ in range(150):
            damaged = bytearray(content)
            damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            try:
                assert equal(ckpt.read(str(tmp_path / name)), want)
            except ValueError as e:
                assert 'truncated or damaged' in str(e)
                refused += 1
    assert refused > 150
    result = f'{refused} one-line errors, {300 - refused} in padding: content the same'
    tried('one bit flipped in a checkpoint', '300 bits', result)


def test_a_truncated_checkpoint_is_refused_at_any_length(straight, tmp_path, tried):
    content, rng = (straight / 'ckpt.pt').read_bytes(), np.random.default_rng(1337)
    for length in [0, 1, len(content) - 1, *rng.integers(len(content), size=50)]:
        (tmp_path / 'ckpt.pt').write_bytes(content[:length])
        with pytest.raises(ValueError, match='truncated or damaged'):
            ckpt.load(str(tmp_path))
    tried('checkpoint truncated', '53 lengths', 'one-line errors')


def test_an_optimizer_file_that_is_missing_or_of_another_model_is_one_line(
    project, straight, tmp_path
):
    for name in ('ckpt.pt', 'optimizer-100.pt'):
        shutil.copy(straight / name, tmp_path / name)
    other = torch.load(tmp_path / 'optimizer-100.pt', weights_only=True)
    other['param_groups'][0]['params'].pop()
    torch.save(other, tmp_path / 'optimizer-100.pt')
    flags = [*TINY, '--init_from=resume', f'--out_dir={tmp_path}']
    assert 'optimizer state does not fit this model' in project.error('train.py', *flags)
    (tmp_path / 'optimizer-100.pt').unlink()
    assert 'optimizer-100.pt not found' in project.error('train.py', *flags)


def test_a_hostile_file_is_refused_and_executes_nothing(project, straight, tmp_path, tried):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    for name in ('ckpt.pt', 'optimizer-100.pt'):
        shutil.copy(straight / 'ckpt.pt', tmp_path / 'ckpt.pt')
        torch.save({'model': Evil(), 'state': {}, 'param_groups': []}, tmp_path / name)
        line = project.error('train.py', *TINY, '--init_from=resume', f'--out_dir={tmp_path}')
        assert f'{name} refused: it holds code' in line and not (tmp_path / 'executed').exists()
    result = 'one-line errors, nothing executed'
    tried('hostile checkpoint, optimizer file, meta.pkl', 'one each', result)


def test_keep_checkpoints_keeps_the_latest_pairs_and_each_can_be_gone_back_to(runs, straight):
    assert runs.run('history', *LONG, '--keep_checkpoints=3')[0] == 0
    folder = runs.project.path / 'history'
    pairs = {f'{kind}-{n}.pt' for kind in ('ckpt', 'optimizer') for n in (60, 80, 100)}
    assert {p.name for p in folder.glob('*.pt')} == {'ckpt.pt', *pairs}
    latest = (folder / 'ckpt-100.pt').read_bytes()
    shutil.copy(folder / 'ckpt-60.pt', folder / 'ckpt.pt')
    assert (folder / 'ckpt-100.pt').read_bytes() == latest
    code, text = runs.run('history', *LONG, '--init_from=resume')
    assert code == 0 and 'at iteration 60' in text
    assert equal(outcome(folder)[:2], outcome(straight)[:2])


def rates(rate):
    return [f'--learning_rate={rate}', f'--min_lr={rate}']


KEEP_BEST = '--always_save_checkpoint=False'


def test_the_best_is_kept_beside_the_last(runs, project):
    # at this rate the loss goes up and down
    assert runs.run('best', *LONG, KEEP_BEST, *rates(0.3))[0] == 0
    folder = project.path / 'best'
    rows = [row for row in read_log(folder / 'log.csv') if 'val_loss' in row and row['iter'] > 0]
    lowest = min(rows, key=lambda row: row['val_loss'])
    best, last = ckpt.load(str(folder)), ckpt.load(str(folder / 'ckpt.pt'))
    assert best['path'].endswith('best.pt')
    assert best['iter_num'] == best['best_iter'] == lowest['iter']
    assert last['iter_num'] == 100 and last['best_val_loss'] == best['best_val_loss']
    assert best['best_val_loss'] == pytest.approx(lowest['val_loss'])
    sample = 'sample.py', '--device=cpu', '--out_dir=best', '--num_samples=1', '--max_new_tokens=5'
    assert 'out_dir' not in project.run(*sample).stderr
    # now only the last is asked for
    assert runs.run('best', *LONG, '--init_from=resume', '--max_iters=120')[0] == 0
    if (folder / 'best.pt').exists():
        last = ckpt.load(str(folder / 'ckpt.pt'))
        assert ckpt.load(str(folder))['best_val_loss'] == last['best_val_loss']


def test_gone_back_the_best_of_what_came_after_is_no_longer_the_best(runs, project):
    assert runs.run('back', *LONG, KEEP_BEST, '--keep_checkpoints=9')[0] == 0
    folder = project.path / 'back'
    assert ckpt.load(str(folder))['iter_num'] == 100
    shutil.copy(folder / 'ckpt-40.pt', folder / 'ckpt.pt')
    shutil.copy(folder / 'ckpt-40.pt', folder / 'ckpt-mine.pt')  # the user's own copy stays
    project.run('train.py', *LONG, '--out_dir=back', '--init_from=resume', '--eval_only=True')
    assert (folder / 'best.pt').exists()  # an evaluation changes nothing
    flags = [KEEP_BEST, '--init_from=resume', '--max_iters=60', *rates(5)]
    assert runs.run('back', *LONG, *flags)[0] == 0
    # nothing better has come, and iteration 40 no longer has a file of its own
    assert ckpt.load(str(folder))['path'].endswith('ckpt.pt')
    assert not (folder / 'best.pt').exists() and (folder / 'ckpt-mine.pt').exists()


def test_fine_tuning_that_only_makes_it_worse_leaves_the_weights_it_began_with(
    runs, project, trained
):
    flags = [*TINY, '--init_from=out-trained', KEEP_BEST, *rates(5), '--max_iters=10']
    code, text = runs.run('worse', *flags)
    assert code == 0 and ckpt.load(str(project.path / 'worse'))['iter_num'] == 0
    a, b = (ckpt.load(str(project.path / name))['model'] for name in ('worse', 'out-trained'))
    assert all(a[name].equal(b[name]) for name in b)


def test_a_run_in_the_folder_of_another_says_so(runs):
    assert 'holds an earlier run' not in runs.run('twice', *TINY)[1]
    assert 'twice holds an earlier run: its log is replaced now' in runs.run('twice', *TINY)[1]


FILES = {'ckpt.pt', 'config.py', 'log.csv', 'loss.png', 'run.lock'}


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one(runs, project):
    assert runs.run('reused', *LONG, KEEP_BEST)[0] == 0
    assert (project.path / 'reused' / 'best.pt').exists()
    assert runs.run('reused', *LONG, '--max_iters=40', '--seed=3')[0] == 0
    assert set(os.listdir(project.path / 'reused')) == {*FILES, 'optimizer-40.pt'}
    assert max(row['iter'] for row in read_log(project.path / 'reused' / 'log.csv')) == 40


def test_a_torn_log_costs_its_torn_row_and_nothing_else(runs, straight):
    assert runs.run('torn', *LONG, '--max_iters=60')[0] == 0
    path = runs.project.path / 'torn' / 'log.csv'
    with open(path, 'ab') as f:
        f.write(b'\0\0\0' + b'60,1')  # a power cut, a full disk
    # iterations 60 to 99 and evaluations 80 and 100 are missing
    assert len(read_log(path)) == len(read_log(straight / 'log.csv')) - 42
    assert runs.run('torn', *LONG, '--init_from=resume')[0] == 0
    assert equal(outcome(runs.project.path / 'torn'), outcome(straight))


def test_a_new_run_that_dies_before_its_first_save_does_not_resume_the_old_one(runs):
    assert runs.run('died', *LONG, '--max_iters=20')[0] == 0
    pid = runs.start('died', *LONG, '--seed=5', '--save_interval=1000')
    until(lambda: runs.text('died').count('iter 5:') == 2)
    os.kill(pid, signal.SIGKILL)
    runs.wait(pid)
    code, text = runs.run('died', *LONG, '--seed=5', '--init_from=auto', '--max_iters=20')
    assert code == 0 and 'resuming' not in text
    # the old optimizer file was not overwritten
    assert set(os.listdir(runs.project.path / 'died')) == {*FILES, 'optimizer-20-1.pt'}


def test_divergence_stops_the_run_and_leaves_the_last_checkpoint(runs, tried):
    assert runs.run('diverged', *LONG, '--max_iters=40')[0] == 0
    folder = runs.project.path / 'diverged'
    before = {p.name: p.read_bytes() for p in folder.glob('*.pt')}
    flags = ['--init_from=resume', *rates('1e36'), '--save_interval=1', '--max_bad_steps=7']
    code, text = runs.run('diverged', *LONG, *flags)
    line = 'error: no finite loss or gradient in 7 steps in a row; '
    assert code == 1 and text.splitlines()[-1].startswith(line)
    assert before == {p.name: p.read_bytes() for p in folder.glob('*.pt')}
    rows = [row for row in read_log(folder / 'log.csv') if row['iter'] >= 40 and 'bad_steps' in row]
    assert [row['bad_steps'] for row in rows] == [0] + [1] * 7
    result = 'stopped after max_bad_steps, the checkpoint from before it untouched'
    tried('divergence (learning rate of 1e36), saving at every step', 'once', result)


BAD_LOSS = """
import sys, os, runpy, torch.nn.functional as F
real, calls = F.cross_entropy, 0
def cross_entropy(logits, targets, **kwargs):
    global calls
    loss = real(logits, targets, **kwargs)
    if not logits.requires_grad:
        return loss
    calls += 1
    bad = calls == 7 and os.environ.get('RANK', '1') == '1'
    return loss + float('inf') if bad else loss
F.cross_entropy = cross_entropy
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.parametrize('processes', [1, 2])
def test_a_step_with_an_infinite_loss_is_skipped_by_all(project, processes, tried):
    """An infinite loss whose gradient is finite, on one rank only: the hardest to notice."""
    (project.path / 'bad_loss.py').write_text(BAD_LOSS)
    where, it = ('in a single process', 3) if processes == 1 else ('on one of 2 processes', 6)
    folder = project.path / f'skipped-{processes}'
    flags = [*TINY, '--gradient_accumulation_steps=2', '--max_iters=10', '--eval_interval=100']
    flags += ['--save_interval=1', '--keep_checkpoints=20', f'--out_dir={folder.name}']
    project.run('bad_loss.py', 'train.py', *flags, processes=processes)
    bad = [row['iter'] for row in read_log(folder / 'log.csv') if row.get('bad_steps')]
    assert bad == [it]  # the seventh micro-batch of that process

    def steps(n):
        """The number of steps that the optimizer had taken at iteration n."""
        state = torch.load(folder / f'optimizer-{n}.pt', weights_only=True)['state']
        return state[0]['step'].item()

    # not saved before the bad step; the save after it has one step more than the save before it
    assert not (folder / f'ckpt-{it}.pt').exists() and (folder / f'ckpt-{it + 1}.pt').exists()
    assert (steps(it - 1), steps(it + 1), steps(it + 2)) == (it - 1, it, it + 1)
    result = 'that step skipped by all, counted and logged; nothing else lost'
    tried(f'an infinite loss {where}', 'once', result)
