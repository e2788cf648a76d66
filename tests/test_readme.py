"""The pages keep their word: their commands, links and anchors exist, their edits apply and run."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from itertools import groupby

import pytest
from conftest import ROOT, TINY, Project

from configurator import read_settings

README = ROOT / 'README.md'
FOLDERS = ['docs/*.md', 'data/*/readme.md', 'support/readme.md']
PAGES = [README, *(page for folder in FOLDERS for page in sorted(ROOT.glob(folder)))]
SBATCH = ROOT / 'docs' / 'gpt2.sbatch'
LATER = {'data/sums/prepare.py', 'data/DATASET/prepare.py'}  # an edit makes it; a placeholder


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def read(page):
    return page.read_text(encoding='utf-8')


def blocks(page):
    """The (kind, text) of each fenced block of a page."""
    return re.findall(r'^```(\w*)\n(.*?)^```', read(page), re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r'^```.*?^```', '', read(page), flags=re.DOTALL | re.MULTILINE)


def statements(text):
    """The words of each simple command in a piece of shell; a quoted string may span lines."""
    pending = ''
    for line in text.replace('\\\n', ' ').splitlines():
        pending += line + '\n'
        lexer = shlex.shlex(pending, posix=True, punctuation_chars='|&;')
        lexer.whitespace_split = True
        try:
            found = list(lexer)
        except ValueError:  # the string goes on in the next line
            continue
        pending = ''
        for joint, words in groupby(found, lambda word: set(word) <= set('|&;')):
            if not joint:
                yield list(words)
    assert not pending.strip(), f'an open quote: {pending}'


def commands(*launchers):
    """The (page, words) of each command of the pages that starts with one of the launchers."""
    found = []
    for page in [*PAGES, SBATCH]:
        if page == SBATCH:
            shells, inline = [read(page)], []
        else:
            shells = [text for kind, text in blocks(page) if kind == 'sh']
            inline = [text for text in re.findall(r'`([^`]+)`', prose(page)) if '...' not in text]
        lists = [words for text in shells for words in statements(text)]
        lists += [shlex.split(text) for text in inline if text.startswith(launchers)]
        for words in lists:
            if words[0] == 'srun':
                words = words[1:]
            if words[0] in launchers:
                found.append((name_of(page), words))
    return found


SCRIPTS = [
    pytest.param(words, id=f'{page}: {" ".join(words)}')
    for page, words in commands('python', 'torchrun')
    if '-c' not in words and any(word.endswith('.py') for word in words)
]


@pytest.mark.parametrize('words', SCRIPTS)
def test_commands_name_scripts_files_and_settings_that_exist(words):
    at = next(i for i, word in enumerate(words) if word.endswith('.py'))
    script, arguments = words[at], words[at + 1 :]
    if script in LATER:
        return
    assert (ROOT / script).is_file()
    if 'pytest' in words:
        assert all((ROOT / word).is_file() for word in arguments if word.endswith('.py'))
        return
    knobs = read_settings(ROOT / script)
    if script in ('train.py', 'bench.py'):
        knobs |= read_settings(str(ROOT / 'model.py:GPTConfig'))
    for word in arguments:
        if word.startswith('--') and word != '--help':
            assert word[2:].partition('=')[0] in knobs or word == '--learning_rat=1e-3', word
        elif word.endswith('.py') and not word.startswith('out-'):
            assert (ROOT / word).is_file(), word


def test_make_targets_exist():
    targets = re.findall(r'^([\w%-]+):', read(ROOT / 'Makefile'), re.MULTILINE)
    patterns = [target.replace('%', '*') for target in targets]
    for page, words in commands('make'):
        for word in words[1:]:
            if '=' not in word:
                assert any(fnmatch.fnmatch(word, p) for p in patterns), f'{page}: make {word}'


def anchors(page):
    """What a link to a page can name after #, by GitHub's rules."""
    titles = re.findall(r'^#+ (.*)', prose(page), re.MULTILINE)
    slugs = [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles]
    return {*slugs, *re.findall(r'<a id="([^"]+)"', prose(page))}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_in_docs_can_be_reached_from_the_readme():
    for page in ROOT.glob('docs/*.md'):
        assert f'](docs/{page.name})' in read(README)
    assert 'docs/gpt2.sbatch' in read(README)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_lines_have_at_most_100_columns_outside_tables(page):
    for line in read(page).splitlines():
        assert len(line) <= 100 or line.startswith('|'), line


def test_the_readme_has_at_most_350_lines():
    assert len(read(README).splitlines()) <= 350


@pytest.mark.parametrize(
    'page, folder', [('support/readme.md', 'support'), ('docs/data.md', 'data')]
)
def test_pages_list_the_files_of_a_folder(page, folder):
    rows = [line for line in read(ROOT / page).splitlines() if line.startswith('| `')]
    listed = [name for row in rows for name in re.findall(r'`(\w+\.py)`', row.split('|')[1])]
    there = [path.name for path in ROOT.glob(f'{folder}/*.py') if path.name != '__init__.py']
    assert sorted(listed) == sorted(there)


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_the_sbatch_file_is_valid_shell():
    subprocess.run(['bash', '-n', SBATCH], check=True)


def worked_edits():
    """The (diff, shell that tries it) of each worked edit of the pages."""
    for page in PAGES:
        found = blocks(page)
        for (kind, diff), (_, shell) in zip(found, found[1:]):
            if kind == 'diff':
                yield diff, shell


def test_there_are_three_worked_edits():
    assert len(list(worked_edits())) == 3


@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
@pytest.mark.parametrize('number', range(3), ids=['activation', 'dataset', 'schedule'])
def test_the_worked_edits_apply_and_run(tmp_path, project, number):
    diff, shell = list(worked_edits())[number]
    headers = ('+++', '---')
    lines = [line for line in diff.splitlines() if not line.startswith(headers)]
    assert sum(line[0] in '+-' for line in lines) <= 15
    edited = Project(tmp_path, project.spawner)
    no_repository = {**os.environ, 'GIT_CEILING_DIRECTORIES': str(tmp_path.parent)}
    command = ['git', 'apply', '-']
    subprocess.run(command, input=diff, text=True, cwd=tmp_path, check=True, env=no_repository)
    small = list(TINY)
    if number == 1:  # the edit's command has its own data and sizes
        own = ('--dataset', '--block_size', '--learning_rate')
        small = [flag for flag in TINY if not flag.startswith(own)]
    extra = {'train.py': small, 'sample.py': ['--device=cpu']}
    for words in statements(shell):
        edited.run(*words[1:], *extra.get(words[1], []))
