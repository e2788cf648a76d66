"""Shared by the tests: a copy of the project, a small text, a small trained run."""

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
if 'PYTEST_XDIST_WORKER' in os.environ:  # tests side by side get a core each
    os.environ['OMP_NUM_THREADS'] = '1'

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']

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
    """Runs scripts in processes forked from one that has imported torch (spawn.py); POSIX only."""

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

    def start(self, argv, cwd, stdout, stderr, env=None, stdin=os.devnull):
        """Start a script and return its pid. What it prints is appended to two files."""
        order = dict(argv=list(map(str, argv)), cwd=str(cwd), env=env or {})
        order |= dict(stdin=str(stdin), stdout=str(stdout), stderr=str(stderr))
        print(json.dumps(order), file=self.process.stdin, flush=True)
        pid = self.read('started')
        self.running.add(pid)
        return pid

    def read(self, key):
        """The value of `key` in the next message that has it; exit codes on the way are kept."""
        while True:
            message = json.loads(self.process.stdout.readline())
            if 'ended' in message:
                self.running.discard(message['ended'])
                self.codes[message['ended']] = message['code']
            if key in message:
                return message[key]

    def wait(self, pid, seconds=120):
        """Exit code of a script, or minus the signal that killed it. It gets `seconds` to end."""
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
        self.process.kill()
        self.process.wait()


class Project:
    """A copy of the project in a folder of its own, so that no test touches the user's files."""

    def __init__(self, path, spawner=None):
        self.path, self.spawner, self.count = path, spawner, 0
        sources = [ROOT / 'Makefile', *ROOT.glob('*.py')]
        for pattern in ('config/*.py', 'support/*.py', 'data/**/*.py'):
            sources += ROOT.glob(pattern)
        for source in sources:
            target = path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        write_dataset(path / 'data' / 'tiny')

    def run(self, *args, launcher=None, check=True, **settings):
        """
        Run a script and return the finished process, with stdout and stderr as text.

        launcher: the command that starts it, such as torchrun
        check: the exit code must be 0
        settings: more variables `env`, the folder `cwd`, standard `input`, and the number of
            `processes` that share the run, as torchrun would start them
        """
        args = list(map(str, args))
        if self.spawner and not launcher:
            done = self.fork(args, **settings)
        else:
            done = self.start(args, launcher, **settings)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, args, launcher, env=None, cwd=None, input='', processes=1):
        if processes > 1:
            launcher = [*TORCHRUN, f'--nproc_per_node={processes}']
        return subprocess.run(
            [*(launcher or [sys.executable]), *args],
            cwd=cwd or self.path,
            input=input,
            text=True,
            capture_output=True,
            timeout=120,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
        )

    def fork(self, args, env=None, cwd=None, input='', processes=1):
        self.count += 1
        stdin, *output = (self.path / f'run-{self.count}.{name}' for name in ('in', 'out', 'err'))
        stdin.write_text(input, encoding='utf-8')
        store, ranks = None, [{}]
        if processes > 1:
            store, ranks = torchrun_environment(processes)
        pids = []
        for rank in ranks:
            order = args, cwd or self.path, *output, {**(env or {}), **rank}, stdin
            pids.append(self.spawner.start(*order))
        codes = [self.spawner.wait(pid) for pid in pids]
        del store  # it must outlive the processes
        texts = [path.read_text(encoding='utf-8') for path in output]
        return subprocess.CompletedProcess(args, max(codes, key=abs), *texts)

    def error(self, *args, **kwargs):
        """Run a script that rejects its input: one line, exit code 2, no traceback."""
        done = self.run(*args, check=False, **kwargs)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
        return lines[0]


def torchrun_environment(processes):
    """A store, and for each process the variables that torchrun sets."""
    from torch.distributed import TCPStore

    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port))
    shared |= dict(TORCHELASTIC_USE_AGENT_STORE='True')
    shared |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    return store, [{**shared, 'RANK': str(i), 'LOCAL_RANK': str(i)} for i in range(processes)]


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
def fake_bpe(monkeypatch):
    """One token a byte, in place of GPT-2's BPE, which would be downloaded."""
    import tiktoken

    from data import tokenizer

    bpe = tiktoken.Encoding(
        'bytes',
        pat_str='[\\s\\S]',
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={'<|endoftext|>': 256},
    )
    monkeypatch.setattr(tokenizer, 'gpt2_encoding', lambda: bpe)
    return bpe


@pytest.fixture
def tried(record_property):
    """tried(fault, times, outcome) adds a row to the table at the end of the test report."""
    return lambda *row: record_property('fault', row)


def pytest_terminal_summary(terminalreporter):
    """Print the table of faults. Properties of reports reach here from xdist's workers too."""
    passed = terminalreporter.getreports('passed')
    rows = [row for report in passed for name, row in report.user_properties if name == 'fault']
    if rows:
        terminalreporter.section('faults tried, what was lost')
        for row in rows:
            terminalreporter.write_line(f'| {" | ".join(row)} |')
