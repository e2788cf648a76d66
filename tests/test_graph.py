"""
The parts of an iteration as CUDA graphs, on a CPU: tape.py records their operations and replays
them on the same memory. So these tests see whether the parts depend on anything but tensors that
are written in place.
"""

import math
from pathlib import Path

import pytest
import tape
import torch
from conftest import ROOT, TINY

from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support.device import pays_to_compile
from support.graphs import Recorder, can_record
from support.runlog import read_log

TAPED = f"""
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[:0] = ['.', {str(Path(__file__).parent)!r}]
import model, muon, tape, torch
from support import graphs

tape.install()
graphs.can_record = lambda *args: os.environ['TAPE'] == '1'
set_rates = muon.set_rates
def with_tensors(optimizer, lr, iteration): # as on CUDA
    for group in optimizer.param_groups:
        group['capturable'] = True
    set_rates(optimizer, lr, iteration)
muon.set_rates = with_tensors

planted = os.environ.get('PLANT')
if planted: # the loss of this iteration is nan; forward knows it by a tensor
    factor = torch.ones(())
    forward = model.GPT.forward
    def spoiled(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        return logits, loss * factor if self.training else loss
    model.GPT.forward = spoiled
    spoil = muon.set_rates
    def plant(optimizer, lr, iteration):
        factor.fill_(float('nan') if iteration == int(planted) else 1.0)
        spoil(optimizer, lr, iteration)
    muon.set_rates = plant
if os.environ.get('ITEM'): # a step looks at a number
    from data.loader import Loader
    scale_loss = Loader.scale_loss
    def look(self, loss, Y):
        loss.item()
        return scale_loss(self, loss, Y)
    Loader.scale_loss = look
runpy.run_path('train.py', run_name='__main__')
"""
MUON = ['--optimizer=muon', '--pos=rotary', '--tie_embeddings=False', '--weight_decay=0.1']


@pytest.fixture(scope='module')
def taped(project):
    """taped(out_dir, flags, on) runs train.py with its parts taped, or not."""
    (project.path / 'taped.py').write_text(TAPED)

    def run(out, *flags, on=True, **env):
        env = {'TAPE': str(int(on)), **env}
        command = 'taped.py', 'train.py', *TINY, f'--out_dir={out}', '--log_interval=1', *flags
        return project.run(*command, env=env).stdout

    run.path = project.path
    return run


def outcome(folder):
    """(rows of the log, weights, tensors of the optimizer's state) of a run."""
    checkpoint = ckpt.load(str(folder / 'ckpt.pt'))
    states = ckpt.read(str(folder / checkpoint['optimizer_file']))['state']
    names = ('iter', 'loss', 'train_loss', 'val_loss', 'grad_norm', 'clipped', 'bad_steps', 'lr')
    rows = [[row.get(name) for name in names] for row in read_log(folder / 'log.csv')]
    tensors = []
    for state in states.values():
        tensors += state.values()
    return rows, [*checkpoint['model'].values()], tensors


def assert_equal(tensors, others):
    assert len(tensors) == len(others)
    assert all(torch.equal(x, y) for x, y in zip(tensors, others))


def same(a, b):
    (rows, weights, states), (rows_b, weights_b, states_b) = outcome(a), outcome(b)
    assert repr(rows) == repr(rows_b)  # as text, since nan is not equal to itself
    assert_equal(weights, weights_b)
    assert_equal(states, states_b)


def weights(folder):
    return [*ckpt.load(str(folder / 'ckpt.pt'))['model'].values()]


@pytest.mark.parametrize(
    'flags',
    [
        ['--max_iters=30', '--dropout=0.2'],
        ['--gradient_accumulation_steps=3', '--dropout=0.1'],
        MUON,
        [*MUON, '--gradient_accumulation_steps=3'],
        ['--grad_clip=0.0'],
        ['--grad_clip=0.01'],
        ['--gradient_accumulation_steps=4', '--batch_size_warmup_iters=8'],
        ['--gradient_checkpointing=True', '--loss_chunk=20'],
        ['--pos=alibi', '--activation=swiglu', '--n_kv_head=1', '--token_shift=True'],
        ['--mask_before_token=,', '--dropout=0.1'],
        ['--mask_before_token=,', '--prefix_lm=True'],
        [*MUON, '--dtype=bfloat16'],
    ],
    ids=' '.join,
)
def test_a_replayed_run_equals_a_plain_one_bit_for_bit(taped, flags):
    out = taped('out-taped', *flags)
    assert 'CUDA graph' in out and 'could not be recorded' not in out
    taped('out-plain', *flags, on=False)
    same(taped.path / 'out-taped', taped.path / 'out-plain')


def test_corrections_of_weights_are_trained_by_replay_too(taped):
    taped('out-base', on=False)
    for name, on in (('out-taped-lora', True), ('out-plain-lora', False)):
        taped(name, '--init_from=out-base', '--lora_rank=2', '--dropout=0.1', on=on)
    same(taped.path / 'out-taped-lora', taped.path / 'out-plain-lora')


@pytest.mark.parametrize('flags', [[], MUON], ids=['adamw', 'muon'])
def test_a_bad_step_leaves_weights_and_state_alone(taped, flags):
    for name, on in (('out-taped-bad', True), ('out-plain-bad', False)):
        taped(name, *flags, on=on, PLANT='7')
    same(taped.path / 'out-taped-bad', taped.path / 'out-plain-bad')
    rows = read_log(taped.path / 'out-taped-bad' / 'log.csv')
    assert [row['iter'] for row in rows if row.get('bad_steps')] == [7]
    assert all(math.isfinite(row['val_loss']) for row in rows if 'val_loss' in row)


@pytest.mark.parametrize('on', [True, False])
@pytest.mark.parametrize('flags', [[], MUON], ids=['adamw', 'muon'])
def test_a_bad_step_changes_no_weight_and_no_state(taped, flags, on):
    """Not even Muon's momentum or AdamW's step count: a run that ends before it is the same."""
    for name, iters in (('out-before-bad', 7), ('out-after-bad', 8)):
        taped(name, *flags, f'--max_iters={iters}', on=on, PLANT='7')
    _, weights_before, states_before = outcome(taped.path / 'out-before-bad')
    _, weights_after, states_after = outcome(taped.path / 'out-after-bad')
    assert_equal(weights_before, weights_after)
    assert_equal(states_before, states_after)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('flags', [['--dropout=0.1'], MUON], ids=['adamw', 'muon'])
def test_a_run_resumes_with_and_without_graphs(taped, flags, first):
    taped('out-straight', *flags, '--max_iters=16')
    taped('out-resumed', *flags, '--max_iters=9', on=first)
    taped('out-resumed', *flags, '--max_iters=16', '--init_from=resume', on=not first)
    assert_equal(weights(taped.path / 'out-straight'), weights(taped.path / 'out-resumed'))


def test_a_recording_that_fails_costs_one_line(taped):
    out = taped('out-item', ITEM='1')
    assert 'add_gradients could not be recorded as a CUDA graph and runs without: ' in out
    assert out.count('could not be recorded') == 1
    taped('out-plain-item', on=False)
    same(taped.path / 'out-item', taped.path / 'out-plain-item')


def test_an_older_optimizer_file_resumes(taped):
    """Its rates are numbers, and Muon counts its steps."""
    taped('out-older-state', *MUON, '--max_iters=6')
    taped('out-straight-muon', *MUON, '--max_iters=12')
    older = taped.path / 'out-older-state'
    file = older / ckpt.load(str(older))['optimizer_file']
    state = torch.load(file)
    for group in state['param_groups']:
        del group['capturable']
        group['lr'] = 1e-3
        if group.get('muon'):
            group.update(momentum=0.95, steps=6)
    torch.save(state, file)
    taped('out-older-state', *MUON, '--max_iters=12', '--init_from=resume')
    assert_equal(weights(taped.path / 'out-straight-muon'), weights(older))


def test_a_recorded_function_asks_for_the_shape_it_was_recorded_for(monkeypatch):
    tape.install(monkeypatch.setattr)
    seen = torch.zeros(3)
    add = Recorder(on=True)(lambda x: seen.add_(x))
    for i in range(6):
        add(torch.full((3,), float(i)))
    assert seen.tolist() == [15.0] * 3
    message = r'was recorded for a tensor of \(3,\), torch.float32 and got one of'
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(AssertionError, match=message):
            add(wrong)


def test_a_recorder_that_is_off_leaves_functions_as_they_are():
    assert Recorder(on=False)(len) is len


@pytest.mark.parametrize(
    'case, want',
    [
        (('auto', 'cuda:0', 'bfloat16', False, False), True),
        (('auto', 'cuda:0', 'float32', False, False), True),
        ((True, 'cuda:0', 'float32', False, False), True),
        ((False, 'cuda:0', 'float32', False, False), False),
        (('auto', 'cpu', 'float32', False, False), False),
        (('auto', 'mps', 'float32', False, False), False),
        (('auto', 'cuda:0', 'float16', False, False), False),
        (('auto', 'cuda:0', 'float32', True, False), False),
        (('auto', 'cuda:0', 'float32', False, True), False),
    ],
)
def test_what_cannot_be_recorded_takes_the_ordinary_way(case, want):
    assert can_record(*case) is want


@pytest.mark.parametrize(
    'case, message',
    [
        ((True, 'cpu', 'float32', False, False), 'on a CUDA device'),
        ((True, 'cuda:0', 'float32', True, False), 'without torchrun'),
        ((True, 'cuda:0', 'float16', False, False), 'with float32 or bfloat16'),
        ((True, 'cuda:0', 'float32', False, True), 'without dropout beside'),
        (('yes', 'cuda:0', 'float32', False, False), "cuda_graph='yes' is none of"),
    ],
)
def test_asking_for_what_cannot_be_recorded_is_an_error(case, message):
    with pytest.raises(ValueError, match=message):
        can_record(*case)


def test_scripts_say_so_in_one_line(project):
    command = 'train.py', *TINY, '--cuda_graph=True'
    line = project.error(*command)
    assert 'cuda_graph=True is supported only on a CUDA device' in line
    flag = '--gradient_accumulation_steps=2'
    done = project.run(*command, flag, processes=2, check=False)
    assert done.returncode != 0 and 'cuda_graph=True is supported only on' in done.stderr


RECIPES = {
    'train_shakespeare_char': 65,
    'train_calculator': 96,
    'train_reverser': 96,
    'train_wordcalc': 96,
    'train_gpt2': 50304,
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_only_a_long_run_is_worth_compiling(recipe):
    settings = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12)
    settings |= dict(gradient_accumulation_steps=40, max_iters=600000)
    exec((ROOT / 'config' / f'{recipe}.py').read_text(encoding='utf-8'), settings)
    sizes = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    with torch.device('meta'):
        model = GPT(GPTConfig(**sizes, vocab_size=RECIPES[recipe], bias=False))
    per_token = model.flops_per_token()
    tokens = settings['batch_size'] * settings['block_size']
    tokens *= settings['gradient_accumulation_steps'] * settings['max_iters']
    assert pays_to_compile(tokens * per_token) == (recipe == 'train_gpt2')


def test_fine_tuning_gpt2_xl_is_short():
    with torch.device('meta'):
        per_token = GPT(GPTConfig(n_layer=48, n_head=25, n_embd=1600)).flops_per_token()
    assert not pays_to_compile(160 * 4096 * per_token)
