"""Bad checkpoints and optimizer files are refused in one line, before training and large memory."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support import weights

SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)
WTE = 'transformer.wte.weight'


def write(path, **changes):
    model = GPT(GPTConfig(**SIZES))
    content = dict(model=model.state_dict(), model_args=dict(SIZES), config=dict(dataset='tiny'))
    torch.save({**content, 'iter_num': 5, 'best_val_loss': 1.0, **changes}, path)


@pytest.mark.parametrize(
    'changes',
    [
        dict(model_args={**SIZES, 'block_size': 10**18}),
        dict(model_args={**SIZES, 'block_size': 10**30}),
        dict(model_args={**SIZES, 'block_size': 2**31 - 1}),
        dict(model_args={**SIZES, 'lora_rank': 10**18}),
        dict(model_args={**SIZES, 'lora_rank': 10**30}),
        dict(model_args={**SIZES, 'n_layer': 10**9}),
        dict(model_args={**SIZES, 'logit_cap': float('nan')}),
        dict(model_args={**SIZES, 'n_head': 10**30}),
        dict(iter_num=-5),
        dict(iter_num=10**30),
        dict(iter_num=True),
        dict(best_val_loss=torch.ones(2)),
        dict(best_val_loss='low'),
        dict(best_iter='x'),
        dict(config=dict(dataset=5)),
        dict(config=dict(mask_before_token=3)),
        dict(best_file=7),
        dict(run_id=7),
        dict(optimizer_file=3),
        dict(model={WTE: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
        dict(model={WTE: torch.ones(16, 8).to_sparse()}),
        dict(model={WTE: torch.ones(3)}),
        dict(model={}),
    ],
    ids=lambda changes: '-'.join(changes),
)
def test_a_bad_checkpoint_is_refused_in_one_line(tmp_path, changes):
    write(tmp_path / 'ckpt.pt', **changes)
    with pytest.raises(ValueError) as e:
        weights.open_model(str(tmp_path / 'ckpt.pt'))
    assert '\n' not in str(e.value)


def test_scripts_refuse_a_bad_checkpoint_in_one_line(project):
    folder = project.path / 'out-bad'
    folder.mkdir()
    write(folder / 'ckpt.pt', iter_num=-5)
    for script in ('sample.py', 'eval.py'):
        assert 'refused' in project.error(script, '--device=cpu', '--out_dir=out-bad')
    assert 'refused' in project.error('train.py', *TINY, '--init_from=out-bad')
    assert 'refused' in project.error('convert.py', '--init_from=out-bad', '--output=out-bad-hf')
    assert not (project.path / 'out-bad-hf').exists()


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_a_refusal_is_one_line_whatever_the_pickle(project, protocol):
    folder = project.path / f'out-protocol-{protocol}'
    folder.mkdir()
    torch.save({'model': {}, 'x': os.system}, folder / 'ckpt.pt', pickle_protocol=protocol)
    assert 'refused' in project.error('sample.py', '--device=cpu', f'--out_dir={folder.name}')
    with open(folder / 'ckpt.pt', 'wb') as f:
        pickle.dump({'model': {}}, f, protocol=protocol)
    assert 'refused' in project.error('sample.py', '--device=cpu', f'--out_dir={folder.name}')


def test_quantized_weights_are_refused_in_one_line(project):
    folder = project.path / 'out-quantized'
    folder.mkdir()
    quantized = torch.quantize_per_tensor(torch.ones(16, 8), 0.1, 0, torch.qint8)
    write(folder / 'ckpt.pt', model={WTE: quantized})
    assert 'refused' in project.error('sample.py', '--device=cpu', '--out_dir=out-quantized')


DAMAGE = [
    'a buffer is missing',
    'a buffer is a number',
    'a buffer is of integers',
    'one buffer too many',
    'no state',
    'a parameter too many',
    'a group is missing',
    'state is a list',
]


def damage(state, kind):
    first = state['state'][0]
    if kind == 'a buffer is missing':
        del first['exp_avg' if 'exp_avg' in first else 'momentum_buffer']
    elif kind == 'a buffer is a number':
        first[next(name for name in first if name != 'step')] = torch.tensor(1.0)
    elif kind == 'a buffer is of integers':
        name = next(name for name in first if name != 'step')
        first[name] = first[name].long()
    elif kind == 'one buffer too many':
        first['max_exp_avg_sq'] = torch.zeros(3)
    elif kind == 'no state':
        state['state'] = {}
    elif kind == 'a parameter too many':
        state['state'][10**6] = dict(first)
    elif kind == 'a group is missing':
        state['param_groups'] = state['param_groups'][:-1]
    elif kind == 'state is a list':
        state['state'] = [1, 2]


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_optimizer_file_that_does_not_fit_is_refused_in_one_line(project, optimizer):
    flags = [*TINY, f'--optimizer={optimizer}', '--tie_embeddings=False']
    out = project.path / f'out-whole-{optimizer}'
    project.run('train.py', *flags, f'--out_dir={out.name}', '--max_iters=3')
    name = ckpt.load(str(out))['optimizer_file']
    for kind in DAMAGE:
        bad = project.path / f'out-damaged-{optimizer}'
        shutil.copytree(out, bad, dirs_exist_ok=True)
        state = torch.load(out / name)
        damage(state, kind)
        torch.save(state, bad / name)
        message = project.error('train.py', *flags, f'--out_dir={bad.name}', '--init_from=resume')
        assert 'its optimizer state does not fit this model' in message, kind


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_resumed_run_ignores_the_settings_in_its_optimizer_file(project, optimizer):
    flags = [*TINY, f'--optimizer={optimizer}', '--tie_embeddings=False']
    straight, edited = (project.path / f'out-{name}-{optimizer}' for name in ('straight', 'edited'))
    project.run('train.py', *flags, f'--out_dir={straight.name}', '--max_iters=6')
    project.run('train.py', *flags, f'--out_dir={edited.name}', '--max_iters=3')
    name = ckpt.load(str(edited))['optimizer_file']
    state = torch.load(edited / name)
    for group in state['param_groups']:
        group.update(eps='small', amsgrad=True, maximize=True, lr=7.0, steps=99)
        group.update(foreach=True, capturable=True)
    torch.save(state, edited / name)
    flags += [f'--out_dir={edited.name}', '--init_from=resume']
    project.run('train.py', *flags, '--max_iters=6')
    a, b = (ckpt.load(str(out))['model'] for out in (straight, edited))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_starts_anew_where_the_validation_does(project):
    flags = [*TINY, '--always_save_checkpoint=False', '--out_dir=out-other-val']
    project.run('train.py', *flags, '--max_iters=5')
    folder = project.path / 'out-other-val'
    checkpoint = ckpt.load(str(folder / 'ckpt.pt'))
    del checkpoint['path']
    torch.save({**checkpoint, 'best_val_loss': 0.001}, folder / 'ckpt.pt')
    flags += ['--init_from=resume']
    same = project.run('train.py', *flags, '--max_iters=10').stdout
    assert 'best val loss 0.0010' in same and 'does not count' not in same
    other = project.run('train.py', *flags, '--max_iters=15', '--eval_iters=3').stdout
    assert 'eval_iters x batch_size changed' in other and 'best val loss 0.0010' not in other
    assert ckpt.load(str(folder / 'best.pt'))['iter_num'] in (10, 15)


def test_an_edited_network_may_hold_tensors_that_are_no_weights(trained, monkeypatch):
    class Edited(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.ones(3)
            self.register_buffer('mask', torch.ones(3), persistent=False)

    monkeypatch.setattr(weights, 'GPT', Edited)
    model, _ = weights.open_model(str(trained[0]))
    assert model.scale.tolist() == model.mask.tolist() == [1, 1, 1]


def test_opening_weights_does_not_import_the_compiler(project, trained):
    """Importing torch._dynamo takes most of a second."""
    code = "import sys; from support import weights; weights.open_model('out-trained'); "
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=project.path, check=True)
