import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_dataset

from configurator import default_of, read_knobs, run_file
from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support import resume, weights
from support.runlog import read_log

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def weights_of(folder):
    return ckpt.load(str(folder))['model']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def nanogpt_checkpoint(folder, prefix='_orig_mod.', **config):
    """A ckpt.pt as nanoGPT writes it: one file, compiled names, a tensor for the best loss, no meta."""
    folder.mkdir()
    torch.manual_seed(5)
    args = dict(
        n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=18, dropout=0.0
    )
    model = GPT(GPTConfig(**args))
    optimizer = torch.optim.AdamW(
        [
            {'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
            {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.99),
    )
    idx = torch.randint(18, (4, 16))
    model(idx, idx)[1].backward()
    optimizer.step()
    torch.save(
        {
            'model': {f'{prefix}{name}': p for name, p in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': args,
            'iter_num': 3,
            'best_val_loss': torch.tensor(9.0),
            'config': {'dataset': 'tiny', **config},
        },
        folder / 'ckpt.pt',
    )
    return model


def test_a_run_learns_and_leaves_checkpoint_log_and_picture(trained):
    folder, out = trained
    assert {'ckpt.pt', 'optimizer-10.pt', 'log.csv', 'loss.png', 'config.py', 'run.lock'} == set(
        os.listdir(folder)
    )
    rows = read_log(folder / 'log.csv')
    assert [r['iter'] for r in rows if 'val_loss' in r] == [0, 5, 10]
    first, last = rows[0]['val_loss'], rows[-1]['val_loss']
    assert 2.6 < first < 3.1 and last < first - 0.3
    assert f'step 10: train loss {rows[-1]["train_loss"]:.4f}, val loss {last:.4f}' in out
    assert 'iter 9: loss ' in out and 'tok/s' in out and 'mfu' not in out
    loaded = ckpt.load(str(folder))
    assert (
        loaded['iter_num'] == 10
        and abs(loaded['best_val_loss'] - last) < 1e-6
        and loaded['meta']['stoi']['b'] >= 0
    )
    assert (
        loaded['config']['learning_rate'] == 1e-2
        and loaded['config']['vocab_size'] == loaded['meta']['vocab_size']
    )


def test_the_printed_validation_loss_is_that_of_the_whole_split(project, trained):
    out = project.run(
        'train.py',
        *TINY,
        '--out_dir=out-trained',
        '--init_from=resume',
        '--eval_only=True',
        '--eval_iters=1000',
    ).stdout
    model = weights.build_model(ckpt.load(str(trained[0]))).eval()
    tokens = torch.from_numpy(
        np.fromfile(project.path / 'data/tiny/val.bin', dtype=np.uint16).astype(np.int64)
    )
    n = (len(tokens) - 1) // 16 * 16
    with torch.no_grad():
        loss = model(tokens[:n].view(-1, 16), tokens[1 : n + 1].view(-1, 16))[1]
    assert f'val loss {loss:.4f}' in out


def test_the_same_command_gives_the_same_weights_and_another_seed_others(project, trained):
    project.run('train.py', *TINY, '--out_dir=out-again')
    project.run('train.py', *TINY, '--out_dir=out-seed', '--seed=7')
    assert same(weights_of(trained[0]), weights_of(project.path / 'out-again'))
    assert not same(weights_of(trained[0]), weights_of(project.path / 'out-seed'))


def test_resumed_run_equals_uninterrupted_run_bitwise(project):
    flags = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=3']
    for name in ('out-straight', 'out-stopped'):
        shutil.rmtree(project.path / name, ignore_errors=True)
    project.run('train.py', *flags, '--out_dir=out-straight')
    project.run('train.py', *flags, '--out_dir=out-stopped', '--max_iters=5')
    out = project.run('train.py', *flags, '--out_dir=out-stopped', '--init_from=auto').stdout
    assert 'resuming' in out and 'iteration 5' in out
    straight, stopped = project.path / 'out-straight', project.path / 'out-stopped'
    assert same(weights_of(straight), weights_of(stopped))
    a, b = (
        torch.load(f / 'optimizer-10.pt', weights_only=True)['state'] for f in (straight, stopped)
    )
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])
    numbers = lambda folder: [
        (r['iter'], r.get('loss'), r.get('val_loss')) for r in read_log(folder / 'log.csv')
    ]
    assert numbers(straight) == numbers(stopped)


def test_auto_starts_from_scratch_where_there_is_no_checkpoint(project):
    assert (
        'resuming'
        not in project.run(
            'train.py', *TINY, '--out_dir=out-auto', '--init_from=auto', '--max_iters=1'
        ).stdout
    )


def test_fine_tuning_takes_the_weights_and_nothing_else(project, trained):
    out = project.run(
        'train.py',
        *TINY,
        '--out_dir=out-tuned',
        f'--init_from={trained[0]}',
        '--max_iters=1',
        '--eval_interval=1',
    ).stdout
    steps = [line for line in out.splitlines() if line.startswith('step')]
    assert (
        steps[0].startswith('step 0:')
        and steps[0].split(': ')[1] == trained[1].splitlines()[-3].split(': ')[1]
    )


@pytest.mark.parametrize('prefix', ['', 'module._orig_mod.', '_orig_mod.module.'])
def test_names_of_compiled_and_distributed_models_are_ours(tmp_path, prefix):
    model = nanogpt_checkpoint(tmp_path / 'wrapped', prefix)
    assert same(weights_of(tmp_path / 'wrapped'), model.state_dict())


def test_a_nanogpt_checkpoint_resumes(project):
    model = nanogpt_checkpoint(project.path / 'out-nano')
    write_dataset(project.path / 'data' / 'nano', 'abcdefghijklmnopqr' * 50)
    out = project.run(
        'train.py',
        *TINY,
        '--dataset=nano',
        '--out_dir=out-nano',
        '--init_from=resume',
        '--max_iters=6',
    ).stdout
    assert 'at iteration 3' in out and 'iter 3: loss' in out
    assert not same(weights_of(project.path / 'out-nano'), model.state_dict())
    state = torch.load(project.path / 'out-nano' / 'optimizer-6.pt', weights_only=True)['state']
    assert all(s['step'] == 4 for s in state.values())  # one step of nanoGPT's, three of ours


def test_a_shorter_context_may_be_asked_of_a_resumed_run(project):
    project.run('train.py', *TINY, '--out_dir=out-cropped', '--max_iters=5')
    project.run('train.py', *TINY, '--out_dir=out-cropped', '--init_from=resume', '--block_size=8')
    loaded = ckpt.load(str(project.path / 'out-cropped'))
    state = ckpt.read(str(project.path / 'out-cropped' / loaded['optimizer_file']))['state']
    assert (
        loaded['model']['transformer.wpe.weight'].shape == (8, 16)
        and [s['exp_avg'].shape for s in state.values()].count((8, 16)) == 1
    )


def test_gpt2_weights_are_fine_tuned_from_a_local_folder(project):
    from test_model import gpt2_of_transformers

    gpt2_of_transformers().save_pretrained(project.path / 'hf')
    out = project.run(
        'train.py',
        '--init_from=hf',
        '--dataset=tiny',
        '--device=cpu',
        '--block_size=16',
        '--batch_size=2',
        '--max_iters=2',
        '--gradient_accumulation_steps=1',
        '--eval_iters=1',
        '--out_dir=out-hf',
    ).stdout
    assert (
        'iter 1' in out
        and ckpt.load(str(project.path / 'out-hf'))['model_args']['vocab_size'] == 101
    )


def test_saving_and_evaluating_have_intervals_of_their_own(project):
    project.run(
        'train.py', *TINY, '--out_dir=out-intervals', '--save_interval=3', '--keep_checkpoints=10'
    )
    names = sorted(path.name for path in (project.path / 'out-intervals').glob('ckpt-*.pt'))
    assert names == [
        'ckpt-10.pt',
        'ckpt-3.pt',
        'ckpt-6.pt',
        'ckpt-9.pt',
    ]  # the last iteration in any case


def test_the_log_holds_the_health_of_the_network(project, trained):
    rows = read_log(trained[0] / 'log.csv')
    steps = [row for row in rows if 'loss' in row]
    assert [row['iter'] for row in steps] == list(range(10)) and [
        row['tokens'] for row in steps
    ] == [64 * (n + 1) for n in range(10)]
    for row in steps:
        assert (
            row['grad_norm'] > 0
            and row['clipped'] == (row['grad_norm'] > 1.0)
            and row['bad_steps'] == 0
        )
        assert row['tokens_per_second'] > 0 and row['memory_gb'] > 0.05 and row['lr'] > 0
        assert ('weight_norm' in row) == (row['iter'] % 5 == 0)  # taken at evaluations
    torch.manual_seed(1337)
    model = GPT(GPTConfig(16, 18, 2, 2, 16, 0.0, False))
    norm = sum((p.detach() ** 2).sum() for p in model.parameters()).sqrt().item()
    # AdamW's first step moves each of n weights by the learning rate, except for weight decay
    n = sum(p.numel() for p in model.parameters())
    assert 0 < abs(steps[0]['weight_norm'] - norm) < steps[0]['lr'] * n**0.5 * 1.05


def test_the_config_of_a_run_repeats_it(project, trained):
    path = trained[0] / 'config.py'
    assert path.read_text().startswith('# from iteration 0: python train.py --device=cpu ')
    project.run('train.py', path, '--out_dir=out-repeated')
    assert same(weights_of(trained[0]), weights_of(project.path / 'out-repeated'))


def test_a_resumed_run_lists_both_commands(project):
    project.run('train.py', *TINY, '--out_dir=out-commands', '--max_iters=5')
    project.run('train.py', *TINY, '--out_dir=out-commands', '--max_iters=7', '--init_from=resume')
    lines = (project.path / 'out-commands' / 'config.py').read_text().splitlines()
    assert [line[:24] for line in lines[:3]] == [
        '# from iteration 0: pyth',
        '# from iteration 5: pyth',
        '',
    ]
    rows = read_log(project.path / 'out-commands' / 'log.csv')
    seconds = [row['seconds'] for row in rows]
    assert seconds == sorted(seconds) and [row['iter'] for row in rows if 'loss' in row] == list(
        range(7)
    )


def test_a_target_loss_ends_the_run_and_tells_the_time(project, trained):
    rows = [row for row in read_log(trained[0] / 'log.csv') if 'val_loss' in row]
    target = rows[1]['val_loss'] + 1e-3  # that of iteration 5
    out = project.run('train.py', *TINY, '--out_dir=out-target', f'--target_loss={target}').stdout
    assert (
        f'val loss {rows[1]["val_loss"]:.4f} reached target_loss={target}: iteration 5, ' in out
        and ' s of training' in out
    )
    assert ckpt.load(str(project.path / 'out-target'))['iter_num'] == 5


def test_patience_ends_a_run_that_no_longer_improves_and_survives_a_resume(project):
    flags = [
        *TINY,
        '--eval_interval=2',
        '--max_iters=40',
        '--learning_rate=0',
        '--min_lr=0',
        '--patience=4',
    ]
    assert (
        'no better val loss since iteration 0: iteration 8,'
        in project.run('train.py', *flags, '--out_dir=out-patience').stdout
    )
    project.run('train.py', *flags, '--out_dir=out-patience2', '--max_iters=4')
    out = project.run('train.py', *flags, '--out_dir=out-patience2', '--init_from=resume').stdout
    assert 'no better val loss since iteration 0: iteration 8,' in out


def test_a_resumed_run_goes_on_in_the_same_wandb_run(project):
    """With a stand-in for the package, which writes down how it is called."""
    (project.path / 'fake').mkdir()
    (project.path / 'fake' / 'wandb.py').write_text('''
import json
class Run:
    def __init__(self, **kwargs):
        self.id = kwargs["id"] or "run-1"
        self.tell("init", {"id": kwargs["id"], "resume": kwargs["resume"], "name": kwargs["name"], "lr": kwargs["config"]["learning_rate"]})
    def tell(self, *what):
        print(json.dumps(what), file=open("wandb.txt", "a"))
    def define_metric(self, *args, **kwargs): pass
    def log(self, numbers): self.tell("log", numbers)
    def finish(self): self.tell("finish")
init = Run
''')
    flags = [*TINY, '--out_dir=out-wandb', '--wandb_log=True', '--wandb_run_name=tiny']
    env = {'PYTHONPATH': str(project.path / 'fake')}
    project.run('train.py', *flags, '--max_iters=5', env=env)
    project.run('train.py', *flags, '--init_from=resume', env=env)
    told = [json.loads(line) for line in (project.path / 'wandb.txt').read_text().splitlines()]
    assert [what[1]['id'] for what in told if what[0] == 'init'] == [None, 'run-1'] and told[
        -1
    ] == ['finish']
    numbers = [what[1] for what in told if what[0] == 'log']
    rows = read_log(project.path / 'out-wandb' / 'log.csv')
    assert [n for n in numbers if n['iter'] >= 5 and 'loss' in n][0]['loss'] == [
        row for row in rows if row['iter'] >= 5 and 'loss' in row
    ][0]['loss']
    assert {'lr', 'grad_norm', 'clipped', 'tokens', 'seconds', 'memory_gb', 'weight_norm'} <= [
        n for n in numbers if 'weight_norm' in n
    ][0].keys()


def test_the_gradient_scaler_of_float16_is_resumed(tmp_path):
    model = GPT(GPTConfig(8, 8, 1, 1, 8))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
    optimizer.step()
    make = lambda: torch.amp.GradScaler('cpu', enabled=True)
    scaler = make()
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 512.0, '_growth_tracker': 77})
    ckpt.save(
        str(tmp_path / 'ckpt.pt'),
        {'model': model.state_dict(), 'model_args': vars(model.config), 'iter_num': 1},
        {**optimizer.state_dict(), 'scaler': scaler.state_dict()},
    )
    other = make()
    resume.load_optimizer(optimizer, other, ckpt.load(str(tmp_path)))
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 512.0


def test_eval_only_writes_nothing(project):
    out = project.run('train.py', *TINY, '--eval_only=True', '--out_dir=out-none').stdout
    assert 'step 0: train loss' in out and not (project.path / 'out-none').exists()


def test_bfloat16_on_cpu_trains(project):
    assert (
        'bfloat16'
        in project.run(
            'train.py', *TINY, '--dtype=bfloat16', '--out_dir=out-bf16', '--max_iters=2'
        ).stdout
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_compiled_model_trains_on_a_gpu(project):
    out = project.run(
        'train.py', *TINY, '--device=cuda', '--compile=True', '--out_dir=out-gpu'
    ).stdout
    assert 'compiled' in out and 'step 10' in out


@pytest.mark.parametrize(
    'flags, message',
    [
        (
            ['--dataset=poems'],
            'data/poems/train.bin not found; prepare the dataset first: python data/text/prepare.py --input=... --dataset=poems',
        ),
        (['--block_size=100000'], 'lower --block_size'),
        (['--n_embd=17'], 'n_embd=17 must be divisible by n_head=2: 17 / 2 = 8.50'),
        (
            ['--learning_rate=1e-6'],
            'min_lr=6e-05 is more than learning_rate=1e-06; add --min_lr=1e-07',
        ),
        (
            ['--matrix_lr=0.01'],
            'matrix_lr needs --optimizer=muon (config/modern.py); adamw has --learning_rate',
        ),
        (
            ['config/modern.py', '--learning_rate=1e-3'],
            'learning_rate is the rate of biases and norms, and this model trains none; set --matrix_lr',
        ),
        (
            ['--dataset=poems', '--init_from=nowhere.pt'],
            'data/poems/train.bin not found',
        ),  # before anything is fetched
        (['--d_head=5'], 'n_embd=16 must be divisible by d_head=5'),
        (['--d_model=32'], 'n_embd=16 and d_model=32'),
        (['--init_from=resume', '--out_dir=out-nothing'], 'out-nothing/ckpt.pt not found'),
        (['--init_from=nowhere.pt'], 'nowhere.pt not found'),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--n_layer=3'],
            'the weights have n_layer=2, you ask for 3 (--n_layer=3); add --n_layer=2',
        ),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--n_embd=32'],
            'the weights have n_embd=16, you ask for 32',
        ),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--bias=True'],
            'the weights have bias=False',
        ),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--block_size=32'],
            'the weights have block_size=16, you ask for 32',
        ),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--dataset=other'],
            'trained with another tokenizer',
        ),
        (['--out_dir=broken.py'], "cannot write into out_dir='broken.py'"),
        (['--out_dir='], "cannot write into out_dir=''"),
        (['--seed=-1'], 'seed=-1 must not be negative'),
        (['--dtype=fp8'], "dtype='fp8' is none of"),
        (['--eval_interval=0'], 'eval_interval=0 must be at least 1'),
        (['--save_interval=-1'], 'save_interval=-1 must be at least 1'),
        (['--keep_checkpoints=0'], 'keep_checkpoints=0 must be at least 1'),
        (['--patience=-1'], 'patience=-1 must not be negative'),
        (['--grad_clip=-1'], 'grad_clip=-1.0 must not be negative'),
        (['--beta2=1.0'], 'beta2=1.0 must be less than 1'),
        (['--optimizer=sgd'], "optimizer='sgd' is none of 'adamw', 'muon'"),
        (['--lr_schedule=trapezoid', '--decay_share=0'], 'decay_share=0.0 must be more than 0'),
        (
            ['--init_from=resume', '--out_dir=out-trained', '--optimizer=muon'],
            'its optimizer state does not fit this model',
        ),
        (['--optimizer=muon', '--matrix_lr=-1'], 'matrix_lr=-1.0 must not be negative'),
        (['--d_head=0'], 'd_head=0 must be at least 1'),
        (['--lr_schedule=step'], "lr_schedule='step' is none of 'cosine', 'trapezoid'"),
        (['--pos=relative'], "pos='relative' is none of 'learned', 'rotary', 'alibi', 'none'"),
        (['--n_kv_head=3'], 'n_head=2 must be divisible by n_kv_head=3'),
        (['--dataset=odd'], 'bytes, so it is no file of uint16'),
        (
            ['--init_from=resume', '--out_dir=out-best-only'],
            'has no optimizer state to resume with',
        ),
        (['--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--wandb_log=True'], 'pip install wandb'),
        (['--dataset=damaged'], 'meta.pkl refused'),
        (['--dataset=beyond'], 'token id 77, but vocab_size is 18'),
        (['broken.py'], 'broken.py:2: invalid syntax'),
    ],
)
def test_bad_input_is_one_line(project, trained, flags, message):
    for name in ('other', 'damaged', 'beyond'):
        folder = project.path / 'data' / name
        if not folder.exists():
            write_dataset(folder, 'abcdefghijklmnopqr' * 50)
    shutil.copytree(project.path / 'data/tiny', project.path / 'data/odd', dirs_exist_ok=True)
    with open(project.path / 'data/odd/val.bin', 'ab') as f:
        f.write(bytes(1 + (project.path / 'data/odd/val.bin').stat().st_size % 2 * -1))
    (project.path / 'out-best-only').mkdir(exist_ok=True)
    only = torch.load(trained[0] / 'ckpt.pt', weights_only=True)
    torch.save({**only, 'optimizer_file': None}, project.path / 'out-best-only/ckpt.pt')
    (project.path / 'data/damaged/meta.pkl').write_bytes(b'nonsense')
    np.array([77] * 900, dtype=np.uint16).tofile(project.path / 'data/beyond/val.bin')
    (project.path / 'broken.py').write_text('max_iters = 1\nmax_iters = = 2\n')
    (project.path / 'shadow').mkdir(exist_ok=True)
    (project.path / 'shadow' / 'wandb.py').write_text('raise ImportError("not installed")')
    assert message in project.error(
        'train.py', *TINY, *flags, env={'PYTHONPATH': str(project.path / 'shadow')}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_cuda_without_cuda_is_one_line(project):
    assert "device='cuda'" in project.error('train.py', *TINY, '--device=cuda')


def test_accumulation_that_cannot_be_shared_says_what_can(project):
    done = project.run(
        'train.py', *TINY, '--gradient_accumulation_steps=3', launcher=TORCHRUN, check=False
    )
    assert (
        'gradient_accumulation_steps=3 cannot be shared by 2 processes; 2 or 4 can' in done.stderr
    )


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda content: content[: len(content) // 2], 'truncated or damaged'),
        (lambda content: b'', 'truncated or damaged'),
        (lambda content: b'not a checkpoint at all', 'truncated or damaged'),
    ],
)
def test_a_damaged_checkpoint_is_refused(project, trained, tmp_path, damage, message):
    (tmp_path / 'ckpt.pt').write_bytes(damage((trained[0] / 'ckpt.pt').read_bytes()))
    for script in (
        ['train.py', *TINY, f'--init_from={tmp_path}'],
        ['sample.py', '--device=cpu', f'--out_dir={tmp_path}'],
    ):
        assert message in project.error(*script)


@pytest.mark.parametrize(
    'content', [{'a': 1}, [1, 2], {'model': {}, 'model_args': {'n_layer': 1}, 'iter_num': 0}]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='no checkpoint of a GPT'):
        ckpt.load(str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    nanogpt_checkpoint(tmp_path / 'a')
    loaded = torch.load(tmp_path / 'a' / 'ckpt.pt', weights_only=True)
    loaded['model_args']['n_embd'] = 32
    torch.save(loaded, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='do not fit its model_args'):
        weights.build_model(ckpt.load(str(tmp_path)))


def test_a_save_that_fails_leaves_the_old_pair(tmp_path, monkeypatch):
    state = {'state': {}, 'param_groups': []}
    path = str(tmp_path / 'ckpt.pt')
    ckpt.save(path, {'iter_num': 1, 'model': {}}, state)
    real = ckpt.write

    def disk_full(path, content):
        if path.endswith('ckpt.pt'):
            raise OSError('disk full')
        real(path, content)

    monkeypatch.setattr(ckpt, 'write', disk_full)
    with pytest.raises(OSError):
        ckpt.save(path, {'iter_num': 2, 'model': {}}, state)
    assert ckpt.read(path)['optimizer_file'] == 'optimizer-1.pt' and sorted(
        os.listdir(tmp_path)
    ) == ['ckpt.pt', 'optimizer-1.pt']

    def late(path, content):  # the file is in place, its folder could not be brought to disk
        real(path, content)
        if path.endswith('ckpt.pt'):
            raise OSError('input/output error')

    monkeypatch.setattr(ckpt, 'write', late)
    with pytest.raises(OSError):
        ckpt.save(path, {'iter_num': 2, 'model': {}}, state)
    assert (
        ckpt.read(path)['optimizer_file'] == 'optimizer-2.pt'
        and (tmp_path / 'optimizer-2.pt').exists()
    )
    monkeypatch.setattr(ckpt, 'write', real)
    ckpt.save(path, {'iter_num': 3, 'model': {}}, state)
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'optimizer-3.pt']


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_every_config_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    knobs = {
        **read_knobs('model.py:GPTConfig'),
        **read_knobs('sample.py' if name.startswith('sample_') else 'train.py'),
    }
    scope = {}
    for knob in knobs.values():
        scope[knob.name] = default_of(knob, scope)
    assert run_file(f'config/{name}', scope, knobs, set())


def test_the_recipe_for_shakespeare_runs_with_the_cpu_overlay(project):
    write_dataset(project.path / 'data' / 'shakespeare_char')
    out = project.run(
        'train.py', 'config/train_shakespeare_char.py', 'config/cpu.py', '--max_iters=2'
    ).stdout
    assert 'step 2:' in out and (project.path / 'out-shakespeare-char' / 'ckpt.pt').exists()


def test_the_modern_overlay_halves_the_iterations_of_whatever_stands_before_it(project):
    write_dataset(project.path / 'data' / 'shakespeare_char')
    short = project.path / 'short.py'
    short.write_text('max_iters = 8\n')
    out = project.run(
        'train.py',
        'config/train_shakespeare_char.py',
        'config/laptop.py',
        str(short),
        'config/modern.py',
        '--n_embd=48',
        '--eval_iters=1',
        '--out_dir=out-modern',
    ).stdout
    assert 'step 4:' in out and 'step 5:' not in out
    assert ckpt.load(str(project.path / 'out-modern'))['config']['lr_decay_iters'] == 4


def test_auto_begins_as_the_recipe_says_and_then_resumes(project, trained):
    (project.path / 'tune-auto.py').write_text(
        f"init_from = {str(trained[0])!r}\ndevice = 'cpu'\ndataset = 'tiny'\nmax_iters = 2\neval_iters = 1\n"
        "gradient_accumulation_steps = 1\n"
    )
    flags = ['tune-auto.py', '--init_from=auto', '--out_dir=out-tune-auto', '--compile=False']
    first = float(re.search(r'step 0: .*val loss (\S+)', project.run('train.py', *flags).stdout)[1])
    assert first < 0.9 * np.log(18)  # of trained weights
    assert 'resuming' in project.run('train.py', *flags, '--max_iters=3').stdout


def test_make_takes_names_with_spaces(project):
    """As far as a command to be run; nothing is installed or trained."""
    shutil.copytree(project.path / 'data/tiny', project.path / 'data/my notes', dirs_exist_ok=True)
    for path in ('pyproject.toml', 'constraints.txt', 'venv/installed.txt', 'venv/bin/python'):
        (project.path / path).parent.mkdir(parents=True, exist_ok=True)
        (project.path / path).write_text('')
    (project.path / 'venv/bin/python').write_text(
        '#!/bin/sh\ncase "$1" in -c) echo 0;; *) printf "%s|" "$@"; esac\n'
    )
    (project.path / 'venv/bin/python').chmod(0o755)
    done = subprocess.run(
        ['make', 'VENV=venv', 'train', 'DATASET=my notes'],
        cwd=project.path,
        text=True,
        capture_output=True,
    )
    assert (
        'train.py|config/train_text.py|config/cpu.py|--dataset=my notes|--out_dir=out-my notes|'
        in done.stdout
    ), done.stdout + done.stderr


def test_make_lists_its_targets(project):
    out = subprocess.run(
        ['make'], cwd=project.path, text=True, capture_output=True, check=True
    ).stdout
    for target in (
        'train-shakespeare',
        'test',
        'install',
        'generate-',
        'sample-',
        'train CONFIG=',
        'clean',
    ):
        assert f'make {target}' in out


@pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))),
    reason='compiling on CPU needs a C++ compiler',
)
def test_a_compiled_run_compiles_once_to_train_and_once_to_evaluate(project):
    """Neither warmup and schedule nor a growing batch, a skipped log or an evaluation bring new shapes or constants."""
    run = project.run(
        'train.py',
        *TINY,
        '--compile=True',
        '--n_layer=1',
        '--out_dir=out-compiled',
        '--eval_interval=4',
        '--max_iters=9',
        '--warmup_iters=3',
        '--gradient_accumulation_steps=2',
        '--batch_size_warmup_iters=3',
        '--dropout=0.1',
        '--log_interval=2',
        '--loss_chunk=24',
        launcher=[sys.executable],
        env={'TORCH_LOGS': 'recompiles'},
    )
    reasons = [line for line in run.stderr.splitlines() if 'Recompiling function' in line]
    assert len(reasons) == 1, run.stderr  # for model.eval()


def test_a_flags_word_for_a_size_takes_the_place_of_the_recipes(project):
    (project.path / 'recipe.py').write_text('n_head = 2\nn_embd = 16\n')
    flags = [flag for flag in TINY if 'n_embd' not in flag and 'n_head' not in flag]
    project.run(
        'train.py',
        'recipe.py',
        *flags,
        '--d_model=24',
        '--d_head=8',
        '--max_iters=1',
        '--out_dir=out-sizes',
    )
    args = ckpt.load(str(project.path / 'out-sizes'))['model_args']
    assert (args['n_head'], args['n_embd']) == (3, 24)
    (project.path / 'words.py').write_text('d_model = 24\nd_head = 8\n')
    for args, sizes in (
        (['recipe.py', '--n_head=3', '--d_head=4'], (3, 12)),
        (['recipe.py', 'words.py'], (3, 24)),
        (['words.py', 'recipe.py'], (2, 16)),
        (['words.py', '--n_embd=32'], (4, 32)),
        (['words.py', '--n_head=2'], (2, 24)),
        (['out-sizes/config.py', '--d_model=12'], (3, 12)),
    ):
        project.run('train.py', *args, *flags, '--max_iters=1', '--out_dir=out-words')
        args = ckpt.load(str(project.path / 'out-words'))['model_args']
        assert (args['n_head'], args['n_embd']) == sizes
    assert 'n_embd=16 and d_model=24 are two names' in project.error(
        'train.py', *flags, '--n_head=2', '--n_embd=16', '--d_model=24'
    )
