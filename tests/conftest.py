"""Shared by the tests: a copy of the project to run its scripts in, a small text, a small trained run."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['HF_HUB_OFFLINE'] = '1'  # no test may need the network

TINY = [
    '--device=cpu',
    '--compile=False',
    '--dataset=tiny',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--warmup_iters=2',
    '--learning_rate=1e-2',
    '--eval_iters=2',
    '--eval_interval=5',
    '--max_iters=10',
    '--lr_decay_iters=20',
]


class Spawner:
    """Runs scripts in processes forked from one that has imported torch already (spawn.py); POSIX only."""

    def __init__(self):
        self.running, self.codes = set(), {}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name('spawn.py')],
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )

    def start(self, argv, cwd, stdout, stderr, env=None):
        """The pid of a script under way; stdout and stderr are files that what it prints is appended to."""
        order = dict(
            argv=list(map(str, argv)),
            cwd=str(cwd),
            stdout=str(stdout),
            stderr=str(stderr),
            env=env or {},
        )
        print(json.dumps(order), file=self.process.stdin, flush=True)
        pid = self.read('started')
        self.running.add(pid)
        return pid

    def read(self, key):
        while True:
            news = json.loads(self.process.stdout.readline())
            if 'ended' in news:
                self.running.discard(news['ended'])
                self.codes[news['ended']] = news['code']
            if key in news:
                return news[key]

    def wait(self, pid, seconds=120):
        """Exit code of a script, minus the signal if one killed it. It is killed after so many seconds."""
        alarm = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
        alarm.start()
        while pid not in self.codes:
            self.read('ended')
        alarm.cancel()
        return self.codes.pop(pid)

    def close(self):
        for pid in self.running:  # of tests that failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(10)


class Project:
    """A copy of the project in a folder of its own, so that no test touches the user's data and runs."""

    def __init__(self, path, spawner=None):
        self.path, self.spawner, self.count = path, spawner, 0
        for source in [
            *ROOT.glob('*.py'),
            *ROOT.glob('config/*.py'),
            *ROOT.glob('support/*.py'),
            *ROOT.glob('data/**/*.py'),
            ROOT / 'Makefile',
        ]:
            target = path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        write_dataset(path / 'data' / 'tiny')

    def run(self, *args, env=None, launcher=None, check=True):
        """Run a script, by itself or by a launcher; the finished process, with stdout and stderr as text."""
        args = list(map(str, args))
        if launcher or not self.spawner:
            done = subprocess.run(
                [*(launcher or [sys.executable]), *args],
                cwd=self.path,
                text=True,
                capture_output=True,
                timeout=120,
                env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
            )
        else:
            self.count += 1
            files = [self.path / f'run-{self.count}.{name}' for name in ('out', 'err')]
            code = self.spawner.wait(self.spawner.start(args, self.path, *files, env))
            done = subprocess.CompletedProcess(
                args, code, *(path.read_text(encoding='utf-8') for path in files)
            )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def error(self, *args, **kwargs):
        """Run a script that must refuse its input: its one line, after exit code 2 and no traceback."""
        done = self.run(*args, check=False, **kwargs)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
        return lines[0]


def write_dataset(folder, text='to be or not to be, that is the question:\n' * 60):
    """A character dataset as data/*/prepare.py writes it, the same text in train and val."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    for split in ('train', 'val'):
        np.array([stoi[c] for c in text], dtype=np.uint16).tofile(folder / f'{split}.bin')
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}, f)


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    spawner = Spawner() if os.name == 'posix' else None
    yield Project(tmp_path_factory.mktemp('project'), spawner)
    if spawner:
        spawner.close()


@pytest.fixture(scope='session')
def trained(project):
    """The out_dir of a tiny run, and what it printed."""
    done = project.run('train.py', *TINY, '--out_dir=out-trained')
    return project.path / 'out-trained', done.stdout


@pytest.fixture
def tried(record_property):
    """tried(fault, times, outcome) adds a row to the table of faults at the end of the test report."""
    return lambda *row: record_property('fault', row)


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.getreports('passed')
    rows = [row for report in passed for name, row in report.user_properties if name == 'fault']
    if rows:
        terminalreporter.section('faults tried, what was lost')
        for row in rows:
            terminalreporter.write_line(f'| {" | ".join(row)} |')
