"""
On a GPU: training and sampling by CUDA graphs against the same without them, and everything else
that a CPU cannot show. They need no network and no data:

    python -m pytest tests/test_cuda.py -q
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from test_generate import OPTIONS
from test_model import MODERN

from generate import new_cache, stream
from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support.device import missing_for_triton
from support.graphs import Recorder
from support.runlog import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')

# products add up in the same order wherever they are computed
ENV = {'CUBLAS_WORKSPACE_CONFIG': ':4096:8'}
ITERATIONS = '--log_interval=1', '--eval_interval=10', '--max_iters=30', '--lr_decay_iters=30'
GPU = [*TINY, '--device=cuda', '--dtype=float32', *ITERATIONS]
has_triton = importlib.util.find_spec('triton') is not None and not missing_for_triton()
compiles = pytest.mark.skipif(not has_triton, reason='needs triton and a C compiler')
MUON = ['--optimizer=muon', '--pos=rotary', '--tie_embeddings=False', '--weight_decay=0.1']
# A kernel that adds in another order changes the last bit of a sum, and 30 iterations at a rate of
# 0.01 amplify that. On a CPU, gradients with relative noise of 1e-6 changed no loss by more than
# 1.3e-4; stale rates or divisors changed losses by at least 0.05.
BOUND = 2e-3

PLANTED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
import model, muon
import torch
factor = torch.ones((), device='cuda')
forward, set_rates = model.GPT.forward, muon.set_rates
def spoiled(self, idx, targets=None, cache=None):
    logits, loss = forward(self, idx, targets, cache)
    return logits, loss * factor if self.training else loss
def plant(optimizer, lr, iteration):
    factor.fill_(float('nan') if iteration == 12 else 1.0)
    set_rates(optimizer, lr, iteration)
model.GPT.forward, muon.set_rates = spoiled, plant
runpy.run_path('train.py', run_name='__main__')
"""


def train(project, out, *flags, script='train.py', **kwargs):
    """What a tiny run on the GPU printed."""
    script = [script, 'train.py'] if script != 'train.py' else [script]
    return project.run(*script, *GPU, f'--out_dir={out}', *flags, env=ENV, **kwargs).stdout


def losses(project, out):
    """{(iteration, column): loss} of a log."""
    found = {}
    for row in read_log(project.path / out / 'log.csv'):
        for name in ('loss', 'train_loss', 'val_loss'):
            if name in row:
                found[row['iter'], name] = row[name]
    return found


def assert_close(project, a, b, bound=BOUND):
    mine, theirs = losses(project, a), losses(project, b)
    assert mine.keys() == theirs.keys()
    for at, loss in mine.items():
        assert loss == pytest.approx(theirs[at], abs=bound, nan_ok=True), at


@pytest.mark.parametrize(
    'flags',
    [
        ['--dropout=0.2'],
        ['--gradient_accumulation_steps=3', '--dropout=0.1'],
        [*MUON, '--dropout=0.1'],
        [*MUON, '--gradient_accumulation_steps=3'],
        ['--grad_clip=0.0'],
        ['--grad_clip=0.05'],
        ['--gradient_accumulation_steps=4', '--batch_size_warmup_iters=8'],
        ['--gradient_checkpointing=True', '--loss_chunk=20'],
        ['--pos=alibi', '--activation=swiglu', '--n_kv_head=1', '--token_shift=True'],
        ['--mask_before_token=,', '--prefix_lm=True'],
    ],
    ids=' '.join,
)
def test_a_replayed_run_equals_a_plain_one(project, flags):
    out = train(project, 'out-graph', *flags, '--cuda_graph=True')
    assert 'recorded as CUDA graphs' in out and 'could not be recorded' not in out
    assert 'CUDA graph' not in train(project, 'out-plain', *flags, '--cuda_graph=False')
    assert_close(project, 'out-graph', 'out-plain')
    found = losses(project, 'out-graph')
    assert found[30, 'val_loss'] < found[0, 'val_loss']


@compiles
def test_graphs_are_the_default_and_a_short_run_is_not_compiled(project):
    flags = [flag for flag in TINY if not flag.startswith(('--device', '--compile'))]
    out = project.run('train.py', *flags, '--out_dir=out-default', env=ENV).stdout
    assert 'recorded as CUDA graphs' in out and 'not compiled since the run is short' in out


@pytest.mark.parametrize('flags', [[], MUON], ids=['adamw', 'muon'])
def test_a_bad_step_leaves_weights_and_state_alone(project, flags):
    (project.path / 'planted.py').write_text(PLANTED)
    for name, on in (('out-graph-bad', True), ('out-plain-bad', False)):
        train(project, name, *flags, f'--cuda_graph={on}', script='planted.py')
    assert_close(project, 'out-graph-bad', 'out-plain-bad')
    folder = project.path / 'out-graph-bad'
    rows = read_log(folder / 'log.csv')
    assert [row['iter'] for row in rows if row.get('bad_steps')] == [12]
    checkpoint = ckpt.load(str(folder))
    tensors = [*checkpoint['model'].values()]
    for state in ckpt.read(str(folder / checkpoint['optimizer_file']))['state'].values():
        tensors += state.values()
    assert all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('flags', [['--dropout=0.1'], MUON], ids=['adamw', 'muon'])
def test_a_run_resumes_with_and_without_graphs(project, flags, first):
    train(project, 'out-straight', *flags)
    train(project, 'out-resumed', *flags, '--max_iters=15', f'--cuda_graph={first}')
    train(project, 'out-resumed', *flags, f'--cuda_graph={not first}', '--init_from=resume')
    straight, resumed = losses(project, 'out-straight'), losses(project, 'out-resumed')
    assert resumed[30, 'val_loss'] == pytest.approx(straight[30, 'val_loss'], abs=BOUND)


def test_corrections_of_weights_are_trained(project):
    train(project, 'out-base')
    flags = '--init_from=out-base', '--lora_rank=2'
    for on in (True, False):
        train(project, f'out-lora-{on}', *flags, f'--cuda_graph={on}')
    assert_close(project, 'out-lora-True', 'out-lora-False')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_every_number_format_learns(project, dtype):
    train(project, f'out-{dtype}', f'--dtype={dtype}')
    found = losses(project, f'out-{dtype}')
    assert found[30, 'val_loss'] < found[0, 'val_loss'] - 0.3


@compiles
@pytest.mark.parametrize(
    'flags', [['--gradient_checkpointing=True', '--loss_chunk=20'], MUON], ids=['adamw', 'muon']
)
def test_compiled_runs_equal_those_that_are_not(project, flags):
    for on in (True, False):
        out = train(project, f'out-compiled-{on}', *flags, '--compile=True', f'--cuda_graph={on}')
        assert 'could not be recorded' not in out
    train(project, 'out-not-compiled', *flags, '--cuda_graph=False')
    for on in (True, False):
        assert_close(project, f'out-compiled-{on}', 'out-not-compiled', bound=0.03)


@pytest.mark.parametrize('flags', [[], ['--fsdp=True'], [*MUON, '--fsdp=True']], ids=' '.join)
def test_torchrun_with_one_process_equals_none(project, flags):
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
    assert 'CUDA graph' not in train(project, 'out-torchrun', *flags, launcher=launcher)
    flags = [flag for flag in flags if flag != '--fsdp=True']
    train(project, 'out-alone', *flags, '--cuda_graph=False')
    assert_close(project, 'out-torchrun', 'out-alone')


def test_what_is_not_supported_is_one_line(project):
    command = 'train.py', *GPU, '--cuda_graph=True'
    line = project.error(*command, '--gradient_checkpointing=True', '--dropout=0.1')
    assert 'without dropout beside gradient_checkpointing' in line
    assert 'with float32 or bfloat16' in project.error(*command, '--dtype=float16')


def test_too_little_memory_is_one_line(project):
    large = ['--batch_size=2097152', '--n_embd=1024', '--n_head=2', '--max_iters=3']
    done = project.run('train.py', *GPU, *large, '--out_dir=out-large', check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('error: out of memory')


def small(**sizes):
    torch.manual_seed(1)
    sizes = dict(block_size=64, vocab_size=61, n_layer=2, n_head=4, n_embd=64) | sizes
    model = GPT(GPTConfig(**sizes)).cuda().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_evaluations_take_no_more_memory_from_one_to_the_next():
    model, recorded = small(), Recorder(on=True)
    X = torch.randint(61, (8, 64), device='cuda')
    steps = torch.zeros((), device='cuda')

    @recorded
    def evaluate(X):
        return model(X, X)[1]

    @recorded
    def train():
        steps.add_(1)

    taken = []
    for i in range(200):
        with torch.no_grad():
            loss = evaluate(X)
        train()
        if i in (20, 199):
            torch.cuda.synchronize()
            taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert recorded.on and taken[0] == taken[1] and steps.item() == 200
    with torch.no_grad():
        assert loss.item() == pytest.approx(model(X, X)[1].item(), rel=1e-5)


def test_a_recording_that_fails_costs_one_line_and_dropout_still_works():
    lines = []
    recorded = Recorder(on=True, report=lines.append)
    seen = torch.zeros((), device='cuda')

    @recorded
    def bad(x):
        torch.nn.functional.dropout(x, 0.5)
        seen.add_(x.sum().item())

    @recorded
    def good(x):
        return torch.nn.functional.dropout(x, 0.5)

    for _ in range(6):
        good(torch.ones(1000, device='cuda'))
        bad(torch.ones(3, device='cuda'))
    torch.manual_seed(3)
    first = good(torch.ones(1000, device='cuda')).clone()
    torch.manual_seed(3)
    assert len(lines) == 1 and 'bad could not be recorded' in lines[0] and seen.item() == 18
    assert first.equal(good(torch.ones(1000, device='cuda'))) and 0 < (first == 0).sum() < 1000


def test_dropout_in_a_graph_follows_the_seed():
    recorded = Recorder(on=True)
    draw = recorded(lambda x: torch.nn.functional.dropout(x, 0.5))
    x, masks = torch.ones(1000, device='cuda'), []
    for seed in (1, 2, 3, 4, 5, 4, 1):
        torch.manual_seed(seed)
        masks.append(draw(x).clone())
    assert masks[3].equal(masks[5]) and masks[0].equal(masks[6]) and not masks[3].equal(masks[4])


# -----------------------------------------------------------------------------
# sampling
def texts(model, prompts, n, **options):
    return torch.stack(list(stream(model, prompts, n, **options)), dim=1).tolist()


NETWORKS = [
    dict(),
    dict(pos='alibi', n_kv_head=2, token_shift=True),
    MODERN,
    {**MODERN, 'prefix_lm': True},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('sizes', NETWORKS, ids=['gpt2', 'alibi', 'modern', 'prefix'])
def test_replayed_steps_make_the_same_texts(sizes, options):
    """
    Prompts of unequal length, ten samples each, longer than block_size. The tokens equal those of
    the same kernels without a recording; without them, at least nine texts of ten are equal.
    """
    model = small(**sizes)
    prompts = [torch.randint(61, (n,)).tolist() for n in (2, 9, 40)]
    options = dict(options, samples=range(10), stride=16)
    got = texts(model, prompts, 90, **options)
    assert got == texts(model, prompts, 90, compiled=model, cuda_graph=False, **options)
    others = texts(model, prompts, 90, cuda_graph=False, **options)
    assert sum(a == b for a, b in zip(got, others)) >= 27


def test_spans_of_a_long_text_make_the_same_tokens():
    model = small(pos='rotary', block_size=1024)
    prompts = [[1, 2, 3], [4]]
    got = texts(model, prompts, 700, seed=1)
    assert got == texts(model, prompts, 700, seed=1, compiled=model, cuda_graph=False)


def test_tokens_beyond_a_stop_are_thrown_away():
    model = small(pos='rotary')
    stop = lambda b, new: len(new) == (3, 18)[b]
    options = dict(seed=1, stop=stop)
    got = texts(model, [[1, 2], [3]], 60, **options)
    assert got == texts(model, [[1, 2], [3]], 60, **options, compiled=model, cuda_graph=False)
    assert len(got[0]) == 18


@pytest.mark.parametrize('pos', ['learned', 'rotary'])
def test_a_chat_of_three_turns_is_recorded_once(pos, monkeypatch):
    count, record = [], Recorder.record
    monkeypatch.setattr(Recorder, 'record', lambda *args: count.append(1) or record(*args))
    model, text = small(pos=pos), []
    plain, ours = (new_cache(model, static=True) for _ in range(2))
    for n in (3, 7, 5):
        text += torch.randint(61, (n,)).tolist()
        want = torch.cat(list(stream(model, [text], 8, seed=n, cache=plain, cuda_graph=False)))
        assert torch.cat(list(stream(model, [text], 8, seed=n, cache=ours))).equal(want)
        text += want.tolist()
    assert len(count) == 1


@compiles
def test_compiled_steps_are_recorded_too():
    model = small(pos='rotary')
    prompts = [torch.randint(61, (n,)).tolist() for n in (2, 9)]
    options = dict(seed=1, samples=range(10))
    got = texts(model, prompts, 40, **options, compiled=torch.compile(model, dynamic=False))
    plain = texts(model, prompts, 40, **options)
    assert sum(a == b for a, b in zip(got, plain)) >= 18


def test_a_model_generates_in_bfloat16_and_by_its_own_method():
    model = small().bfloat16()
    ids = torch.randint(61, (2, 5), device='cuda')
    made = model.generate(ids, 20, temperature=0)
    assert made.shape == (2, 25) and made.is_cuda and made[:, :5].equal(ids)


def test_scripts_sample_chat_and_score(project):
    train(project, 'out-gpu')
    sample = 'sample.py', '--device=cuda', '--out_dir=out-gpu'
    flags = '--start=to be', '--stop=q', '--max_new_tokens=40', '--num_samples=3'
    out = project.run(*sample, *flags).stdout
    assert out.count('---------------') == 3 and out.startswith('to be')
    chat = subprocess.run(
        [sys.executable, *sample, '--interactive=True', '--max_new_tokens=5'],
        cwd=project.path,
        input='to be\nor\nnot\n',
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **ENV},
    )
    assert chat.returncode == 0 and chat.stdout.count('> ') == 4, chat.stderr
    assert 'val' in project.run('eval.py', '--device=cuda', '--out_dir=out-gpu').stdout
    assert 'is for CPUs' in project.error(*sample, '--quantize=int8')
