"""bench.py --mode=report: a battery of its commands, as one table."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHAR = 'config/train_shakespeare_char.py --vocab_size=65'
GPT2 = 'config/train_gpt2.py'
MODERN_SHORT = 'config/modern.py config/short.py'
BATTERY = {
    '10.65M': f'{CHAR} --compile=False',
    '10.65M compiled': f'{CHAR} --compile=True',
    '10.65M modern short': f'{CHAR} {MODERN_SHORT} --compile=False',
    '10.65M modern short compiled': f'{CHAR} {MODERN_SHORT} --compile=True',
    '124M compiled': f'{GPT2} --batch_size=32 --compile=True',
    '124M modern compiled': f'{GPT2} config/modern.py --batch_size=32 --n_head=6 --compile=True',
    'text by 124M': '--mode=generate --steps=3',
    'optimizers of 124M': '--mode=optimizer',
    'batches': '--mode=data --steps=5',
}
ON_CPU = '--steps=3 --warmup_steps=1 --batch_size=8 --new_tokens=16'
NOT_IN_TABLE = 'first step', 'data', 'forward', 'backward', 'optimizer', 'graphs compiled'


def run(bench, rivals):
    """Run the battery. Other flags of the command line are added to every command."""
    own = '--mode=', '--json=', '--compare='
    added = [word for word in sys.argv[1:] if not word.startswith(own)]
    battery = BATTERY
    if bench.kind == 'cpu':
        print(f'on a CPU: {ON_CPU}; no compiler, no training and optimizers of 124M')
        added = ON_CPU.split() + added
        slow = [what for what in BATTERY if 'compiled' in what or 'optimizers' in what]
        battery = {what: flags for what, flags in BATTERY.items() if what not in slow}
    if 'transformers' in rivals and not importlib.util.find_spec('transformers'):
        print('transformers is not installed: left out')
        rivals = [word for word in rivals if word != 'transformers']

    rows = [('what', 'figure', 'unit', 'note', 'command'), ('---', '---:', '---', '---', '---')]
    for what, flags in battery.items():
        words = [*flags.split(), '--real_data=False', *added, *comparison(flags, rivals)]
        command = shlex.join(['python', 'bench.py', *words])
        figures = run_command(what, words)
        for name, figure in figures.items():
            bench.figures[f'{what}: {name}'] = {**figure, 'command': command}
        rows += table_rows(what, figures, command)
    git = f'git -C {shlex.quote(ROOT)} rev-parse --short HEAD 2>{os.devnull}'
    commit = subprocess.getoutput(git)
    print(f'\n{bench.machine()}, torch {torch.__version__}, commit {commit}\n')
    for row in rows:
        print(f'| {" | ".join(row)} |')


def comparison(flags, rivals):
    """The flag that compares a command of the battery with those of `rivals` that fit it, or []."""
    if 'generate' in flags:
        fit = [word for word in rivals if word == 'transformers']
    elif 'train_' in flags and 'modern' not in flags:
        fit = rivals
    else:
        fit = []
    return [f'--compare={" ".join(fit)}'] if fit else []


def table_rows(what, figures, command):
    """The rows of one command, which stands in the first of them."""
    rows = []
    for name, figure in figures.items():
        if name not in NOT_IN_TABLE:
            value = figure['value']
            text = f'{value:,.0f}' if value >= 1000 else f'{value:.2f}'
            shown = '' if rows else f'`{command}`'
            rows.append((f'{what}: {name}', text, figure['unit'], figure['note'], shown))
    return rows


def run_command(what, words):
    """The figures of a bench.py command that runs as a process of its own; {} if it fails."""
    print(f'  {what} ...', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'figures.json')
        command = [sys.executable, os.path.join(ROOT, 'bench.py'), *words, f'--json={path}']
        # its output goes into a file, since a process that it starts could keep a pipe open
        with open(f'{path}.out', 'w+', errors='replace') as out:
            try:
                subprocess.run(command, stdout=out, stderr=out, timeout=180, check=True)
            except subprocess.SubprocessError as e:
                out.seek(0)
                lines = out.read().splitlines()
                print(f'  {what}: {type(e).__name__}, {lines[-1] if lines else "no output"}')
                return {}
        with open(path, encoding='utf-8') as f:
            return json.load(f)['figures']
