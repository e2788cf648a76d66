"""Files are written whole or not at all; paths and streams of every kind work."""

import os
import subprocess
import sys
import time

import pytest
from conftest import TINY, write_dataset

from support import plot, runlog
from support.files import partial_name, remove_partials, write_whole

posix = pytest.mark.skipif(os.name != 'posix', reason='needs POSIX')
SAMPLE = ['--device=cpu', '--start=to', '--max_new_tokens=3']


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = str(tmp_path / 'a.txt')

    def write(f):
        f.write(b'first')
        write_whole(path, lambda other: other.write(b'second'))
        assert open(path, 'rb').read() == b'second'

    write_whole(path, write)
    assert open(path, 'rb').read() == b'first' and os.listdir(tmp_path) == ['a.txt']


def test_files_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    left, mine = partial_name(str(tmp_path / 'ckpt.pt')), tmp_path / 'download.partial'
    open(left, 'w').close()
    mine.touch()
    remove_partials(tmp_path)
    assert os.listdir(tmp_path) == ['download.partial']


@posix
def test_a_device_a_pipe_and_a_link_stay_what_they_are(tmp_path):
    write_whole('/dev/null', lambda f: f.write(b'x'))
    assert os.path.exists('/dev/null') and not os.path.isfile('/dev/null')
    fifo, target, link = tmp_path / 'fifo', tmp_path / 'target', tmp_path / 'link'
    os.mkfifo(fifo)
    reader = subprocess.Popen(['cat', fifo], stdout=subprocess.PIPE)
    write_whole(str(fifo), lambda f: f.write(b'text'))
    assert reader.communicate()[0] == b'text' and not fifo.is_file()
    link.symlink_to(target)
    write_whole(str(link), lambda f: f.write(b'text'))
    assert link.is_symlink() and target.read_bytes() == b'text'


@posix
def test_sample_writes_to_a_device(project, trained):
    project.run('sample.py', *SAMPLE, f'--out_dir={trained[0]}', '--output=/dev/null')
    assert not os.path.isfile('/dev/null')


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [dict(iter=0, seconds=1.0, val_loss=2.0), dict(iter=5, seconds=2.0, val_loss=1.0)]
    png = str(tmp_path / 'loss.png')
    plot.draw({'run': rows}, png)
    before = open(png, 'rb').read()

    def full(path, write):
        def fail(f):
            raise OSError(28, 'No space left on device')

        write_whole(path, fail)

    monkeypatch.setattr(plot, 'write_whole', full)
    with pytest.raises(OSError, match='No space'):
        plot.draw({'run': rows}, png)
    assert open(png, 'rb').read() == before
    assert os.listdir(tmp_path) == ['loss.png']


@posix
def test_a_second_run_in_the_same_folder_is_refused(project):
    run = ['train.py', *TINY, '--out_dir=out-two-runs']
    slow = [*run, *(f'--{name}=100000' for name in ('max_iters', 'eval_interval', 'save_interval'))]
    command = [sys.executable, *slow]
    first = subprocess.Popen(command, cwd=project.path, stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if line.startswith('iter 3:'):
                break
        message = project.error(*slow)
        assert (
            f"out_dir='out-two-runs' is that of a run under way (process {first.pid} on " in message
        )
        rows = runlog.read_log(project.path / 'out-two-runs' / 'log.csv')
        assert rows and not (project.path / 'out-two-runs' / 'ckpt.pt.old').exists()
    finally:
        first.kill()  # a dead run does not leave its lock in the way
        first.wait()
    project.run(*run, '--max_iters=2')


def test_a_run_may_follow_another_in_one_process(tmp_path):
    for _ in range(2):
        log = runlog.RunLog(str(tmp_path), {})
        log.close()


@posix
@pytest.mark.parametrize(
    'script, flags',
    [
        ('train.py', [*TINY, '--out_dir=out-closed', '--max_iters=2']),
        ('eval.py', ['--out_dir=out-trained', '--device=cpu']),
        ('sample.py', [*SAMPLE, '--out_dir=out-trained']),
    ],
)
def test_scripts_run_with_closed_streams(project, trained, script, flags):
    command = f'"{sys.executable}" {script} {" ".join(flags)} >&- 2>&-'
    assert subprocess.run(['bash', '-c', command], cwd=project.path, timeout=120).returncode == 0


@posix
@pytest.mark.parametrize('ascii', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_paths_and_names_of_any_bytes_work(project, tmp_path, ascii):
    def run(*args):
        if not ascii:
            project.run(*map(os.fsdecode, args))
            return
        env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
        kwargs = dict(env=env, capture_output=True, timeout=120)
        done = subprocess.run([sys.executable, *args], cwd=project.path, **kwargs)
        assert done.returncode == 0, done.stderr

    for name in (b'a\xff', 'ä'.encode()):
        folder = os.fsencode(tmp_path) + b'/' + name
        train = ['train.py', *TINY, b'--out_dir=' + folder]
        run(*train, '--max_iters=2', b'--wandb_run_name=' + name)
        run(*train, '--max_iters=4', '--init_from=resume', '--always_save_checkpoint=False')
        run('sample.py', *SAMPLE, b'--out_dir=' + folder)
        run('train.py', folder + b'/config.py', '--max_iters=2')


def test_scripts_run_from_any_folder(project, trained, tmp_path):
    """Data and config lie beside the scripts, out_dir in the current folder."""

    def run(script, *args):
        return project.run(project.path / script, *args, cwd=tmp_path, check=False)

    (project.path / 'config' / 'small.py').write_text('max_iters = 2\n')
    done = run('train.py', 'config/small.py', *TINY[:-2], '--out_dir=out-here')
    assert done.returncode == 0 and (tmp_path / 'out-here' / 'ckpt.pt').exists(), done.stderr
    assert run('eval.py', '--out_dir=out-here', '--device=cpu').returncode == 0
    missing = run('train.py', *TINY, '--dataset=shakespeare_char')
    prepare = project.path / 'data' / 'shakespeare_char' / 'prepare.py'
    assert missing.returncode == 2 and str(prepare) in missing.stderr


def test_a_home_folder_may_be_written_as_in_a_shell(project, tmp_path):
    env = {'HOME': str(tmp_path), 'USERPROFILE': str(tmp_path)}
    project.run('train.py', *TINY, '--max_iters=2', '--out_dir=~/out-home', env=env)
    (tmp_path / 'prompt.txt').write_text('to be')
    paths = ['--init_from=~/out-home', '--start=FILE:~/prompt.txt', '--output=~/texts.jsonl']
    project.run('sample.py', *SAMPLE, *paths, '--num_samples=1', env=env)
    assert (tmp_path / 'texts.jsonl').exists() and not (project.path / '~').exists()


def test_a_vocabulary_without_a_newline_has_a_default_prompt_and_chats(project):
    write_dataset(project.path / 'data' / 'dna', 'ACGTTGCA' * 200)
    flags = [flag for flag in TINY if not flag.startswith('--dataset')]
    project.run('train.py', *flags, '--dataset=dna', '--max_iters=2', '--out_dir=out-dna')
    sample = ['sample.py', '--device=cpu', '--out_dir=out-dna', '--max_new_tokens=5']
    out = project.run(*sample, '--num_samples=1').stdout
    assert set(out.split('\n')[0]) <= set('ACGT')
    assert 'lacks' not in project.run(*sample, '--interactive=True', input='AC\nGT\nA\n').stdout


def test_a_batch_is_never_larger_than_the_text(project, trained):
    score = ['eval.py', '--out_dir=out-trained', '--device=cpu']
    start = time.time()
    all_at_once = project.run(*score, '--batch_size=1000').stdout
    assert project.run(*score, '--batch_size=10000000').stdout == all_at_once
    assert time.time() - start < 20
