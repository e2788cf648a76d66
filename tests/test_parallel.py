"""Several processes and several machines, on CPU: the same run as on one; and what happens when a part fails."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

from support import checkpoint as ckpt
from support.runlog import read_log

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run')
BOTH = (*TORCHRUN, '--standalone', '--nproc_per_node=2')
FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=4', '--eval_iters=100']
posix = pytest.mark.skipif(os.name != 'posix', reason='kills processes the POSIX way')


@pytest.fixture(scope='module')
def alone(project):
    """What one process makes of FLAGS."""
    project.run('train.py', *FLAGS, '--out_dir=out-one')
    return project.path / 'out-one'


def assert_close(a, b):
    """The same run up to the order of sums: weights, optimizer state, losses in the log."""
    x, y = ckpt.load(str(a / 'ckpt.pt')), ckpt.load(str(b / 'ckpt.pt'))
    assert x['model'].keys() == y['model'].keys() and x['iter_num'] == y['iter_num']
    assert all(torch.allclose(x['model'][name], y['model'][name], atol=1e-5) for name in x['model'])
    s, t = (ckpt.read(str(folder / c['optimizer_file'])) for folder, c in ((a, x), (b, y)))
    assert s['param_groups'] == t['param_groups'] and s['state'].keys() == t['state'].keys()
    assert all(
        torch.allclose(s['state'][i][name], t['state'][i][name], atol=1e-4)
        for i in s['state']
        for name in s['state'][i]
    )
    for p, q in zip(read_log(a / 'log.csv'), read_log(b / 'log.csv'), strict=True):
        for name in (
            'iter',
            'tokens',
            'loss',
            'train_loss',
            'val_loss',
            'lr',
            'grad_norm',
            'clipped',
            'weight_norm',
        ):
            assert p.get(name) == pytest.approx(q.get(name), abs=1e-4), (name, p, q)


def test_two_processes_equal_one_with_twice_the_accumulation(project, alone):
    """Dropout included: its masks belong to the micro-batch, whichever process computes it."""
    out = project.run('train.py', *FLAGS, '--out_dir=out-two', launcher=BOTH).stdout
    assert_close(alone, project.path / 'out-two')
    assert (
        len([line for line in out.splitlines() if line.startswith('step')]) == 3
    )  # the master alone prints


def test_sharded_weights_equal_whole_ones(project, alone):
    project.run(
        'train.py',
        *FLAGS,
        '--out_dir=out-sharded',
        '--fsdp=True',
        '--gradient_checkpointing=True',
        '--loss_chunk=7',
        launcher=BOTH,
    )
    assert_close(alone, project.path / 'out-sharded')


def test_sharded_compiled_blocks_leave_plain_names(project, alone):
    if not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
        pytest.skip('compiling on CPU needs a C++ compiler')
    project.run(
        'train.py',
        *FLAGS,
        '--dropout=0.0',
        '--out_dir=out-compiled',
        '--fsdp=True',
        '--compile=True',
        '--max_iters=2',
        '--n_layer=1',
        launcher=BOTH,
    )
    names = ckpt.load(str(project.path / 'out-compiled'))['model'].keys()
    assert names < ckpt.load(str(alone))['model'].keys()
    saved = torch.load(project.path / 'out-compiled' / 'ckpt.pt', weights_only=True)
    assert not any(prefix in name for name in saved['model'] for prefix in ckpt.PREFIXES)


def test_a_run_moves_between_one_process_several_and_sharded(project, alone):
    resume = [*FLAGS, '--out_dir=out-moved', '--init_from=auto', '--save_interval=2']
    project.run('train.py', *resume, '--max_iters=2', '--fsdp=True', launcher=BOTH)
    project.run('train.py', *resume, '--max_iters=4')
    project.run('train.py', *resume, '--max_iters=6', launcher=BOTH)
    project.run('train.py', *resume, '--max_iters=8', '--fsdp=True', launcher=BOTH)
    project.run('train.py', *resume)
    a, b = ckpt.load(str(alone)), ckpt.load(str(project.path / 'out-moved'))
    assert b['iter_num'] == 10 and all(
        torch.allclose(a['model'][name], b['model'][name], atol=1e-5) for name in a['model']
    )


def test_a_growing_batch_is_the_same_on_any_number_of_processes_and_resumes_exactly(project):
    flags = [*FLAGS, '--batch_size_warmup_iters=6']
    project.run('train.py', *flags, '--out_dir=out-grow')
    project.run('train.py', *flags, '--out_dir=out-grow2', launcher=BOTH)
    assert_close(project.path / 'out-grow', project.path / 'out-grow2')
    tokens = [
        row['tokens'] for row in read_log(project.path / 'out-grow' / 'log.csv') if 'loss' in row
    ]
    counts = [b - a for a, b in zip([0, *tokens], tokens)]
    assert counts == [4 * 16 * n for n in (1, 2, 2, 3, 3, 4, 4, 4, 4, 4)]
    project.run('train.py', *flags, '--out_dir=out-grow3', '--max_iters=3')
    project.run('train.py', *flags, '--out_dir=out-grow3', '--init_from=resume')
    a, b = (ckpt.load(str(project.path / name))['model'] for name in ('out-grow', 'out-grow3'))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sharding_needs_processes(project):
    assert 'launch them with torchrun' in project.error('train.py', *TINY, '--fsdp=True')


# -----------------------------------------------------------------------------
# a part fails
def workers(agent):
    """{rank: pid} of the processes that a torchrun with this pid has started."""
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/stat') as f:
                parent = int(f.read().rpartition(')')[2].split()[1])
            with open(f'/proc/{pid}/environ', 'rb') as f:
                rank = re.search(rb'(?:^|\0)RANK=(\d+)', f.read())
        except OSError:  # gone meanwhile
            continue
        if parent == agent and rank:
            found[int(rank[1])] = int(pid)
    return found


@pytest.fixture
def launch(project):
    """launch(log, *args) starts train.py by torchrun; what still runs at the end of the test is killed."""
    started = []

    def start(log, *args, launcher=BOTH):
        started.append(
            subprocess.Popen(
                [*launcher, 'train.py', *args],
                cwd=project.path,
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                stdout=open(project.path / log, 'w'),
                stderr=subprocess.STDOUT,
            )
        )
        return started[-1]

    yield start
    for torchrun in started:
        for pid in (
            [*workers(torchrun.pid).values(), torchrun.pid] if torchrun.poll() is None else []
        ):
            os.kill(pid, signal.SIGKILL)


def until(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.02)


LONGER = [*FLAGS, '--max_iters=300', '--eval_interval=300', '--eval_iters=1', '--save_interval=20']
linux = pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='finds worker processes in /proc'
)


@linux
def test_a_killed_worker_ends_all_within_seconds_and_is_named_first(project, launch, tried):
    torchrun = launch('killed-worker.txt', *LONGER, '--out_dir=out-killed-worker')
    until(lambda: (project.path / 'out-killed-worker' / 'ckpt.pt').exists())
    start = time.time()
    os.kill(workers(torchrun.pid)[1], signal.SIGKILL)
    assert torchrun.wait(60) == 1
    seconds, text = time.time() - start, (project.path / 'killed-worker.txt').read_text()
    assert seconds < 20
    cause = text[text.index('Root Cause') :]
    assert 'rank      : 1' in cause and 'Signal 9' in cause
    assert '[rank 0] error: lost contact with another process' in text
    tried(
        'kill -9 of one of two workers',
        'once',
        f'torchrun ends after {seconds:.0f} s and names the killed rank; lost: the work since the last save',
    )


@linux
def test_elastic_torchrun_brings_a_job_with_a_killed_worker_back(project, launch, tried):
    """Without any flag to resume, and each time at the checkpoint it had got to."""
    project.run('train.py', *LONGER, '--out_dir=out-calm', launcher=BOTH)
    torchrun = launch(
        'elastic.txt', *LONGER, '--out_dir=out-elastic', launcher=(*BOTH, '--max_restarts=3')
    )
    out = project.path / 'out-elastic'
    saved = lambda: (
        ckpt.load(str(out))['iter_num'] if (out / 'ckpt.pt').exists() else 0
    )  # not by the optimizer's file, which is there a moment before
    kill = lambda rank: os.kill(workers(torchrun.pid)[rank], signal.SIGKILL)
    until(lambda: saved() >= 100)
    at, before = saved(), set(workers(torchrun.pid).values())
    kill(0)  # the master in the middle of the run
    until(
        lambda: len(workers(torchrun.pid)) == 2 and not before & set(workers(torchrun.pid).values())
    )
    kill(1)  # the other while the new ones are still coming up
    assert torchrun.wait(90) == 0
    resumed = [
        int(n)
        for n in re.findall(r'at iteration (\d+)', (project.path / 'elastic.txt').read_text())
    ]
    assert resumed and min(resumed) >= at
    assert_close(project.path / 'out-calm', project.path / 'out-elastic')
    tried(
        'kill -9 of a worker under torchrun --max_restarts=3',
        '2 kills',
        'resumed by itself from the last save, same result',
    )


@posix
def test_a_signal_to_torchrun_saves_and_ends_all(project, launch, tried):
    torchrun = launch(
        'term.txt',
        *LONGER,
        '--out_dir=out-term',
        launcher=(*BOTH, '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1'),
    )
    until(lambda: (project.path / 'out-term' / 'ckpt.pt').exists())
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait(60) != 0  # so that a job script can tell it from the end of training
    text = (project.path / 'term.txt').read_text()
    stopped = int(re.search(r'stopped: iteration (\d+)', text)[1])
    assert ckpt.load(str(project.path / 'out-term'))['iter_num'] == stopped
    tried(
        'SIGUSR1 to torchrun with 2 workers',
        'once',
        'all saved at the same iteration, nothing lost',
    )


def test_a_restart_does_not_take_an_older_run_for_its_own(project, trained):
    """torchrun tells restarted workers so; a checkpoint of other knobs is not theirs."""
    shutil.copytree(trained[0], project.path / 'out-older')
    out = project.run(
        'train.py',
        *TINY,
        '--out_dir=out-older',
        '--seed=9',
        '--max_iters=1',
        env={'TORCHELASTIC_RESTART_COUNT': '1'},
    ).stdout
    assert 'resuming' not in out
    out = project.run(
        'train.py', *TINY, '--out_dir=out-trained', env={'TORCHELASTIC_RESTART_COUNT': '1'}
    ).stdout
    assert 'resuming out-trained/ckpt.pt at iteration 10' in out
    project.run('train.py', *TINY, '--out_dir=out-shared')
    out = project.run(
        'train.py',
        *TINY,
        '--out_dir=out-shared',
        '--batch_size=2',
        '--eval_iters=4',
        env={'TORCHELASTIC_RESTART_COUNT': '1'},
    ).stdout
    assert (
        'resuming out-shared/ckpt.pt at iteration 10' in out
    )  # of more processes, among which recipes share the batch


def test_a_rank_without_torchrun_is_one_line(project):
    done = project.run(
        'train.py', *TINY, '--out_dir=out-alone', env={'RANK': '0', 'WORLD_SIZE': '1'}, check=False
    )
    assert (
        done.returncode == 2
        and done.stderr
        == '[rank 0] error: the environment has RANK but not MASTER_ADDR, MASTER_PORT; launch with torchrun, or unset RANK\n'
    )


# -----------------------------------------------------------------------------
# several machines
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_nodes_over_loopback_equal_one_process(project, launch, alone):
    node = lambda rank: (
        *TORCHRUN,
        '--nnodes=2',
        '--nproc_per_node=1',
        f'--node_rank={rank}',
        '--master_addr=127.0.0.1',
        f'--master_port={port}',
    )
    port = free_port()
    nodes = [
        launch(f'node-{rank}.txt', *FLAGS, '--out_dir=out-nodes', launcher=node(rank))
        for rank in range(2)
    ]
    assert [n.wait(120) for n in nodes] == [0, 0]
    assert_close(alone, project.path / 'out-nodes')
    assert 'step' not in (project.path / 'node-1.txt').read_text()


# Two network namespaces, a cable between them, a torchrun in each; the cable is cut after the first
# checkpoint and plugged in again. Runs inside a namespace of its own, so that it needs no root and leaves nothing.
TWO_NAMESPACES = r"""
set -u
ip link set lo up
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
until test "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)"; do sleep 0.1; done
ip link add near type veth peer name far netns $other
ip addr add 10.77.0.1/24 dev near; ip link set near up
nsenter -t $other -n sh -c 'ip addr add 10.77.0.2/24 dev far; ip link set far up; ip link set lo up'
node() { # rank, log, and before the command how to get to that node
    rank=$1; log=$2; shift 2
    GLOO_SOCKET_IFNAME=$([ $rank = 0 ] && echo near || echo far) "$@" $PYTHON -m torch.distributed.run --nnodes=2 --nproc_per_node=1 \
        --node_rank=$rank --master_addr=10.77.0.1 --master_port=29500 train.py $FLAGS > $log 2>&1 &
}
node 0 cut-0.txt env; a=$!
node 1 cut-1.txt nsenter -t $other -n; b=$!
until test -f $OUT/ckpt.pt || ! kill -0 $a; do sleep 0.1; done
ip link set near down; start=$(date +%s)
wait $a; echo "code $?"; wait $b; echo "code $?"; echo "seconds $(( $(date +%s) - start ))"
ip link set near up
node 0 again-0.txt env; a=$!
node 1 again-1.txt nsenter -t $other -n; b=$!
wait $a; echo "code $?"; wait $b; echo "code $?"
"""


def test_a_cut_cable_ends_both_nodes_fast_and_the_job_resumes(project, tried):
    why = next(
        (
            f'needs the command {tool}'
            for tool in ('unshare', 'nsenter', 'ip')
            if not shutil.which(tool)
        ),
        None,
    )
    if not why:
        probe = subprocess.run(
            [
                'unshare',
                '-Urn',
                'sh',
                '-c',
                'unshare -n true && ip link add v0 type veth peer name v1',
            ],
            capture_output=True,
            text=True,
        )
        why = probe.returncode and f'namespaces are not allowed here: {probe.stderr.strip()}'
    if why:
        pytest.skip(why)
    flags = [
        *LONGER,
        '--gradient_accumulation_steps=2',
        '--dist_timeout=8',
        '--init_from=auto',
        '--out_dir=out-cut',
    ]
    done = subprocess.run(
        [
            'unshare',
            '-Urn',
            '--pid',
            '--fork',
            '--kill-child',
            '--mount-proc',
            'bash',
            '-c',
            TWO_NAMESPACES,
        ],
        cwd=project.path,
        text=True,
        capture_output=True,
        timeout=150,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHON': sys.executable,
            'FLAGS': ' '.join(flags),
            'OUT': 'out-cut',
        },
    )
    codes, seconds = (
        re.findall(r'code (\d+)', done.stdout),
        int(re.search(r'seconds (\d+)', done.stdout)[1]),
    )
    assert codes == ['1', '1', '0', '0'] and seconds <= 30, ''.join(
        [
            done.stdout,
            done.stderr,
            *((project.path / f'again-{rank}.txt').read_text() for rank in (0, 1)),
        ]
    )
    for rank in (0, 1):
        assert (
            f'[rank {rank}] error: lost contact with another process (timed out)'
            in (project.path / f'cut-{rank}.txt').read_text()
        )
    assert 'resuming out-cut/ckpt.pt at iteration' in (project.path / 'again-0.txt').read_text()
    project.run('train.py', *flags, '--out_dir=out-uncut')
    assert_close(project.path / 'out-uncut', project.path / 'out-cut')
    tried(
        'cable between two nodes cut (network namespaces, --dist_timeout=8)',
        'once',
        f'both nodes end after {seconds} s with one line; restarted, the same result',
    )


def test_a_mistake_is_one_line_and_torchrun_repeats_it(project):
    done = project.run('train.py', *FLAGS, '--dataset=poems', launcher=BOTH, check=False)
    assert re.search(
        r'\[rank \d\] error: data/poems/train.bin not found; prepare the dataset first', done.stderr
    )
    assert (
        'traceback : data/poems/train.bin not found' in done.stderr
    )  # torchrun's summary repeats it as the root cause
