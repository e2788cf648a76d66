"""
Several processes and several machines, on a CPU: they train the same run as one process, and a part
that fails ends all.
"""

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
COLUMNS = 'iter tokens loss train_loss val_loss lr grad_norm clipped weight_norm'.split()
FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=4', '--eval_iters=100']
posix = pytest.mark.skipif(os.name != 'posix', reason='kills processes the POSIX way')


@pytest.fixture(scope='module')
def alone(project):
    """The run of FLAGS in one process."""
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
        for name in COLUMNS:
            assert p.get(name) == pytest.approx(q.get(name), abs=1e-4), (name, p, q)


def test_two_processes_equal_one_with_twice_the_accumulation(project, alone):
    """Dropout included: its masks belong to the micro-batch, whichever process computes it."""
    out = project.run('train.py', *FLAGS, '--out_dir=out-two', launcher=BOTH).stdout
    assert_close(alone, project.path / 'out-two')
    lines = [line for line in out.splitlines() if line.startswith('step')]
    assert len(lines) == 3  # only the master prints


def test_sharded_weights_equal_whole_ones(project, alone):
    flags = '--fsdp=True', '--gradient_checkpointing=True', '--loss_chunk=7'
    project.run('train.py', *FLAGS, '--out_dir=out-sharded', *flags, processes=2)
    assert_close(alone, project.path / 'out-sharded')


@pytest.mark.slow
def test_sharded_compiled_blocks_leave_plain_names(project, alone):
    if not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
        pytest.skip('compiling on CPU needs a C++ compiler')
    flags = '--fsdp=True', '--compile=True', '--dropout=0.0', '--max_iters=2', '--n_layer=1'
    project.run('train.py', *FLAGS, *flags, '--out_dir=out-compiled', processes=2)
    names = ckpt.load(str(project.path / 'out-compiled'))['model'].keys()
    assert names < ckpt.load(str(alone))['model'].keys()
    saved = torch.load(project.path / 'out-compiled' / 'ckpt.pt', weights_only=True)
    assert not any(prefix in name for name in saved['model'] for prefix in ckpt.PREFIXES)


def test_a_run_moves_between_one_process_several_and_sharded(project, alone):
    resume = [*FLAGS, '--out_dir=out-moved', '--init_from=auto', '--save_interval=2']
    project.run('train.py', *resume, '--max_iters=2', '--fsdp=True', processes=2)
    project.run('train.py', *resume, '--max_iters=4')
    project.run('train.py', *resume, '--max_iters=6', processes=2)
    project.run('train.py', *resume, '--max_iters=8', '--fsdp=True', processes=2)
    project.run('train.py', *resume)
    a, b = ckpt.load(str(alone)), ckpt.load(str(project.path / 'out-moved'))
    assert b['iter_num'] == 10
    assert all(torch.allclose(a['model'][name], b['model'][name], atol=1e-5) for name in a['model'])


def test_a_growing_batch_is_the_same_on_any_number_of_processes_and_resumes_exactly(project):
    flags = [*FLAGS, '--batch_size_warmup_iters=6']
    project.run('train.py', *flags, '--out_dir=out-grow')
    project.run('train.py', *flags, '--out_dir=out-grow2', processes=2)
    assert_close(project.path / 'out-grow', project.path / 'out-grow2')
    rows = read_log(project.path / 'out-grow' / 'log.csv')
    tokens = [row['tokens'] for row in rows if 'loss' in row]
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
    """launch(log, *args) starts train.py by torchrun, and kills it after the test if necessary."""
    started = []

    def start(log, *args, launcher=BOTH):
        torchrun = subprocess.Popen(
            [*launcher, 'train.py', *args],
            cwd=project.path,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdout=open(project.path / log, 'w'),
            stderr=subprocess.STDOUT,
        )
        started.append(torchrun)
        return torchrun

    yield start
    for torchrun in started:
        if torchrun.poll() is None:
            for pid in (*workers(torchrun.pid).values(), torchrun.pid):
                os.kill(pid, signal.SIGKILL)


def until(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.02)


LONGER = [*FLAGS, '--max_iters=300', '--eval_interval=300', '--eval_iters=1', '--save_interval=20']
has_proc = os.path.isdir('/proc/self')
linux = pytest.mark.skipif(not has_proc, reason='finds worker processes in /proc')


@linux
@pytest.mark.slow
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
    result = f'torchrun ends after {seconds:.0f} s and names the killed rank; '
    result += 'lost: the work since the last save'
    tried('kill -9 of one of two workers', 'once', result)


@linux
@pytest.mark.slow
def test_elastic_torchrun_brings_a_job_with_a_killed_worker_back(project, launch, tried):
    """Without a flag to resume, each time from its last checkpoint."""
    project.run('train.py', *LONGER, '--out_dir=out-calm', processes=2)
    elastic, out = (*BOTH, '--max_restarts=3'), project.path / 'out-elastic'
    torchrun = launch('elastic.txt', *LONGER, '--out_dir=out-elastic', launcher=elastic)

    def saved():  # by ckpt.pt, since the optimizer's file is there a moment earlier
        return ckpt.load(str(out))['iter_num'] if (out / 'ckpt.pt').exists() else 0

    def restarted():
        pids = set(workers(torchrun.pid).values())
        return len(pids) == 2 and not before & pids

    until(lambda: saved() >= 100)
    at, before = saved(), set(workers(torchrun.pid).values())
    os.kill(workers(torchrun.pid)[0], signal.SIGKILL)  # the master, in the middle of the run
    until(restarted)
    os.kill(workers(torchrun.pid)[1], signal.SIGKILL)  # the other, while the new ones start
    assert torchrun.wait(90) == 0
    text = (project.path / 'elastic.txt').read_text()
    resumed = [int(number) for number in re.findall(r'at iteration (\d+)', text)]
    assert resumed and min(resumed) >= at
    assert_close(project.path / 'out-calm', project.path / 'out-elastic')
    tried(
        'kill -9 of a worker under torchrun --max_restarts=3',
        '2 kills',
        'resumed by itself from the last save, same result',
    )


@posix
def test_a_signal_to_torchrun_saves_and_ends_all(project, launch, tried):
    launcher = *BOTH, '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1'
    torchrun = launch('term.txt', *LONGER, '--out_dir=out-term', launcher=launcher)
    until(lambda: (project.path / 'out-term' / 'ckpt.pt').exists())
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait(60) != 0  # so that a job script knows that training has not ended
    text = (project.path / 'term.txt').read_text()
    stopped = int(re.search(r'stopped: iteration (\d+)', text)[1])
    assert ckpt.load(str(project.path / 'out-term'))['iter_num'] == stopped
    result = 'all saved at the same iteration, nothing lost'
    tried('SIGUSR1 to torchrun with 2 workers', 'once', result)


def test_a_restart_does_not_take_an_older_run_for_its_own(project, trained):
    """torchrun tells workers that they are restarted; they resume only a run of their settings."""

    def restart(*flags):
        env = {'TORCHELASTIC_RESTART_COUNT': '1'}
        return project.run('train.py', *TINY, *flags, env=env).stdout

    shutil.copytree(trained[0], project.path / 'out-older')
    assert 'resuming' not in restart('--out_dir=out-older', '--seed=9', '--max_iters=1')
    out = restart('--out_dir=out-trained')
    assert 'resuming out-trained/ckpt.pt at iteration 10' in out
    # the batch may differ, since recipes divide it among processes
    project.run('train.py', *TINY, '--out_dir=out-shared')
    out = restart('--out_dir=out-shared', '--batch_size=2', '--eval_iters=4')
    assert 'resuming out-shared/ckpt.pt at iteration 10' in out


def test_a_rank_without_torchrun_is_one_line(project):
    env = {'RANK': '0', 'WORLD_SIZE': '1'}
    done = project.run('train.py', *TINY, '--out_dir=out-alone', env=env, check=False)
    missing = 'the environment has RANK but not MASTER_ADDR, MASTER_PORT'
    assert done.returncode == 2
    assert done.stderr == f'[rank 0] error: {missing}; launch with torchrun, or unset RANK\n'


# -----------------------------------------------------------------------------
# several machines
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_over_loopback_equal_one_process(project, launch, alone):
    nodes, port = [], free_port()
    for rank in range(2):
        place = f'--node_rank={rank}', '--master_addr=127.0.0.1', f'--master_port={port}'
        launcher = *TORCHRUN, '--nnodes=2', '--nproc_per_node=1', *place
        nodes.append(launch(f'node-{rank}.txt', *FLAGS, '--out_dir=out-nodes', launcher=launcher))
    assert [node.wait(120) for node in nodes] == [0, 0]
    assert_close(alone, project.path / 'out-nodes')
    assert 'step' not in (project.path / 'node-1.txt').read_text()


# Two network namespaces, a cable between them, a torchrun in each. The cable is cut after the first
# checkpoint and plugged in again. This runs in a namespace of its own, so it needs no root and
# leaves nothing.
TWO_NAMESPACES = r"""
set -u
ip link set lo up
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
until test "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)"; do sleep 0.1; done
ip link add near type veth peer name far netns $other
ip addr add 10.77.0.1/24 dev near; ip link set near up
nsenter -t $other -n sh -c 'ip addr add 10.77.0.2/24 dev far; ip link set far up; ip link set lo up'
node() { # rank, log, and the command prefix that enters that node
    rank=$1; log=$2; shift 2
    GLOO_SOCKET_IFNAME=$([ $rank = 0 ] && echo near || echo far) \
        "$@" $PYTHON -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --node_rank=$rank \
        --master_addr=10.77.0.1 --master_port=29500 train.py $FLAGS > $log 2>&1 &
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


def no_namespaces():
    """Why namespaces cannot be made here, '' if they can."""
    for tool in ('unshare', 'nsenter', 'ip'):
        if not shutil.which(tool):
            return f'needs the command {tool}'
    test = 'unshare -n true && ip link add v0 type veth peer name v1'
    probe = subprocess.run(['unshare', '-Urn', 'sh', '-c', test], capture_output=True, text=True)
    return f'namespaces are not allowed here: {probe.stderr.strip()}' if probe.returncode else ''


@pytest.mark.slow
def test_a_cut_cable_ends_both_nodes_fast_and_the_job_resumes(project, tried):
    why = no_namespaces()
    if why:
        pytest.skip(why)
    flags = [*LONGER, '--gradient_accumulation_steps=2', '--dist_timeout=8', '--init_from=auto']
    flags += ['--out_dir=out-cut']
    env = {'PYTHON': sys.executable, 'FLAGS': ' '.join(flags), 'OUT': 'out-cut'}
    inside = 'unshare', '-Urn', '--pid', '--fork', '--kill-child', '--mount-proc', 'bash', '-c'
    done = subprocess.run(
        [*inside, TWO_NAMESPACES],
        cwd=project.path,
        text=True,
        capture_output=True,
        timeout=150,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )
    read = lambda name: (project.path / name).read_text()
    seconds = int(re.search(r'seconds (\d+)', done.stdout)[1])
    everything = done.stdout + done.stderr + read('again-0.txt') + read('again-1.txt')
    assert re.findall(r'code (\d+)', done.stdout) == ['1', '1', '0', '0'], everything
    assert seconds <= 30, everything
    for rank in (0, 1):
        line = f'[rank {rank}] error: lost contact with another process (timed out)'
        assert line in read(f'cut-{rank}.txt')
    assert 'resuming out-cut/ckpt.pt at iteration' in read('again-0.txt')
    project.run('train.py', *flags, '--out_dir=out-uncut')
    assert_close(project.path / 'out-uncut', project.path / 'out-cut')
    tried(
        'cable between two nodes cut (network namespaces, --dist_timeout=8)',
        'once',
        f'both nodes end after {seconds} s with one line; restarted, the same result',
    )


def test_a_mistake_is_one_line_and_torchrun_repeats_it(project):
    done = project.run('train.py', *FLAGS, '--dataset=poems', launcher=BOTH, check=False)
    line = 'data/poems/train.bin not found; prepare the dataset first'
    assert re.search(rf'\[rank \d\] error: {line}', done.stderr)
    assert 'traceback : data/poems/train.bin not found' in done.stderr  # torchrun's summary
