"""A run that hangs, in Python or in C, can be ended and inspected."""

import os
import signal
import sys
import time

import pytest
from conftest import TINY

from support import checkpoint as ckpt
from support.runlog import read_log

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs POSIX')

STUCK = """
import ctypes, os, runpy, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
import model

def hang(how):
    print('stuck', flush=True)
    if how == 'python':
        time.sleep(60)
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    while True: # the second call waits for ever, and no signal wakes it
        libc.pthread_mutex_lock(mutex)

forward, calls = model.GPT.forward, 0
def count(self, *args, **kwargs):
    global calls
    if self.training:
        calls += 1
        if calls == int(os.environ.get('AT', 0)):
            hang(os.environ['HOW'])
    else:
        time.sleep(float(os.environ.get('SLOW', 0)))
    return forward(self, *args, **kwargs)
model.GPT.forward = count
runpy.run_path('train.py', run_name='__main__')
"""


class Run:
    """A running train.py."""

    def __init__(self, project, out, *flags, **env):
        self.project, self.folder = project, project.path / out
        (project.path / 'stuck.py').write_text(STUCK)
        self.files = [project.path / f'{out}.{name}' for name in ('out', 'err')]
        for path in self.files:
            path.unlink(missing_ok=True)
        argv = ['stuck.py', 'train.py', *TINY, '--log_interval=1', f'--out_dir={out}', *flags]
        self.pid = project.spawner.start(argv, project.path, *self.files, env)

    def text(self, which=0):
        return self.files[which].read_text() if self.files[which].exists() else ''

    def until(self, words):
        end = time.time() + 60
        while words not in self.text():
            assert time.time() < end, self.text() + self.text(1)
            time.sleep(0.02)

    def ends(self, name):
        """Send this signal: (exit code, seconds until the run ended)."""
        start = time.time()
        os.kill(self.pid, getattr(signal, name))
        return self.project.spawner.wait(self.pid), time.time() - start

    def runs(self, seconds):
        time.sleep(seconds)
        os.kill(self.pid, 0)  # raises if it is gone
        return self.pid in self.project.spawner.running


def val_losses(folder):
    rows = read_log(folder / 'log.csv')
    return {row['iter']: row['val_loss'] for row in rows if 'val_loss' in row}


@pytest.mark.parametrize('how', ['python', 'c'])
@pytest.mark.parametrize('name, code', [('SIGTERM', 143), ('SIGINT', 130), ('SIGHUP', 129)])
def test_a_first_step_that_hangs_is_ended_by_one_signal(project, how, name, code):
    run = Run(project, f'out-first-{how}-{name}', AT='1', HOW=how)
    run.until('stuck')
    got, seconds = run.ends(name)
    assert got == code and seconds < 3
    assert set(os.listdir(run.folder)) <= {'log.csv', 'loss.png', 'config.py', 'run.lock'}


@pytest.mark.parametrize('how', ['python', 'c'])
def test_a_later_step_that_hangs_is_ended_by_the_second_signal_of_any_kind(project, how):
    run = Run(project, f'out-later-{how}', AT='8', HOW=how)
    run.until('stuck')
    os.kill(run.pid, signal.SIGTERM)
    time.sleep(0.3)  # otherwise the system merges the two
    os.kill(run.pid, signal.SIGTERM)  # timeout(1) sends two, and a closed terminal another
    os.kill(run.pid, signal.SIGHUP)
    assert run.runs(1.2)
    got, seconds = run.ends('SIGINT')
    assert got == 130 and seconds < 3
    assert ckpt.load(str(run.folder / 'ckpt.pt'))['iter_num'] == 5
    assert not list(run.folder.glob('*.partial'))


def test_a_stop_during_an_evaluation_takes_a_few_batches(project):
    flags = ['--max_iters=12', '--eval_interval=10', '--eval_iters=40', '--dropout=0.1']
    straight = Run(project, 'out-eval-straight', *flags)
    assert project.spawner.wait(straight.pid) == 0
    run = Run(project, 'out-eval-stopped', *flags, SLOW='0.06')
    run.until('iter 9:')
    time.sleep(0.3)  # it evaluates now, which takes 5 seconds
    got, seconds = run.ends('SIGTERM')
    assert got == 0 and seconds < 3
    assert 'stopped: iteration 10,' in run.text() and 'step 10' not in run.text()
    again = Run(project, 'out-eval-stopped', *flags, '--init_from=resume')
    assert project.spawner.wait(again.pid) == 0
    a, b = (ckpt.load(str(folder / 'ckpt.pt'))['model'] for folder in (straight.folder, run.folder))
    assert all(a[name].equal(b[name]) for name in a)
    assert val_losses(straight.folder) == val_losses(run.folder)


def test_stacks_are_printed_on_request_and_the_run_continues(project):
    run = Run(project, 'out-stacks', AT='4', HOW='c')
    run.until('stuck')
    os.kill(run.pid, signal.SIGUSR2)
    end = time.time() + 10
    while 'in hang' not in run.text(1) and time.time() < end:
        time.sleep(0.02)
    assert 'in hang' in run.text(1) and 'in watch' in run.text(1)  # of all threads
    assert run.runs(0.1)
    os.kill(run.pid, signal.SIGKILL)
    project.spawner.wait(run.pid)
    run = Run(project, 'out-stacks-2', '--max_iters=4', SLOW='0.02')
    run.until('iter 1:')
    os.kill(run.pid, signal.SIGUSR2)
    assert project.spawner.wait(run.pid) == 0 and 'train.py' in run.text(1)


def test_the_progress_bar_is_redrawn_while_the_first_step_is_compiled(project):
    """Every second on a terminal, whatever the main thread waits for."""
    import fcntl
    import pty
    import struct
    import termios

    (project.path / 'stuck.py').write_text(STUCK)
    command = [sys.executable, 'stuck.py', 'train.py', *TINY, '--out_dir=out-terminal']
    pid, terminal = pty.fork()
    if pid == 0:
        # SIGINT is ignored if the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(project.path)
        os.environ.update(AT='1', HOW='c', OMP_NUM_THREADS='1', TERM='dumb')
        os.execv(sys.executable, command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    shown, end = b'', time.time() + 60
    while not all(words in shown for words in (b'[00:01<', b'[00:02<', b'[00:03<')):
        assert time.time() < end, shown
        shown += os.read(terminal, 10_000)
    os.write(terminal, b'\x03')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
