"""What the README says can be done: its commands name scripts, files and knobs that are there, and its worked edits apply and run."""

import os
import re
import shlex
import shutil
import subprocess
from itertools import groupby

import pytest
from conftest import ROOT, TINY, Project

from configurator import read_knobs

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', TEXT, re.DOTALL)
LATER = {'data/sums/prepare.py'}  # are made by the edits


def commands(text):
    """The words of each python or torchrun command in a shell block."""
    for line in text.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;')
        lexer.whitespace_split = True
        for joint, words in groupby(lexer, lambda word: set(word) <= set('|&;')):
            words = list(words)
            if (
                not joint
                and words[0] in ('python', 'torchrun')
                and any(word.endswith('.py') for word in words)
            ):
                yield words


@pytest.mark.parametrize(
    'words',
    [words for kind, text in BLOCKS if kind == 'sh' for words in commands(text)]
    + [
        shlex.split(line)
        for line in re.findall(r'`(python \w+\.py [^`]*)`', TEXT)
        if '...' not in line
    ],
    ids=' '.join,
)
def test_commands_name_what_is_there(words):
    at = next(i for i, word in enumerate(words) if word.endswith('.py'))
    script, arguments = words[at], words[at + 1 :]
    if script in LATER:
        return
    assert (ROOT / script).is_file()
    if script == 'runlog.py':  # has no knobs
        return
    knobs = read_knobs(ROOT / script)
    if script in ('train.py', 'bench.py'):
        knobs |= read_knobs(str(ROOT / 'model.py:GPTConfig'))
    for word in arguments:
        if word.startswith('--') and word != '--help':
            assert word[2:].partition('=')[0] in knobs or word == '--learning_rat=1e-3', word
        elif word.endswith('.py') and not word.startswith('out-'):
            assert (ROOT / word).is_file(), word


@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
@pytest.mark.parametrize('number', range(3), ids=['activation', 'dataset', 'schedule'])
def test_the_worked_edits_apply_and_run(tmp_path, number):
    edits = [(text, BLOCKS[i + 1][1]) for i, (kind, text) in enumerate(BLOCKS) if kind == 'diff']
    assert len(edits) == 3
    diff, shell = edits[number]
    assert (
        sum(line[0] in '+-' and line[:3] not in ('+++', '---') for line in diff.splitlines()) <= 15
    )
    project = Project(tmp_path)
    subprocess.run(
        ['git', 'apply', '-'],
        input=diff,
        text=True,
        cwd=tmp_path,
        check=True,
        env={**os.environ, 'GIT_CEILING_DIRECTORIES': str(tmp_path.parent)},
    )
    own = (
        ('--dataset', '--block_size', '--learning_rate') if number == 1 else ()
    )  # of the edit's command, or not for its network
    small = [flag for flag in TINY if not flag.startswith(own)]
    for words in commands(shell):
        project.run(
            *words[1:],
            *(
                small
                if words[1] == 'train.py'
                else ['--device=cpu']
                if words[1] == 'sample.py'
                else []
            ),
        )
