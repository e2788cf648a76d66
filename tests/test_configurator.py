import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, Project

from configurator import check, read_settings

SCRIPT = f'''
"""A script with a setting of every type."""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
# sizes
batch_size = 12 # sequences per step
learning_rate = 6e-4 # the peak rate
# switches
eval_only = False # stop after evaluating
start = 'x' # the prompt
stop: str | None = None # text to stop at
start_list: str | list = 'a' # one prompt or several
compile: bool | str = 'auto' # or True, False
n: int | None = None # a number, perhaps
config, given = configure(globals())
print(config, sorted(given))
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'a.py').write_text(
        'import math\n_two = 2\nbatch_size = 5 * _two\nlearning_rate = 1\n'
    )
    (tmp_path / 'config' / 'b.py').write_text('batch_size = batch_size + 1\n')

    def run(*args):
        done = subprocess.run(
            [sys.executable, 'script.py', *args], cwd=tmp_path, text=True, capture_output=True
        )
        if done.returncode == 0:
            return done.stdout
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr.strip()

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    'flag, shown',
    [
        ('--batch_size=3', "'batch_size': 3"),
        ('--batch_size=2e3', "'batch_size': 2000"),
        ('--batch_size=1_000', "'batch_size': 1000"),
        ('--learning_rate=1', "'learning_rate': 1.0"),
        ('--learning_rate=1e-3', "'learning_rate': 0.001"),
        ('--eval_only=true', "'eval_only': True"),
        ('--eval_only=1', "'eval_only': True"),
        ('--start=2+2=4', "'start': '2+2=4'"),
        ('--start=123', "'start': '123'"),
        ('--start=None', "'start': 'None'"),
        ('--start=', "'start': ''"),
        ('--stop=None', "'stop': None"),
        ('--stop=12', "'stop': '12'"),
        ("--start_list=['a', 'b']", """'start_list': "['a', 'b']\""""),
        ('--start_list=[1, 2]', "'start_list': '[1, 2]'"),
        ('--start_list=plain', "'start_list': 'plain'"),
        ('--compile=False', "'compile': False"),
        ('--compile=auto', "'compile': 'auto'"),
        ('--n=4', "'n': 4"),
        ('--n=None', "'n': None"),
    ],
)
def test_a_value_has_the_type_of_its_setting(run, flag, shown):
    assert shown in run(flag)


@pytest.mark.parametrize(
    'line',
    [
        'from a import *',
        'from a import batch_size, learning_rate, math',
        "exec(open('config/a.py').read())",
    ],
)
def test_a_config_file_may_import_or_execute_another(run, line):
    (run.folder / 'config' / 'c.py').write_text(
        f"import sys\nsys.path.insert(0, 'config')\n{line}\nlearning_rate = 2.0\n"
    )
    shown = run('config/c.py')
    assert (
        "'batch_size': 10," in shown
        and "'learning_rate': 2.0" in shown
        and "['batch_size', 'learning_rate']" in shown
    )


def test_a_misspelled_setting_in_an_executed_file_is_an_error(run):
    (run.folder / 'config' / 'd.py').write_text('from math import pi\nbath_size = 10\n')
    (run.folder / 'config' / 'e.py').write_text(
        "batch_size = 4\nexec(open('config/d.py').read())\n"
    )
    message = run('config/e.py')
    assert "config/e.py:2: unknown setting 'bath_size', did you mean batch_size?" in message


def test_files_and_flags_apply_from_left_to_right(run):
    assert "'batch_size': 10," in run('config/a.py')
    assert "'batch_size': 11," in run('config/a.py', 'config/b.py')
    assert "'batch_size': 4," in run('--batch_size=3', 'config/b.py')
    assert "'batch_size': 7," in run('config/a.py', 'config/b.py', '--batch_size=7')


def test_given_names_what_was_set_even_to_its_default(run):
    assert "['batch_size', 'learning_rate']" in run('config/a.py', '--batch_size=12')


@pytest.mark.parametrize(
    'flag, message',
    [
        ('--bath_size=3', 'unknown flag --bath_size, did you mean --batch_size?'),
        ('--batch-size=3', 'did you mean --batch_size?'),
        ('--zzz=3', 'unknown flag --zzz; --help'),
        ('--batch_size', 'write --batch_size=VALUE, for instance --batch_size=12'),
        ('-batch_size=3', 'write --batch_size='),
        ('--batch_size=abc', "batch_size takes int, not 'abc' (default 12)"),
        ('--batch_size=1.5', 'batch_size takes int'),
        ('--batch_size=True', 'batch_size takes int'),
        ('--batch_size=None', 'batch_size takes int'),
        ('--learning_rate=fast', 'learning_rate takes float'),
        ('--eval_only=2', 'eval_only takes bool'),
        ('--n=x', 'n takes int or None'),
        ('config/c.py', 'config file config/c.py not found, did you mean config/'),
        ('batch_size=3', 'a flag is written --batch_size=3'),
        ('nowhere/c.py', 'config file nowhere/c.py not found'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(run, flag, message):
    assert message in run(flag)


@pytest.mark.parametrize(
    'text, message',
    [
        (
            'batch_size = 1\nbath_size = 3\n',
            "bad.py:2: unknown setting 'bath_size', did you mean batch_size?",
        ),
        ('batch_size = "many"\n', "bad.py:1: batch_size takes int, not 'many'"),
        ('batch_size = 3\nbatch_size = = 4\n', 'bad.py:2: invalid syntax'),
        ('\nbatch_size = nonsense\n', 'bad.py:2: NameError'),
        ('def f():\n    return 1 / 0\nbatch_size = f()\n', 'bad.py:2: ZeroDivisionError'),
        ('batch_size = 3\x00\n', 'bad.py'),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(run, text, message):
    (run.folder / 'bad.py').write_text(text)
    assert message in run('bad.py')


def test_a_default_may_be_an_expression_in_all_scripts(tmp_path):
    project = Project(tmp_path)
    for name, line, new in (
        ('train.py', 'gradient_accumulation_steps = 40', 'gradient_accumulation_steps = 5 * 8'),
        ('train.py', 'lr_decay_iters = 600000', 'lr_decay_iters = max_iters'),
        ('model.py', 'n_embd: int = 768', 'n_embd: int = 12 * 64'),
    ):
        text = (tmp_path / name).read_text()
        assert text.count(line) == 1
        (tmp_path / name).write_text(text.replace(line, new))
    assert '--gradient_accumulation_steps=5 * 8' in project.run('train.py', '--help').stdout
    for script in ('sample.py', 'eval.py'):
        assert 'nowhere/ckpt.pt not found' in project.error(script, '--out_dir=nowhere')
    assert '--n_embd=12 * 64' in project.run('bench.py', '--help').stdout
    (tmp_path / 'model.py').write_text(
        (tmp_path / 'model.py')
        .read_text()
        .replace('logit_cap: float = 0.0', 'logit_cap: float = math.inf')
    )
    message = 'logit_cap in model.py:GPTConfig: its default math.inf must be a plain value'
    assert message in project.error('train.py')


def test_a_setting_of_your_own_takes_the_type_of_its_default(run):
    text = (run.folder / 'script.py').read_text()
    (run.folder / 'script.py').write_text(
        text.replace('batch_size = 12', 'betas = (0.8, 0.9)\nextra = None\nbatch_size = 12')
    )
    assert "'betas': [0.7, 0.9]" in run('--betas=(0.7, 0.9)')
    assert "'extra': None" in run('--extra=None')
    assert 'annotate it in the script, for instance extra: int | None = None' in run('--extra=3')


def test_help_prints_every_setting_with_default_comment_and_section(run):
    out = run('--help')
    for words in (
        'A script with a setting of every type.',
        'sizes',
        '--batch_size=12',
        'sequences per step',
        "--compile='auto'",
        'switches',
    ):
        assert words in out
    assert 'config' not in out.replace('configure', '')


def test_an_overlay_may_compute_from_settings_that_another_script_ignores(project):
    assert 'nowhere/ckpt.pt not found' in project.error(
        'sample.py', 'config/cpu.py', 'config/modern.py', '--out_dir=nowhere'
    )


@pytest.mark.parametrize(
    'script',
    ['train.py', 'sample.py', 'bench.py', 'data/openwebtext/prepare.py', 'data/fineweb/prepare.py'],
)
def test_help_of_every_script_is_quick_and_every_setting_has_a_comment(script):
    start = time.time()
    out = subprocess.run(
        [sys.executable, script, '--help'], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    assert time.time() - start < 3
    for knob in read_settings(ROOT / script).values():
        assert knob.comment and knob.section and knob.comment in out, knob.name


def test_an_error_that_is_not_ours_keeps_its_traceback(run):
    (run.folder / 'script.py').write_text(SCRIPT + '\nint("x")\n')
    done = subprocess.run(
        [sys.executable, 'script.py'], cwd=run.folder, text=True, capture_output=True
    )
    assert done.returncode == 1 and 'Traceback' in done.stderr


@pytest.mark.parametrize(
    'line, code, message',
    [
        (
            'import support.files as t; t.write_whole("nowhere/x.txt", None)',
            2,
            'error: nowhere/x.txt: No such file or directory',
        ),
        ('import torch; torch.empty(10**15)', 1, 'error: out of memory'),
        (
            'import operator; from support.files import write_whole as write; '
            'write("x", operator.methodcaller("truncate", -1))',
            1,
            'error: Invalid argument',  # as from a full disk
        ),
        ('sys.modules["torch"] = None; import muon', 2, 'needs the package torch, which '),
    ],
)
def test_a_missing_file_or_package_and_too_little_memory_are_one_line(run, line, code, message):
    (run.folder / 'script.py').write_text(SCRIPT + f'\n{line}\n')
    done = subprocess.run(
        [sys.executable, 'script.py'], cwd=run.folder, text=True, capture_output=True
    )
    assert done.returncode == code and message in done.stderr and len(done.stderr.splitlines()) == 1


COMMANDS = ('train.py', 'sample.py', 'eval.py', 'bench.py', 'convert.py')
PREPARE = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('data/*/prepare.py'))


@pytest.mark.parametrize(
    'script, package',
    [(script, 'torch') for script in COMMANDS] + [(script, 'numpy') for script in PREPARE],
)
def test_every_script_reports_a_missing_package_in_one_line(script, package):
    code = f'import runpy, sys; sys.modules["{package}"] = None; sys.argv = ["{script}"]'
    code += f'; runpy.run_path("{script}", run_name="__main__")'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f'needs the package {package}' in done.stderr


@pytest.mark.parametrize(
    'recipe',
    [
        'train_shakespeare_char',
        'train_text',
        'train_calculator',
        'train_reverser',
        'train_wordcalc',
    ],
)
def test_a_recipe_trains_and_validates_on_as_much_on_any_number_of_processes(recipe, monkeypatch):
    def sequences(processes):
        monkeypatch.setenv('WORLD_SIZE', str(processes))
        knobs = {}
        exec((ROOT / 'config' / f'{recipe}.py').read_text(encoding='utf-8'), knobs)
        return knobs['batch_size'] * knobs['gradient_accumulation_steps'], knobs[
            'batch_size'
        ] * knobs['eval_iters']

    assert sequences(1) == sequences(2) == sequences(8)


@pytest.mark.parametrize(
    'text, message',
    [
        (
            "learning_rate = float('nan')\n",
            'learning_rate takes a finite number below 2**63, not nan',
        ),
        (
            "learning_rate = float('inf')\n",
            'learning_rate takes a finite number below 2**63, not inf',
        ),
        ('batch_size = 10**22\n', 'batch_size takes a finite number below 2**63'),
        ('exit()\n', 'bad.py:1: SystemExit'),
        ('batch_size = 3\nraise SystemExit(0)\n', 'bad.py:2: SystemExit'),
    ],
)
def test_infinite_numbers_and_exit_are_errors(run, text, message):
    (run.folder / 'bad.py').write_text(text)
    assert message in run('bad.py')


@pytest.mark.parametrize(
    'values, bounds, message',
    [
        (dict(a=0), dict(least=1), 'a=0 must be at least 1'),
        (dict(a=-1), dict(least=0), 'a=-1 must not be negative'),
        (dict(a=0.0), dict(above=0), 'a=0.0 must be more than 0'),
        (dict(a=1.0), dict(below=1), 'a=1.0 must be less than 1'),
        (dict(a=1.5), dict(most=1), 'a=1.5 must be at most 1'),
        (dict(a=2**31), dict(least=0), 'a=2147483648 must be at most 2147483647'),
        (dict(a='x'), dict(choices=('y', 'z')), "a='x' is none of 'y', 'z'"),
    ],
)
def test_ranges_are_checked_in_one_place(values, bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(values, 'a', **bounds)
    check(dict(a=None, b=1), 'a b', least=1)
    check(dict(a=2**40), 'a', most=2**63 - 1)


def test_every_number_of_every_script_has_a_range(project):
    """Whatever number is asked for: one line, and no memory is taken for it."""
    for script in ('train.py', 'sample.py', 'eval.py'):
        for name, knob in read_settings(ROOT / script).items():
            if 'int' in knob.types and name != 'seed':
                flags = [
                    flag
                    for flag in TINY
                    if script == 'train.py' and not flag.startswith(f'--{name}=')
                ]
                message = project.error(script, *flags, f'--{name}={2**62}', '--device=cpu')
                assert 'memory' not in message
