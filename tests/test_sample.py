import shutil

import pytest

from conftest import Project, write_dataset
from test_train import nanogpt_checkpoint

FLAGS = ['--device=cpu', '--num_samples=2', '--max_new_tokens=20']


def test_sampling_works_with_the_dataset_gone(tmp_path, trained):
    elsewhere = Project(tmp_path)
    shutil.rmtree(tmp_path / 'data' / 'tiny')
    out = elsewhere.run('sample.py', *FLAGS, f'--out_dir={trained[0]}', '--start=to be').stdout
    texts = out.split('\n---------------\n')[:-1]
    assert len(texts) == 2 and all(t.startswith('to be') and len(t) == 25 for t in texts) and texts[0] != texts[1]


def test_the_seed_decides_and_temperature_zero_needs_none(project, trained):
    sample = lambda *flags: project.run('sample.py', *FLAGS, f'--out_dir={trained[0]}', *flags).stdout
    assert sample('--seed=1') == sample('--seed=1') != sample('--seed=2')
    greedy = sample('--temperature=0').split('\n---------------\n')
    assert greedy[0] == greedy[1]


def test_a_recipe_tells_where_its_run_is(project, trained):
    (project.path / 'recipe.py').write_text(f"out_dir = {str(trained[0])!r}\nmax_iters = 3\n")
    assert '---' in project.run('sample.py', 'recipe.py', *FLAGS).stdout


def test_the_prompt_may_come_from_a_file(project, trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('that is', encoding='utf-8')
    assert project.run('sample.py', *FLAGS, f'--out_dir={trained[0]}', f'--start=FILE:{tmp_path}/prompt.txt').stdout.startswith('that is')


def test_a_nanogpt_checkpoint_is_sampled_with_its_datasets_vocabulary(project):
    write_dataset(project.path / 'data' / 'letters', 'abcdefghijklmnopqr' * 50)
    nanogpt_checkpoint(project.path / 'out-nano-sample', dataset='letters')
    assert project.run('sample.py', *FLAGS, '--out_dir=out-nano-sample', '--start=abc').stdout.startswith('abc')


@pytest.mark.parametrize('flags, message', [
    (['--start=€'], "the vocabulary lacks '€'"),
    (['--start='], 'the prompt is empty'),
    (['--start=FILE:missing.txt'], 'prompt file missing.txt not found'),
    (['--start=FILE:binary.txt'], 'is not UTF-8 text'),
    (['--out_dir=nowhere'], 'nowhere/ckpt.pt not found'),
    (['--init_from=nowhere.pt'], 'nowhere.pt not found'),
    (['--init_from=gpt3'], 'gpt3 not found'),
    (['--num_samples=0'], 'num_samples=0 must be at least 1'),
    (['--temperature=-1'], 'must not be negative'),
    (['--dtype=int3'], "dtype='int3' is none of"),
    (['--out_dir=out-lost'], 'comes without its tokenizer'),
])
def test_bad_input_is_one_line(project, trained, flags, message):
    (project.path / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    if not (project.path / 'out-lost').exists():
        nanogpt_checkpoint(project.path / 'out-lost', dataset='lost')
    assert message in project.error('sample.py', *FLAGS, f'--out_dir={trained[0]}', *flags)
