import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, Project, write_dataset
from test_train import nanogpt_checkpoint

from data.tokenizer import continuation, from_meta
from support import weights

FLAGS = ['--device=cpu', '--num_samples=2', '--max_new_tokens=20']


def test_sampling_works_with_the_dataset_gone(tmp_path, trained):
    elsewhere = Project(tmp_path)
    shutil.rmtree(tmp_path / 'data' / 'tiny')
    out = elsewhere.run('sample.py', *FLAGS, f'--out_dir={trained[0]}', '--start=to be').stdout
    texts = out.split('\n---------------\n')[:-1]
    assert (
        len(texts) == 2
        and all(t.startswith('to be') and len(t) == 25 for t in texts)
        and texts[0] != texts[1]
    )


def test_the_seed_decides_and_temperature_zero_needs_none(project, trained):
    sample = lambda *flags: (
        project.run('sample.py', *FLAGS, f'--out_dir={trained[0]}', *flags).stdout
    )
    assert sample('--seed=1') == sample('--seed=1') != sample('--seed=2')
    greedy = sample('--temperature=0').split('\n---------------\n')
    assert greedy[0] == greedy[1]


def test_a_recipe_tells_where_its_run_is(project, trained):
    (project.path / 'recipe.py').write_text(f"out_dir = {str(trained[0])!r}\nmax_iters = 3\n")
    assert '---' in project.run('sample.py', 'recipe.py', *FLAGS).stdout


def test_the_prompt_may_come_from_a_file(project, trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('that is', encoding='utf-8')
    assert project.run(
        'sample.py', *FLAGS, f'--out_dir={trained[0]}', f'--start=FILE:{tmp_path}/prompt.txt'
    ).stdout.startswith('that is')


def test_a_nanogpt_checkpoint_is_sampled_with_its_datasets_vocabulary(project):
    write_dataset(project.path / 'data' / 'letters', 'abcdefghijklmnopqr' * 50)
    nanogpt_checkpoint(project.path / 'out-nano-sample', dataset='letters')
    assert project.run(
        'sample.py', *FLAGS, '--out_dir=out-nano-sample', '--start=abc'
    ).stdout.startswith('abc')


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--start=€'], "the vocabulary lacks '€'"),
        (['--start='], 'the prompt is empty'),
        (['--start=\udcff'], 'the prompt is not UTF-8 text'),
        (['--quantize=int8', '--dtype=float32'], 'computes the rest in bfloat16'),
        (['--start=FILE:missing.txt'], 'prompt file missing.txt not found'),
        (['--start=FILE:binary.txt'], 'is not UTF-8 text'),
        (['--out_dir=nowhere'], 'nowhere/ckpt.pt not found'),
        (['--init_from=nowhere.pt'], 'nowhere.pt not found'),
        (['--init_from=gpt3'], 'gpt3 not found'),
        (['--interactive=True', '--start=ROMEO'], 'type it at the prompt'),
        (['--num_samples=0'], 'num_samples=0 must be at least 1'),
        (['--temperature=-1'], 'must not be negative'),
        (['--dtype=int3'], "dtype='int3' is none of"),
        (['--out_dir=out-lost'], 'comes without its tokenizer'),
    ],
)
def test_bad_input_is_one_line(project, trained, flags, message):
    (project.path / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    if not (project.path / 'out-lost').exists():
        nanogpt_checkpoint(project.path / 'out-lost', dataset='lost')
    assert message in project.error('sample.py', *FLAGS, f'--out_dir={trained[0]}', *flags)


def test_a_prompt_may_come_from_standard_input_and_lines_of_a_file_go_to_jsonl(
    project, trained, tmp_path
):
    sample = ['sample.py', *FLAGS, f'--out_dir={trained[0]}']
    done = project.run(*sample, '--start=-', input='to be')
    assert done.stdout.startswith('to be') and 'tokens/s' in done.stderr
    (tmp_path / 'prompts.txt').write_text('to be\nor not\nthat\n')
    flags = [
        *FLAGS,
        f'--out_dir={trained[0]}',
        f'--start=LINES:{tmp_path}/prompts.txt',
        f'--output={tmp_path}/texts.jsonl',
        '--stop=e',
    ]
    found = []
    for batch_size in (1, 64):
        assert project.run('sample.py', *flags, f'--batch_size={batch_size}').stdout == ''
        rows = [
            json.loads(line)
            for line in (tmp_path / 'texts.jsonl').read_text(encoding='utf-8').splitlines()
        ]
        prompts = [row['prompt'] for row in rows]
        assert prompts == ['to be', 'to be', 'or not', 'or not', 'that', 'that']
        assert all('e' not in row['text'] for row in rows)
        found.append(rows)
    assert found[0] == found[1]  # the same texts in batches of any size
    assert 'must be a file in a folder that is there' in project.error(
        'sample.py', *flags, '--output=nowhere/texts.jsonl'
    )


def test_texts_are_the_same_alone_and_together(project, trained):
    def sample(start, n):
        (project.path / 'starts.py').write_text(f'start = {start!r}\n')
        return project.run(
            'sample.py',
            'starts.py',
            '--device=cpu',
            f'--out_dir={trained[0]}',
            f'--num_samples={n}',
            '--max_new_tokens=30',
        ).stdout

    assert sample('to be', 1) + sample('or', 1) == ''.join(sample(['to be', 'or'], 1)) and sample(
        'to be', 3
    ).startswith(sample('to be', 1))


@pytest.mark.parametrize('flags', [[], ['--pos=rotary']])
def test_a_chat_goes_on_from_what_was_said(project, flags):
    """
    Each reply is the greedy continuation of everything said so far. Past block_size, learned
    positions see the second half of it.
    """
    project.run('train.py', *TINY, *flags, '--max_iters=2', '--out_dir=out-chat')
    chat = ['--out_dir=out-chat', '--interactive=True', '--max_new_tokens=3', '--temperature=0']
    said = 'to be\nor?!\nor\n\nthat is the question\n'
    done = project.run('sample.py', '--device=cpu', *chat, input=said)
    assert not done.stderr, done.stderr
    replies = done.stdout.split('> ')[1:]
    assert len(replies) == 6 and "lacks '!'" in replies[1]  # which was not said
    model, loaded = weights.open_model(str(project.path / 'out-chat' / 'ckpt.pt'))
    tokenizer, context = from_meta(loaded['meta']), ''
    for line, reply in zip(('to be', 'or'), (replies[0], replies[2])):  # 15 tokens in all
        context += ('\n' if context and not context.endswith('\n') else '') + line
        want = tokenizer.decode(
            model.eval()
            .generate(torch.tensor([tokenizer.encode(context)]), 3, temperature=0)[0]
            .tolist()
        )
        assert want == context + reply[:-1]
        context = want


def test_a_prefix_lm_answers_each_line_of_a_chat_by_itself(project):
    flags = ['--prefix_lm=True', '--mask_before_token= ', '--mask_per_line=False', '--max_iters=2']
    project.run('train.py', *TINY, *flags, '--out_dir=out-prefix')
    chat = ['--out_dir=out-prefix', '--interactive=True', '--max_new_tokens=3', '--temperature=0']
    said = ['to be', 'or', 'to be']
    out = project.run('sample.py', '--device=cpu', *chat, input='\n'.join(said) + '\n').stdout
    replies = [reply[:-1] for reply in out.split('> ')[1:4]]
    model, loaded = weights.open_model(str(project.path / 'out-prefix' / 'ckpt.pt'))
    tokenizer = from_meta(loaded['meta'])
    for line, reply in zip(said, replies):
        prompt = torch.tensor([tokenizer.encode(line)])
        text = model.eval().generate(prompt, 3, temperature=0)[0].tolist()
        assert tokenizer.decode(text) == line + reply


def test_streamed_text_has_whole_characters_and_no_beginnings_of_stops():
    """The function of sample.py by itself, on a tokenizer of bytes."""
    source = (ROOT / 'sample.py').read_text(encoding='utf-8')
    code = source[source.index('def so_far') : source.index('def show(')]
    scope = {
        'tokenizer': SimpleNamespace(decode=lambda ids: bytes(ids).decode('utf-8', 'replace')),
        'stops': ['END', 'Ex'],
        'continuation': continuation,
    }
    exec(code, scope)
    so_far = scope['so_far']
    for text, want in (
        ('aé', 'aé'),
        ('aEN', 'a'),
        ('aENd', 'aENd'),
        ('abEND!', 'ab'),
        ('aE', 'a'),
        ('Ex', ''),
    ):
        assert so_far(list(b'A prompt'), list(text.encode()), False) == want
    assert (
        so_far([], list('aé'.encode())[:-1], False) == 'a'
        and so_far([], list('aEN'.encode()), True) == 'aEN'
    )
    shown = [so_far([], list('Grüße, ENDE'.encode())[:n], False) for n in range(13)]
    assert (
        all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:]))
        and shown[-1] == 'Grüße, '
    )


def test_what_a_recipe_trains_from_is_not_what_is_sampled(project, trained):
    (project.path / 'tune.py').write_text(
        f"init_from = 'gpt2-xl'\nout_dir = {str(trained[0])!r}\nmax_iters = 3\n"
    )
    assert (
        '---' in project.run('sample.py', 'tune.py', *FLAGS).stdout
        and 'after 10 iterations' in project.run('eval.py', 'tune.py').stdout
    )
    (project.path / 'ask-gpt2.py').write_text("init_from = 'no-such-model'\nnum_samples = 1\n")
    assert 'no-such-model' in project.error('sample.py', 'ask-gpt2.py')


def test_seeds_and_samples_may_be_many_and_shares_are_at_most_one(project, trained):
    flags = [*FLAGS, f'--out_dir={trained[0]}', '--start=to', '--num_samples=5']
    assert (
        project.run('sample.py', *flags, '--batch_size=2').stdout
        == project.run('sample.py', *flags).stdout
    )
    assert (
        project.run('sample.py', *flags, '--seed=20261121123000999').stdout.count(
            '\n---------------\n'
        )
        == 5
    )
    assert 'min_p=5.0 must be at most 1' in project.error('sample.py', *flags, '--min_p=5')


@pytest.mark.parametrize('flag', ['--start=-', '--interactive=True'])
def test_a_closed_standard_input_is_one_line(project, trained, flag):
    closed = ['sh', '-c', 'exec "$0" "$@" <&-', sys.executable]
    assert 'standard input is closed' in project.error(
        'sample.py', *FLAGS, f'--out_dir={trained[0]}', flag, launcher=closed
    )
