"""Shared by the tests: a copy of the project to run its scripts in, a small text, a small trained run."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['HF_HUB_OFFLINE'] = '1' # no test may need the network

TINY = ['--device=cpu', '--compile=False', '--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16',
        '--batch_size=4', '--gradient_accumulation_steps=1', '--warmup_iters=2', '--learning_rate=1e-2', '--eval_iters=2',
        '--eval_interval=5', '--max_iters=10', '--lr_decay_iters=20']


class Project:
    """A copy of the project in a folder of its own, so that no test touches the user's data and runs."""

    def __init__(self, path):
        self.path = path
        for source in [*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('data/**/*.py'), ROOT / 'Makefile']:
            target = path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        write_dataset(path / 'data' / 'tiny')

    def run(self, *args, env=None, launcher=(sys.executable,), check=True):
        """Run a script; the finished process, with stdout and stderr as text."""
        done = subprocess.run([*launcher, *map(str, args)], cwd=self.path, text=True, capture_output=True, timeout=120,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})})
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
    return Project(tmp_path_factory.mktemp('project'))


@pytest.fixture(scope='session')
def trained(project):
    """The out_dir of a tiny run, and what it printed."""
    done = project.run('train.py', *TINY, '--out_dir=out-trained')
    return project.path / 'out-trained', done.stdout


FAULTS = [] # rows of the README's table: fault, how often, what was lost


@pytest.fixture
def tried():
    """tried(fault, times, outcome) adds a row to the table of faults at the end of the test report."""
    return lambda *row: FAULTS.append(row)


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.section('faults tried, what was lost')
        for row in FAULTS:
            terminalreporter.write_line(f'| {" | ".join(row)} |')
