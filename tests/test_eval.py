import re

import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset

from data.tokenizer import from_meta
from support import weights

PAIRS = 'ab ba cd dc ef fe ab=ba'.split()


@pytest.fixture(scope='module', params=[(False, 60), (True, 30)])
def swapped(project, request):
    """A run that has half learned to swap two letters, without and with prefix_lm."""
    prefix_lm, iters = request.param
    rng = np.random.default_rng(1)
    letters = np.array(list('abcdefgh'))
    pairs = [''.join(rng.choice(letters, 2)) for _ in range(400)]
    write_dataset(
        project.path / 'data' / 'swaps', ''.join(f'{pair}={pair[::-1]}\n' for pair in pairs)
    )
    project.run(
        'train.py',
        *TINY,
        '--dataset=swaps',
        '--mask_before_token==',
        '--align_to_lines=True',
        '--block_size=12',
        '--batch_size=16',
        f'--max_iters={iters}',
        f'--lr_decay_iters={iters}',
        f'--eval_interval={iters}',
        '--n_embd=32',
        f'--prefix_lm={prefix_lm}',
        '--out_dir=out-swaps',
    )
    return project


def test_exact_match_is_that_of_greedy_generation(swapped):
    out = swapped.run('eval.py', '--out_dir=out-swaps', '--num_lines=50').stdout
    model, loaded = weights.open_model(str(swapped.path / 'out-swaps' / 'ckpt.pt'))
    tokenizer, right = from_meta(loaded['meta']), 0
    text = tokenizer.decode(
        np.fromfile(swapped.path / 'data' / 'swaps' / 'val.bin', dtype=np.uint16).tolist()
    ).splitlines()
    asked = [text[i] for i in range(0, 400, 8)]
    for line in asked:
        new = (
            model.eval()
            .generate(torch.tensor([tokenizer.encode(line[:3])]), 3, temperature=0)[0]
            .tolist()
        )
        right += tokenizer.decode(new) == line + '\n'
    assert 0 < right < 50
    assert re.search(r'^all +50 +(\S+)%', out, re.MULTILINE)[1] == f'{right * 2:.2f}'
    wrong = re.findall(
        r'^(..=) +(\S*) +(\S+)$', out[out.index('first wrong answers') :], re.MULTILINE
    )
    assert wrong and all(given != want == question[1::-1] for question, given, want in wrong)


def test_the_same_numbers_every_time_and_on_several_processes(swapped):
    first = swapped.run('eval.py', '--out_dir=out-swaps').stdout
    assert swapped.run('eval.py', '--out_dir=out-swaps').stdout == first
    several = swapped.run('eval.py', '--out_dir=out-swaps', processes=2).stdout
    lines = [line for line in several.splitlines() if not line.startswith('[Gloo]')]  # torch 2.10
    assert lines == first.splitlines()


def test_the_loss_is_that_of_training_and_bits_count_bytes(project, trained):
    out = project.run(
        'eval.py', f'--out_dir={trained[0]}', '--eval_iters=2', '--batch_size=4'
    ).stdout
    val = float(re.search(r'step 10: .*val loss (\S+)', trained[1])[1])
    loss, perplexity, bits = map(
        float,
        re.search(
            r'^val +loss (\S+), perplexity (\S+), (\S+) bits per byte', out, re.MULTILINE
        ).groups(),
    )
    assert loss == pytest.approx(val, abs=2e-4) and perplexity == pytest.approx(
        np.exp(loss), rel=1e-3
    )
    assert bits == pytest.approx(loss / np.log(2), abs=2e-4)  # one byte a character
    assert 'exact match' not in out
    assert (
        'val'
        in project.run(
            'eval.py', f'--out_dir={trained[0]}', '--eval_iters=2', '--block_size=3'
        ).stdout
    )


def test_a_character_of_several_bytes_counts_as_such(project):
    write_dataset(project.path / 'data' / 'umlauts', 'äöü' * 200)
    project.run('train.py', *TINY, '--dataset=umlauts', '--out_dir=out-umlauts', '--max_iters=1')
    out = project.run('eval.py', '--out_dir=out-umlauts').stdout
    loss, bits = map(
        float, re.search(r'^val +loss (\S+),.* (\S+) bits per byte', out, re.MULTILINE).groups()
    )
    assert bits == pytest.approx(loss / np.log(2) / 2, abs=2e-4)


def test_a_dataset_may_sort_its_questions(swapped):
    folder = swapped.path / 'data' / 'swaps'
    assert re.search(
        r'^characters:  2 +\d+',
        swapped.run('eval.py', '--out_dir=out-swaps', '--num_lines=20').stdout,
        re.MULTILINE,
    )
    (folder / 'prepare.py').write_text(
        "def kinds(question):\n    return [('first', question[0])]\n"
    )
    assert re.search(
        r'^first: a +\d+', swapped.run('eval.py', '--out_dir=out-swaps').stdout, re.MULTILINE
    )
    (folder / 'prepare.py').unlink()


def test_bad_input_of_eval_is_one_line(swapped, trained):
    assert 'nowhere/ckpt.pt not found' in swapped.error('eval.py', '--out_dir=nowhere')
    bpe = swapped.path / 'data' / 'bpe'  # a dataset without meta.pkl is one of GPT-2's BPE
    bpe.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        (bpe / f'{split}.bin').write_bytes(bytes(1000))
    for dataset in ('swaps', 'bpe'):
        for script in ('eval.py', 'train.py'):
            flags = (
                [f'--out_dir={trained[0]}', '--eval_iters=1']
                if script == 'eval.py'
                else [f'--init_from={trained[0]}', '--device=cpu']
            )
            assert 'trained with another tokenizer' in swapped.error(
                script, *flags, f'--dataset={dataset}'
            )
    assert 'data/poems/train.bin not found' in swapped.error(
        'train.py', f'--init_from={trained[0]}', '--device=cpu', '--dataset=poems'
    )
    assert 'output is for benchmarks; add --tasks=' in swapped.error(
        'eval.py', f'--out_dir={trained[0]}', '--output=r.json'
    )
    assert 'data/poems/train.bin not found' in swapped.error(
        'eval.py', f'--out_dir={trained[0]}', '--dataset=poems'
    )
    assert 'block_size=99 is more than' in swapped.error(
        'eval.py', f'--out_dir={trained[0]}', '--block_size=99'
    )
    assert 'eval_iters=0 must be at least 1' in swapped.error('eval.py', '--eval_iters=0')


def test_without_lines_there_is_no_exact_match(swapped):
    swapped.run(
        'train.py',
        *TINY,
        '--dataset=swaps',
        '--mask_before_token==',
        '--mask_per_line=False',
        '--max_iters=1',
        '--out_dir=out-windows',
    )
    out = swapped.run('eval.py', '--out_dir=out-windows').stdout
    assert 'val' in out and 'exact match' not in out


def test_prompts_in_a_list_are_sampled_in_turn_and_end_where_told(swapped):
    (swapped.path / 'ask.py').write_text(
        "out_dir = 'out-swaps'\nstart = ['ab=', 'cd=']\nnum_samples = 2\n"
        "stop_token_char = '\\n'\ntemperature = 0\n"
    )
    texts = swapped.run('sample.py', 'ask.py', '--device=cpu').stdout.split('\n---------------\n')[
        :-1
    ]
    assert (
        [text[:3] for text in texts] == ['ab=', 'ab=', 'cd=', 'cd=']
        and all('\n' not in text for text in texts)
        and texts[0] == texts[1]
    )
    (swapped.path / 'ends.py').write_text("stop = ['a', '=']\nstop_token_char = ''\n")
    plain = swapped.run(
        'sample.py', 'ask.py', 'ends.py', '--device=cpu', '--max_new_tokens=9'
    ).stdout
    assert all('a' not in text[3:] for text in plain.split('\n---------------\n')[:-1])
    assert 'is 2 tokens; --stop takes any string' in swapped.error(
        'sample.py', 'ask.py', '--stop_token_char=ab'
    )
    (swapped.path / 'ask.py').write_text("out_dir = 'out-swaps'\nstart = [1, 2]\n")
    assert 'must be a text or a list of texts' in swapped.error('sample.py', 'ask.py')


def test_finetuning_takes_weights_only(swapped):
    out = swapped.run(
        'train.py',
        *TINY,
        '--dataset=swaps',
        '--mask_before_token==',
        '--block_size=12',
        '--n_embd=32',
        '--max_iters=3',
        '--out_dir=out-tuned',
        '--init_from=out-swaps',
    ).stdout
    assert 'step 0' in out and 'resuming' not in out
