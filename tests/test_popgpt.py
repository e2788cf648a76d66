"""What PopGPT's users bring and type: its checkpoints, words, prompts and make commands."""

import importlib
import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from data.lines import ASCII
from model import GPT, GPTConfig
from support import checkpoint as ckpt
from support.runlog import RunLog, perplexity

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=16)


def popgpt_checkpoint(folder, sizes=SIZES, zero=False, **data):
    """Write a ckpt.pt in PopGPT's form: in sections, with paths, no tokenizer; after one step."""
    torch.manual_seed(1)
    model_args = {**sizes, 'bias': False, 'dropout': 0.0}
    model = GPT(GPTConfig(**model_args))
    if zero:  # all logits are equal, so the first token is always the most likely
        for p in model.parameters():
            torch.nn.init.zeros_(p)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    if not zero:
        optimizer.step()
    config = {
        'model_args': model_args,
        'io': {
            'out_dir': Path('out'),
            'eval_interval': 5,
            'eval_iters': 2,
            'init_from': 'scratch',
            'resume_from': None,
            'weights_only': False,
        },
        'wandb': dict(enabled=False, project='popgpt', run_name='run'),
        'data': {
            'dataset': 'tiny',
            'data_dir': None,
            'batch_size': 4,
            'block_size': 16,
            'mask_before_token': None,
            'mask_per_line': False,
            'align_to_lines': False,
            **data,
        },
        'model': {**sizes, 'd_model': 16, 'd_head': 8, 'vocab_size': None},
        'optimizer': dict(learning_rate=1e-3, gradient_accumulation_steps=1),
        'lr_schedule': dict(decay_lr=True),
        'ddp': dict(backend='nccl'),
        'system': dict(device='cpu', dtype='float32', compile=True, seed=1337),
    }
    folder.mkdir(exist_ok=True)
    compiled = {f'_orig_mod.{name}': p for name, p in model.state_dict().items()}
    checkpoint = dict(model=compiled, model_args=model_args, config=config)
    checkpoint.update(optimizer=optimizer.state_dict(), iter_num=7, best_val_loss=2.9)
    torch.save(checkpoint, folder / 'ckpt.pt')
    return folder


# -----------------------------------------------------------------------------
# checkpoints
def test_a_checkpoint_of_popgpt_is_sampled_scored_tuned_and_resumed(project):
    theirs = popgpt_checkpoint(project.path / 'out-popgpt')
    sample = ['--device=cpu', '--start=to be', '--num_samples=1', '--max_new_tokens=9']
    text = project.run('sample.py', f'--out_dir={theirs}', *sample).stdout
    assert text.startswith('to be') and len(text.partition('\n---')[0]) == 14
    scored = project.run('eval.py', f'--out_dir={theirs}', '--device=cpu').stdout
    assert 'after 7 iterations' in scored
    flags = [flag for flag in TINY if not flag.startswith(('--max_iters', '--learning_rate'))]
    tune = ['--max_iters=2', f'--init_from={theirs}', '--out_dir=out-popgpt-tuned']
    tuned = project.run('train.py', *flags, *tune).stdout
    assert 'iter 1: loss' in tuned
    resume = ['--max_iters=9', '--init_from=resume', f'--out_dir={theirs}']
    resumed = project.run('train.py', *flags, *resume).stdout
    assert 'at iteration 7' in resumed and 'iter 8: loss' in resumed
    assert ckpt.load(str(theirs))['meta']['vocab_size'] == 16


def test_settings_of_popgpt_are_read_without_their_sections(tmp_path):
    config = ckpt.load(str(popgpt_checkpoint(tmp_path / 'a', mask_before_token='=')))['config']
    assert config['dataset'] == 'tiny' and config['out_dir'] == 'out'
    assert config['mask_before_token'] == '='
    theirs = popgpt_checkpoint(tmp_path / 'b', data_dir=Path('/elsewhere/data/poems'))
    config = ckpt.load(str(theirs))['config']
    assert config['dataset'] == 'poems' and 'mask_before_token' not in config
    popgpt_checkpoint(tmp_path / 'c', dataset=3)
    with pytest.raises(ValueError, match='no checkpoint of a GPT'):
        ckpt.load(str(tmp_path / 'c'))


def test_weights_without_a_tokenizer_are_refused_if_the_dataset_does_not_fit(project):
    """Our dataset may have more characters than theirs, or fewer."""
    for vocab_size in (15, 17):
        sizes = {**SIZES, 'vocab_size': vocab_size}
        theirs = popgpt_checkpoint(project.path / f'out-{vocab_size}', sizes)
        error = project.error('sample.py', f'--out_dir={theirs}')
        assert f'{vocab_size} token ids and comes without its tokenizer; put the meta.pkl' in error
        error = project.error('train.py', *TINY, f'--init_from={theirs}', '--out_dir=out-refused')
        assert f'weights of {vocab_size} token ids that come without tokenizer' in error
        assert 'data/tiny has 16' in error


# -----------------------------------------------------------------------------
# words
@pytest.mark.parametrize(
    'flag, knob',
    [
        ('--data_dir=data/tiny', 'dataset'),
        ('--weights_only=True', 'init_from'),
        ('--resume_from=out', 'init_from'),
        ('--wandb_enabled=True', 'wandb_log'),
        ('--wandb.enabled=True', 'wandb_log'),
        ('--wandb.project=x', 'wandb_project'),
        ('--model.n_layer=6', 'n_layer'),
        ('--out-dir=x', 'out_dir'),
    ],
)
def test_a_word_of_popgpt_leads_to_the_knob(project, flag, knob):
    name = flag.partition('=')[0]
    error = f'error: unknown flag {name}, did you mean --{knob}?; --help lists all'
    assert project.error('train.py', flag) == error


def test_other_words_of_popgpt_get_no_wrong_hint(project):
    assert 'did you mean --dataset' not in project.error('sample.py', '--data_dir=x')
    for flags in (['--config', 'config/cpu.py'], ['--override', 'model.n_layer=6']):
        assert 'config/NAME.py --NAME=VALUE' in project.error('train.py', *flags)


def test_no_stop_token_may_be_written_none(project, trained):
    (project.path / 'null.py').write_text('stop_token_char = None\n')
    flags = ['--device=cpu', '--start=to', '--num_samples=1', '--max_new_tokens=20']
    flags += [f'--out_dir={trained[0]}']
    ways = [], ['null.py'], ['--stop_token_char=None']
    texts = [project.run('sample.py', *way, *flags).stdout for way in ways]
    assert texts[0] == texts[1] == texts[2]


def test_wandb_without_a_login_says_once_how_and_how_to_do_without(tmp_path, monkeypatch):
    def init(**kwargs):
        raise RuntimeError('No API key configured. Use `wandb login` to log in.')

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    with pytest.raises(ValueError) as error:
        RunLog(str(tmp_path), {'wandb_log': True, 'wandb_project': '', 'wandb_run_name': ''})
    message = str(error.value)
    assert message.count('wandb login') == 1 and '.;' not in message
    assert '--wandb_log=False' in message


def test_lines_of_the_log_have_the_perplexity(trained):
    found = re.search(r'^iter 9: loss (\S+), perplexity (\S+), ', trained[1], re.MULTILINE)
    loss, logged = found.groups()
    assert float(logged) == pytest.approx(math.exp(float(loss)), abs=0.01)
    assert perplexity(0.0) == 1.0 and perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


# -----------------------------------------------------------------------------
# tasks on lines
def prepare(name):
    return importlib.import_module(f'data.{name}.prepare')


def some_lines(make, n=20000):
    """[(question, answer)] of n lines."""
    questions, answers = make(np.random.default_rng(1), n)
    return list(zip(texts(questions), texts(answers)))


def texts(rows):
    return [row[row > 0].tobytes().decode() for row in rows]


@pytest.mark.parametrize(
    'name, make', [('calculator', 'make'), ('reverser', 'make'), ('wordcalc', 'make_both')]
)
def test_a_dataset_knows_the_answers_to_its_questions(name, make):
    pairs = some_lines(getattr(prepare(name), make))
    assert all(prepare(name).answer(question) == answer for question, answer in pairs)


@pytest.mark.parametrize(
    'question, right',
    [
        ('one plus two plus four', '1+2+4'),
        ('twentytwo minus two divided by ten', '22-2/10'),
        ('ninety nine divided by three', '99/3'),
        ('hundred divided by four', '100/4'),
        ('negativefourteen times twentyseven', '-14*27'),
        ('one hundred plus fifty', '100+50'),
        ('sixhundredseventyseven minus negativesixteen plus six minus one', '677--16+6-1'),
        ('minus two point zero five minus minus six', '-2.05--6'),
        ('hello plus one', None),
        ('', None),
        ('negative', None),
        ('one plus', None),
    ],
)
def test_numbers_are_read_in_popgpts_words_and_in_ours(question, right):
    assert prepare('wordcalc').answer(question) == right


def test_a_part_of_the_lines_of_wordcalc_has_popgpts_words():
    wordcalc = prepare('wordcalc')
    lines = [(q, a) for q, a in some_lines(wordcalc.make_both, 50000) if len(q) + len(a) + 1 <= 64]
    others = 'hundred thousand point plus minus times divided by'.split()
    ours = {*wordcalc.ONES, *wordcalc.TENS, *others}
    joined = [q for q, _ in lines if set(q.split()) - ours]
    assert 0.1 < len(joined) / len(lines) < 0.2
    assert not any('point' in q or 'thousand' in q for q in joined)
    operations = [dict(wordcalc.kinds(q))['operations'] for q, _ in lines]
    assert set(operations) == {'1', '2', '3'} and operations.count('1') > 0.6 * len(lines)
    assert any(q.startswith('negative') for q in joined)
    assert any(q.startswith('hundred') for q, _ in lines)


def test_the_reverser_mixes_capitals_digits_and_spaces():
    reverser = prepare('reverser')
    kinds = [dict(reverser.kinds(question))['kind'] for question, _ in some_lines(reverser.make)]
    assert 0.05 < kinds.count('letters, digits and spaces') / len(kinds) < 0.15
    kind = lambda question: dict(reverser.kinds(question))['kind']
    assert kind('Madam Im Adam') == kind('r2d2 and c3po') == 'letters, digits and spaces'
    assert kind('hello world') == 'with spaces' and kind('r2d2') == 'letters and digits'
    assert kind('python') == 'lower case' and kind('Python') == 'mixed case'


def test_answers_are_marked_right_or_wrong_beside_the_right_one(project):
    """Of weights that always make a newline, so that the prompt holds the answer."""
    folder = project.path / 'data' / 'reverser'
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump(ASCII, f)
    data = dict(dataset='reverser', mask_before_token='=')
    sizes = {**SIZES, 'vocab_size': 96}
    theirs = popgpt_checkpoint(project.path / 'out-zero', sizes, zero=True, **data)
    prompts = ['ab=ba', 'ab=', '12=1', 'no mark', 'ab=ba\nxy=yx']
    (project.path / 'prompts.py').write_text(f'start = {prompts!r}\n')
    flags = ['prompts.py', f'--out_dir={theirs}', '--device=cpu', '--temperature=0']
    flags += ['--num_samples=1', '--max_new_tokens=3', '--stop_token_char=\n']
    done = project.run('sample.py', *flags)
    shown = ['ab=ba ✓', 'ab= ✗ (ba)', '12=1 ✗ (21)', 'no mark', 'ab=ba\nxy=yx ✓', '']
    assert done.stdout.split('\n---------------\n') == shown
    assert '2 of 4 answers right' in done.stderr
    (folder / 'prepare.py').rename(folder / 'prepare.old')
    done = project.run('sample.py', *flags)
    (folder / 'prepare.old').rename(folder / 'prepare.py')
    assert '✓' not in done.stdout and 'right' not in done.stderr


# -----------------------------------------------------------------------------
# make, and processes that share a batch
@pytest.mark.parametrize(
    'overlay, recipe',
    [('cpu', 'train_text'), ('laptop', 'train_text'), ('cpu_lines', 'train_calculator')],
)
def test_processes_share_the_batch_of_an_overlay(overlay, recipe, monkeypatch):
    def sequences(processes):
        monkeypatch.setenv('WORLD_SIZE', str(processes))
        knobs = {}
        for name in (recipe, overlay):
            exec((ROOT / 'config' / f'{name}.py').read_text(encoding='utf-8'), knobs)
        assert knobs['gradient_accumulation_steps'] == processes
        return knobs['batch_size'] * processes, knobs['batch_size'] * knobs['eval_iters']

    assert sequences(1) == sequences(2) == sequences(4)


@pytest.fixture
def make(tmp_path):
    """make(gpus, *args): what make runs; python and torchrun only print their arguments."""
    shutil.copy(ROOT / 'Makefile', tmp_path)
    shutil.copytree(ROOT / 'config', tmp_path / 'config')
    (tmp_path / 'venv' / 'bin').mkdir(parents=True)
    for name in ('pyproject.toml', 'constraints.txt', 'venv/installed.txt'):
        (tmp_path / name).write_text('')

    def run(gpus, *args):
        for name in ('python', 'torchrun'):
            path = tmp_path / 'venv' / 'bin' / name
            script = f'case "$1" in -c) echo {gpus};; *) echo "{name} $*"; esac'
            path.write_text(f'#!/bin/sh\n{script}\n')
            path.chmod(0o755)
        done = subprocess.run(
            ['make', 'VENV=venv', *args], cwd=tmp_path, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [' '.join(line.split()) for line in done.stdout.splitlines() if 'train.py' in line]

    return run


RULES = [
    ('calculator', ['cpu_lines', 'modern'], ['modern']),
    ('shakespeare_char', ['cpu', 'modern', 'beyond'], ['modern', 'short']),
    ('gpt2', ['cpu'], []),
]


@pytest.mark.parametrize('name, without, with_gpu', RULES)
def test_make_takes_the_same_overlays_by_name_and_by_config(make, name, without, with_gpu):
    recipe = f'config/train_{name}.py'
    for gpus, overlays in ((0, without), (1, with_gpu)):
        line = ' '.join(['python train.py', recipe, *(f'config/{name}.py' for name in overlays)])
        assert make(gpus, f'train-{name}') == make(gpus, 'train', f'CONFIG={recipe}') == [line]


def test_make_lets_overlays_be_chosen_and_takes_none_with_loaded_weights(make):
    made = make(0, 'train-calculator', 'OVERLAY=config/laptop.py')
    assert made == ['python train.py config/train_calculator.py config/laptop.py']
    made = make(1, 'train', 'CONFIG=config/train_reverser.py', 'GPU_OVERLAY=')
    assert made == ['python train.py config/train_reverser.py']
    for gpus in (0, 1):
        made = make(gpus, 'train', 'CONFIG=config/finetune_calculator.py')
        assert made == ['python train.py config/finetune_calculator.py']


def test_make_launches_two_processes_without_a_gpu(make):
    (line,) = make(0, 'train', 'CONFIG=config/train_calculator.py', 'NGPUS=2')
    assert line == (
        'torchrun --standalone --nproc_per_node=2 train.py config/train_calculator.py '
        'config/cpu_lines.py config/modern.py'
    )
