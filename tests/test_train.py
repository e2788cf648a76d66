import json
import os
import re
import runpy
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_dataset
from test_model import gpt2_of_transformers

from configurator import default_of, read_settings, run_file
from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support import resume, weights
from support.runlog import read_log

LETTERS = 'abcdefghijklmnopqr' * 50  # 18 different ones, as many as data/tiny has


def weights_of(folder):
    return ckpt.load(str(folder))['model']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_with(column, folder):
    return [row for row in read_log(folder / 'log.csv') if column in row]


def nanogpt_checkpoint(folder, prefix='_orig_mod.', **config):
    """A nanoGPT ckpt.pt: one file, compiled names, a tensor for the best loss, no meta."""
    folder.mkdir()
    torch.manual_seed(5)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=18)
    args = dict(sizes, bias=False, dropout=0.0)
    model = GPT(GPTConfig(**args))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    idx = torch.randint(18, (4, 16))
    model(idx, idx)[1].backward()
    optimizer.step()
    named = {f'{prefix}{name}': p for name, p in model.state_dict().items()}
    content = dict(model=named, optimizer=optimizer.state_dict(), model_args=args, iter_num=3)
    content |= dict(best_val_loss=torch.tensor(9.0), config={'dataset': 'tiny', **config})
    torch.save(content, folder / 'ckpt.pt')
    return model


# -----------------------------------------------------------------------------
# a run
def test_a_run_learns_and_leaves_checkpoint_log_and_picture(trained):
    folder, out = trained
    files = {'ckpt.pt', 'optimizer-10.pt', 'log.csv', 'loss.png', 'config.py', 'run.lock'}
    assert set(os.listdir(folder)) == files
    rows = rows_with('val_loss', folder)
    assert [row['iter'] for row in rows] == [0, 5, 10]
    first, last = rows[0]['val_loss'], rows[-1]['val_loss']
    assert 2.6 < first < 3.1
    assert last < first - 0.3
    assert f'step 10: train loss {rows[-1]["train_loss"]:.4f}, val loss {last:.4f}' in out
    assert 'iter 9: loss ' in out and 'tok/s' in out
    assert 'mfu' not in out
    loaded = ckpt.load(str(folder))
    config, meta = loaded['config'], loaded['meta']
    assert loaded['iter_num'] == 10
    assert abs(loaded['best_val_loss'] - last) < 1e-6
    assert 'b' in meta['stoi']
    assert config['learning_rate'] == 1e-2
    assert config['vocab_size'] == meta['vocab_size']


def test_the_printed_validation_loss_is_that_of_the_whole_split(project, trained):
    flags = '--out_dir=out-trained', '--init_from=resume', '--eval_only=True', '--eval_iters=1000'
    out = project.run('train.py', *TINY, *flags).stdout
    model = weights.build_model(ckpt.load(str(trained[0]))).eval()
    tokens = np.fromfile(project.path / 'data/tiny/val.bin', dtype=np.uint16)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    n = (len(tokens) - 1) // 16 * 16
    with torch.no_grad():
        loss = model(tokens[:n].view(-1, 16), tokens[1 : n + 1].view(-1, 16))[1]
    assert f'val loss {loss:.4f}' in out


def test_the_same_command_gives_the_same_weights_and_another_seed_others(project, trained):
    project.run('train.py', *TINY, '--out_dir=out-again')
    project.run('train.py', *TINY, '--out_dir=out-seed', '--seed=7')
    assert same(weights_of(trained[0]), weights_of(project.path / 'out-again'))
    assert not same(weights_of(trained[0]), weights_of(project.path / 'out-seed'))


def test_the_config_of_a_run_repeats_it(project, trained):
    path = trained[0] / 'config.py'
    assert path.read_text().startswith('# from iteration 0: python train.py --device=cpu ')
    project.run('train.py', path, '--out_dir=out-repeated')
    assert same(weights_of(trained[0]), weights_of(project.path / 'out-repeated'))


def test_saving_and_evaluating_have_intervals_of_their_own(project):
    flags = '--out_dir=out-intervals', '--save_interval=3', '--keep_checkpoints=10'
    project.run('train.py', *TINY, *flags)
    names = {path.name for path in (project.path / 'out-intervals').glob('ckpt-*.pt')}
    # the last iteration in any case
    assert names == {'ckpt-3.pt', 'ckpt-6.pt', 'ckpt-9.pt', 'ckpt-10.pt'}


def test_the_log_holds_the_health_of_the_network(trained):
    rows = rows_with('loss', trained[0])
    assert [row['iter'] for row in rows] == list(range(10))
    assert [row['tokens'] for row in rows] == [64 * (n + 1) for n in range(10)]
    for row in rows:
        assert row['grad_norm'] > 0 and row['lr'] > 0 and row['tokens_per_second'] > 0
        assert row['clipped'] == (row['grad_norm'] > 1.0)
        assert row['bad_steps'] == 0 and row['memory_gb'] > 0.05
        assert ('weight_norm' in row) == (row['iter'] % 5 == 0)  # taken at evaluations
    torch.manual_seed(1337)
    model = GPT(GPTConfig(16, 18, 2, 2, 16, 0.0, False))
    norm = sum((p.detach() ** 2).sum() for p in model.parameters()).sqrt().item()
    # AdamW's first step moves each of n weights by the learning rate, except for weight decay
    n = sum(p.numel() for p in model.parameters())
    assert 0 < abs(rows[0]['weight_norm'] - norm) < rows[0]['lr'] * n**0.5 * 1.05


def test_eval_only_writes_nothing(project):
    out = project.run('train.py', *TINY, '--eval_only=True', '--out_dir=out-none').stdout
    assert 'step 0: train loss' in out
    assert not (project.path / 'out-none').exists()


def test_bfloat16_on_cpu_trains(project):
    flags = '--dtype=bfloat16', '--out_dir=out-bf16', '--max_iters=2'
    assert 'bfloat16' in project.run('train.py', *TINY, *flags).stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_compiled_model_trains_on_a_gpu(project):
    flags = '--device=cuda', '--compile=True', '--out_dir=out-gpu'
    out = project.run('train.py', *TINY, *flags).stdout
    assert 'compiled' in out and 'step 10' in out


COMPILERS = [name for name in ('c++', 'g++', 'clang++') if shutil.which(name)]
SHOW_RECOMPILES = """
import runpy, sys
import torch
torch._logging.set_logs(recompiles=True)
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.skipif(not COMPILERS, reason='compiling on CPU needs a C++ compiler')
@pytest.mark.slow
def test_a_compiled_run_compiles_once_to_train_and_once_to_evaluate(project):
    """Schedules, a growing batch, a skipped log and evaluations bring no new shape or constant."""
    (project.path / 'show_recompiles.py').write_text(SHOW_RECOMPILES)
    flags = ['--compile=True', '--n_layer=1', '--dropout=0.1', '--loss_chunk=24']
    flags += ['--gradient_accumulation_steps=2', '--batch_size_warmup_iters=3', '--warmup_iters=3']
    flags += ['--max_iters=9', '--eval_interval=4', '--log_interval=2', '--out_dir=out-compiled']
    run = project.run('show_recompiles.py', *TINY, *flags)
    assert 'step 9' in run.stdout
    assert run.stderr.count('Recompiling function') == 1, run.stderr  # for model.eval()


# -----------------------------------------------------------------------------
# resuming and stopping early
@pytest.fixture(scope='module')
def interrupted(project):
    """Two equal runs, one of them in two halves: their folders, and what the halves print."""
    flags = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=3']
    project.run('train.py', *flags, '--out_dir=out-straight-on')
    flags += ['--out_dir=out-halves', '--init_from=auto']
    first = project.run('train.py', *flags, '--max_iters=5').stdout
    second = project.run('train.py', *flags).stdout
    return project.path / 'out-straight-on', project.path / 'out-halves', first, second


def test_auto_starts_from_scratch_if_there_is_no_checkpoint_and_then_resumes(interrupted):
    _, _, first, second = interrupted
    assert 'resuming' not in first
    assert 'resuming' in second and 'iteration 5' in second


def test_resumed_run_equals_uninterrupted_run_bitwise(interrupted):
    straight, halves = interrupted[:2]
    assert same(weights_of(straight), weights_of(halves))
    a, b = (ckpt.read(str(folder / 'optimizer-10.pt'))['state'] for folder in (straight, halves))
    assert a.keys() == b.keys()
    assert all(same(a[i], b[i]) for i in a)
    for p, q in zip(read_log(straight / 'log.csv'), read_log(halves / 'log.csv'), strict=True):
        for column in ('iter', 'loss', 'val_loss'):
            assert p.get(column) == q.get(column)


def test_a_resumed_run_lists_both_commands_and_continues_the_log(interrupted):
    folder = interrupted[1]
    lines = (folder / 'config.py').read_text().splitlines()
    starts = [line[:24] for line in lines[:3]]
    assert starts == ['# from iteration 0: pyth', '# from iteration 5: pyth', '']
    seconds = [row['seconds'] for row in read_log(folder / 'log.csv')]
    assert seconds == sorted(seconds)
    assert [row['iter'] for row in rows_with('loss', folder)] == list(range(10))


def test_auto_starts_as_the_recipe_says_and_then_resumes(project, trained):
    settings = dict(init_from=str(trained[0]), device='cpu', dataset='tiny', max_iters=2)
    settings |= dict(eval_iters=1, gradient_accumulation_steps=1)
    lines = [f'{name} = {value!r}\n' for name, value in settings.items()]
    (project.path / 'tune-auto.py').write_text(''.join(lines))
    flags = ['tune-auto.py', '--init_from=auto', '--out_dir=out-tune-auto', '--compile=False']
    out = project.run('train.py', *flags).stdout
    first_loss = float(re.search(r'step 0: .*val loss (\S+)', out)[1])
    assert first_loss < 0.9 * np.log(18)  # of trained weights
    assert 'resuming' in project.run('train.py', *flags, '--max_iters=3').stdout


def test_fine_tuning_takes_the_weights_and_nothing_else(project, trained):
    folder, printed = trained
    flags = f'--init_from={folder}', '--out_dir=out-tuned', '--max_iters=1', '--eval_interval=1'
    out = project.run('train.py', *TINY, *flags).stdout
    losses = re.search(r'step 10: (.*)', printed)[1]
    assert f'step 0: {losses}\n' in out


@pytest.mark.parametrize('prefix', ['', 'module._orig_mod.', '_orig_mod.module.'])
def test_names_of_compiled_and_distributed_models_are_ours(tmp_path, prefix):
    model = nanogpt_checkpoint(tmp_path / 'wrapped', prefix)
    assert same(weights_of(tmp_path / 'wrapped'), model.state_dict())


def test_a_nanogpt_checkpoint_resumes(project):
    folder = project.path / 'out-nano'
    model = nanogpt_checkpoint(folder)
    write_dataset(project.path / 'data' / 'nano', LETTERS)
    flags = '--dataset=nano', '--out_dir=out-nano', '--init_from=resume', '--max_iters=6'
    out = project.run('train.py', *TINY, *flags).stdout
    assert 'at iteration 3' in out and 'iter 3: loss' in out
    assert not same(weights_of(folder), model.state_dict())
    state = ckpt.read(str(folder / 'optimizer-6.pt'))['state']
    assert all(s['step'] == 4 for s in state.values())  # one step of nanoGPT's, three of ours


def test_a_resumed_run_may_have_a_shorter_context(project, trained):
    folder = project.path / 'out-cropped'
    shutil.copytree(trained[0], folder)
    flags = '--init_from=resume', '--block_size=8', '--max_iters=12'
    project.run('train.py', *TINY, '--out_dir=out-cropped', *flags)
    state = ckpt.read(str(folder / 'optimizer-12.pt'))['state']
    assert weights_of(folder)['transformer.wpe.weight'].shape == (8, 16)
    assert [s['exp_avg'].shape for s in state.values()].count((8, 16)) == 1


def test_gpt2_weights_are_fine_tuned_from_a_local_folder(project):
    gpt2_of_transformers().save_pretrained(project.path / 'hf')
    flags = [flag for flag in TINY if not flag.startswith('--n_')]
    flags += ['--init_from=hf', '--max_iters=2', '--out_dir=out-hf']
    assert 'iter 1' in project.run('train.py', *flags).stdout
    assert ckpt.load(str(project.path / 'out-hf'))['model_args']['vocab_size'] == 101


def test_the_gradient_scaler_of_float16_is_resumed(tmp_path):
    model = GPT(GPTConfig(8, 8, 1, 1, 8))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    idx = torch.zeros(1, 8, dtype=torch.long)
    model(idx, idx)[1].backward()
    optimizer.step()
    scaler, other = (torch.amp.GradScaler('cpu', enabled=True) for _ in range(2))
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 512.0, '_growth_tracker': 77})
    content = {'model': model.state_dict(), 'model_args': vars(model.config), 'iter_num': 1}
    state = {**optimizer.state_dict(), 'scaler': scaler.state_dict()}
    ckpt.save(str(tmp_path / 'ckpt.pt'), content, state)
    resume.load_optimizer(optimizer, other, ckpt.load(str(tmp_path)))
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 512.0


WANDB = """
import json
class Run:
    def __init__(self, id, resume, name, config, **more):
        self.id = id or 'run-1'
        self.write('init', id)
    def write(self, *call):
        print(json.dumps(call), file=open('wandb.txt', 'a'))
    def define_metric(self, *args, **more): pass
    def log(self, numbers): self.write('log', numbers)
    def finish(self): self.write('finish')
init = Run
"""


def test_a_resumed_run_continues_the_same_wandb_run(project):
    """With a stand-in for the package, which writes down how it is called."""
    (project.path / 'fake').mkdir()
    (project.path / 'fake' / 'wandb.py').write_text(WANDB)
    flags = [*TINY, '--out_dir=out-wandb', '--wandb_log=True', '--wandb_run_name=tiny']
    env = {'PYTHONPATH': str(project.path / 'fake')}
    project.run('train.py', *flags, '--max_iters=5', env=env)
    project.run('train.py', *flags, '--init_from=resume', env=env)
    calls = [json.loads(line) for line in (project.path / 'wandb.txt').read_text().splitlines()]
    assert [call for call in calls if call[0] == 'init'] == [['init', None], ['init', 'run-1']]
    assert calls[-1] == ['finish']
    logged = [call[1] for call in calls if call[0] == 'log']
    steps = [row for row in logged if 'loss' in row and row['iter'] >= 5]
    rows = rows_with('loss', project.path / 'out-wandb')
    assert steps[0]['loss'] == rows[5]['loss']
    health = {'lr', 'grad_norm', 'clipped', 'tokens', 'seconds', 'memory_gb', 'weight_norm'}
    assert any(health <= row.keys() for row in logged)


def test_a_target_loss_ends_the_run_and_prints_the_time(project, trained):
    val_loss = rows_with('val_loss', trained[0])[1]['val_loss']  # of iteration 5
    target = val_loss + 1e-3
    out = project.run('train.py', *TINY, '--out_dir=out-target', f'--target_loss={target}').stdout
    assert f'val loss {val_loss:.4f} reached target_loss={target}: iteration 5, ' in out
    assert ' s of training' in out
    assert ckpt.load(str(project.path / 'out-target'))['iter_num'] == 5


def test_patience_ends_a_run_without_improvement_and_survives_a_resume(project):
    flags = [*TINY, '--eval_interval=2', '--max_iters=40', '--learning_rate=0', '--min_lr=0']
    flags += ['--patience=4']
    ended = 'no better val loss since iteration 0: iteration 8,'
    assert ended in project.run('train.py', *flags, '--out_dir=out-patience').stdout
    flags += ['--out_dir=out-patience2']
    project.run('train.py', *flags, '--max_iters=4')
    assert ended in project.run('train.py', *flags, '--init_from=resume').stdout


# -----------------------------------------------------------------------------
# bad input
RESUME = '--init_from=resume --out_dir=out-trained'
NO_POEMS = 'data/poems/train.bin not found; prepare the dataset first: python data/text/prepare.py'
NEEDS_MUON = 'matrix_lr needs --optimizer=muon (config/modern.py); adamw has --learning_rate'
NO_VECTORS = 'learning_rate is the rate of biases and norms, and this model trains none; set '
HAVE = 'the weights have'
BAD_INPUT = [
    # data; before any weights are fetched
    ('--dataset=poems --init_from=nowhere.pt', NO_POEMS),
    ('--dataset=poems', f'{NO_POEMS} --input=... --dataset=poems'),
    ('--dataset=odd', 'bytes, so it is no file of uint16'),
    ('--dataset=damaged', 'meta.pkl refused'),
    ('--dataset=beyond', 'token id 77, but vocab_size is 18'),
    ('--block_size=100000', 'lower --block_size'),
    # sizes
    ('--n_embd=17', 'n_embd=17 must be divisible by n_head=2: 17 / 2 = 8.50'),
    ('--d_head=5', 'n_embd=16 must be divisible by d_head=5'),
    ('--d_head=0', 'd_head=0 must be at least 1'),
    ('--d_model=32', 'n_embd=16 and d_model=32 are two names'),
    ('--n_kv_head=3', 'n_head=2 must be divisible by n_kv_head=3'),
    # rates
    ('--learning_rate=1e-6', 'min_lr=6e-05 is more than learning_rate=1e-06; add --min_lr=1e-07'),
    ('--matrix_lr=0.01', NEEDS_MUON),
    ('--optimizer=muon --matrix_lr=-1', 'matrix_lr=-1.0 must not be negative'),
    ('config/modern.py --learning_rate=1e-3', f'{NO_VECTORS}--matrix_lr'),
    # ranges
    ('--seed=-1', 'seed=-1 must not be negative'),
    ('--dtype=fp8', "dtype='fp8' is none of"),
    ('--batch_size=0', 'batch_size=0 must be at least 1'),
    ('--eval_interval=0', 'eval_interval=0 must be at least 1'),
    ('--save_interval=-1', 'save_interval=-1 must be at least 1'),
    ('--keep_checkpoints=0', 'keep_checkpoints=0 must be at least 1'),
    ('--patience=-1', 'patience=-1 must not be negative'),
    ('--grad_clip=-1', 'grad_clip=-1.0 must not be negative'),
    ('--beta2=1.0', 'beta2=1.0 must be less than 1'),
    ('--optimizer=sgd', "optimizer='sgd' is none of 'adamw', 'muon'"),
    ('--lr_schedule=trapezoid --decay_share=0', 'decay_share=0.0 must be more than 0'),
    ('--lr_schedule=step', "lr_schedule='step' is none of 'cosine', 'trapezoid'"),
    ('--pos=relative', "pos='relative' is none of 'learned', 'rotary', 'alibi', 'none'"),
    # weights
    ('--init_from=nowhere.pt', 'nowhere.pt not found'),
    ('--init_from=resume --out_dir=out-nothing', 'out-nothing/ckpt.pt not found'),
    ('--init_from=resume --out_dir=out-best-only', 'has no optimizer state to resume with'),
    (f'{RESUME} --n_layer=3', f'{HAVE} n_layer=2, you ask for 3 (--n_layer=3); add --n_layer=2'),
    (f'{RESUME} --n_embd=32', f'{HAVE} n_embd=16, you ask for 32'),
    (f'{RESUME} --bias=True', f'{HAVE} bias=False'),
    (f'{RESUME} --block_size=32', f'{HAVE} block_size=16, you ask for 32'),
    (f'{RESUME} --dataset=other', 'trained with another tokenizer'),
    (f'{RESUME} --optimizer=muon', 'its optimizer state does not fit this model'),
    # files and packages
    ('--out_dir=broken.py', "cannot write into out_dir='broken.py'"),
    ('--out_dir=', "cannot write into out_dir=''"),
    ('broken.py', 'broken.py:2: invalid syntax'),
    ('--wandb_log=True', 'pip install wandb'),
]


@pytest.fixture(scope='module')
def bad_files(project, trained):
    """Make the files that BAD_INPUT names; returns an environment without wandb."""
    data = project.path / 'data'
    for name in ('other', 'damaged', 'beyond', 'odd'):
        write_dataset(data / name, LETTERS)
    (data / 'odd/val.bin').write_bytes(bytes(1801))
    (data / 'damaged/meta.pkl').write_bytes(b'nonsense')
    np.array([77] * 900, dtype=np.uint16).tofile(data / 'beyond/val.bin')
    (project.path / 'out-best-only').mkdir(exist_ok=True)
    content = torch.load(trained[0] / 'ckpt.pt', weights_only=True)
    torch.save({**content, 'optimizer_file': None}, project.path / 'out-best-only/ckpt.pt')
    (project.path / 'broken.py').write_text('max_iters = 1\nmax_iters = = 2\n')
    (project.path / 'shadow').mkdir(exist_ok=True)
    (project.path / 'shadow' / 'wandb.py').write_text('raise ImportError("not installed")')
    return {'PYTHONPATH': str(project.path / 'shadow')}


@pytest.mark.parametrize('flags, message', BAD_INPUT, ids=[flags for flags, _ in BAD_INPUT])
def test_bad_input_is_one_line(project, bad_files, flags, message):
    assert message in project.error('train.py', *TINY, *flags.split(), env=bad_files)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_cuda_without_cuda_is_one_line(project):
    assert "device='cuda'" in project.error('train.py', *TINY, '--device=cuda')


def test_accumulation_that_cannot_be_shared_gives_the_numbers_that_can(project):
    flags = [*TINY, '--gradient_accumulation_steps=3']
    done = project.run('train.py', *flags, processes=2, check=False)
    message = 'gradient_accumulation_steps=3 cannot be shared by 2 processes; 2 or 4 can'
    assert message in done.stderr


@pytest.mark.parametrize('damage', ['half', 'empty', 'text'])
def test_a_damaged_checkpoint_is_refused(project, trained, tmp_path, damage):
    whole = (trained[0] / 'ckpt.pt').read_bytes()
    contents = {'half': whole[: len(whole) // 2], 'empty': b'', 'text': b'no checkpoint at all'}
    (tmp_path / 'ckpt.pt').write_bytes(contents[damage])
    training = 'train.py', *TINY, f'--init_from={tmp_path}'
    sampling = 'sample.py', '--device=cpu', f'--out_dir={tmp_path}'
    for command in (training, sampling):
        assert 'truncated or damaged' in project.error(*command)


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


@pytest.mark.parametrize('late, left', [(False, 1), (True, 2)])
def test_a_save_that_fails_leaves_a_complete_pair(tmp_path, monkeypatch, late, left):
    """The disk is full; or, late, the file is in place and its folder cannot be synced."""
    path, write = str(tmp_path / 'ckpt.pt'), ckpt.write

    def save(iter_num):
        ckpt.save(path, {'iter_num': iter_num, 'model': {}}, {'state': {}, 'param_groups': []})

    def fail(path, content):
        of_weights = path.endswith('ckpt.pt')
        if late or not of_weights:
            write(path, content)
        if of_weights:
            raise OSError('disk full')

    save(1)
    monkeypatch.setattr(ckpt, 'write', fail)
    with pytest.raises(OSError):
        save(2)
    assert ckpt.read(path)['optimizer_file'] == f'optimizer-{left}.pt'
    files = set(os.listdir(tmp_path))
    assert f'optimizer-{left}.pt' in files
    assert late or files == {'ckpt.pt', 'optimizer-1.pt'}
    monkeypatch.setattr(ckpt, 'write', write)
    save(3)
    assert set(os.listdir(tmp_path)) == {'ckpt.pt', 'optimizer-3.pt'}


# -----------------------------------------------------------------------------
# recipes, sizes and make
@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_every_config_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = 'sample.py' if name.startswith('sample_') else 'train.py'
    knobs = {**read_settings('model.py:GPTConfig'), **read_settings(script)}
    scope = {}
    for knob in knobs.values():
        scope[knob.name] = default_of(knob, scope)
    assert run_file(f'config/{name}', scope, knobs, set())


def test_the_recipe_for_shakespeare_runs_with_the_cpu_overlay(project):
    write_dataset(project.path / 'data' / 'shakespeare_char')
    files = 'config/train_shakespeare_char.py', 'config/cpu.py'
    out = project.run('train.py', *files, '--max_iters=2', '--eval_iters=1').stdout
    assert 'step 2:' in out
    assert (project.path / 'out-shakespeare-char' / 'ckpt.pt').exists()


def test_the_modern_overlay_halves_the_iterations_of_the_files_before_it(project):
    write_dataset(project.path / 'data' / 'shakespeare_char')
    (project.path / 'short.py').write_text('max_iters = 8\n')
    files = 'config/train_shakespeare_char.py', 'config/laptop.py', 'short.py', 'config/modern.py'
    flags = '--n_embd=48', '--eval_iters=1', '--out_dir=out-modern'
    out = project.run('train.py', *files, *flags).stdout
    assert 'step 4:' in out and 'step 5:' not in out
    assert ckpt.load(str(project.path / 'out-modern'))['config']['lr_decay_iters'] == 4


@pytest.mark.parametrize(
    'args, n_head, n_embd',
    [
        ('heads.py --d_model=24 --d_head=8', 3, 24),
        ('heads.py --n_head=3 --d_head=4', 3, 12),
        ('heads.py widths.py', 3, 24),
        ('widths.py heads.py', 2, 16),
        ('widths.py --n_embd=32', 4, 32),
        ('widths.py --n_head=2', 2, 24),
        ('out-trained/config.py --d_model=24', 2, 24),
    ],
)
def test_sizes_on_the_right_replace_sizes_on_the_left(project, trained, args, n_head, n_embd):
    (project.path / 'heads.py').write_text('n_head = 2\nn_embd = 16\n')
    (project.path / 'widths.py').write_text('d_model = 24\nd_head = 8\n')
    flags = [flag for flag in TINY if not flag.startswith(('--n_embd', '--n_head'))]
    project.run('train.py', *args.split(), *flags, '--max_iters=1', '--out_dir=out-sizes')
    sizes = ckpt.load(str(project.path / 'out-sizes'))['model_args']
    assert (sizes['n_head'], sizes['n_embd']) == (n_head, n_embd)
    config = runpy.run_path(project.path / 'out-sizes' / 'config.py')
    assert (config['n_head'], config['n_embd']) == (n_head, n_embd)
    assert config['d_head'] is None and config['d_model'] is None


def test_make_takes_names_with_spaces(project):
    """As far as the command to train; nothing is installed or trained."""
    shutil.copytree(project.path / 'data/tiny', project.path / 'data/my notes')
    (project.path / 'venv/bin').mkdir(parents=True)
    for path in ('pyproject.toml', 'constraints.txt', 'venv/installed.txt'):
        (project.path / path).write_text('')
    python = project.path / 'venv/bin/python'
    python.write_text('#!/bin/sh\ncase "$1" in -c) echo 0;; *) printf "%s|" "$@"; esac\n')
    python.chmod(0o755)
    command = ['make', 'VENV=venv', 'train', 'DATASET=my notes']
    done = subprocess.run(command, cwd=project.path, text=True, capture_output=True)
    trains = ['train.py', 'config/train_text.py', 'config/cpu.py']
    trains += ['--dataset=my notes', '--out_dir=out-my notes', '']
    assert '|'.join(trains) in done.stdout, done.stdout + done.stderr


def test_make_lists_its_targets(project):
    out = subprocess.check_output(['make'], cwd=project.path, text=True)
    targets = ['train-shakespeare', 'test', 'install', 'clean']
    for target in [*targets, 'generate-', 'sample-', 'train CONFIG=']:
        assert f'make {target}' in out
