import importlib
import os
import re
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset

from data.lines import ASCII, find_starts, mask_targets, read_lines, read_questions
from data.loader import Loader
from data.tokenizer import GPT2, char_meta, load_meta
from data.write_lines import letters, write_lines

META = char_meta('ab=\n')


def counted_by_hand(window, per_line):
    """Which targets of a string count, found by walking along it character by character."""
    counts, answering = [], False
    for before, target in zip(window, window[1:]):
        if before == '=':
            answering = True
        elif before == '\n' and per_line:
            answering = False
        counts.append(answering)
    return counts


def random_text(seed, n=3000):
    return ''.join(np.random.default_rng(seed).choice(list('ab=\n'), n, p=[0.4, 0.3, 0.15, 0.15]))


def loader(tmp_path, text, block_size, meta=META, **knobs):
    path = tmp_path / 'train.bin'
    np.array([meta['stoi'][c] for c in text], dtype=np.uint16).tofile(path)
    settings = {'mask_before_token': '=', 'mask_per_line': True, 'align_to_lines': False, **knobs}
    lines = read_lines(meta, meta['vocab_size'], **settings)
    return Loader(str(path), block_size, 8, meta['vocab_size'], lines=lines)


@pytest.mark.parametrize('per_line', [True, False])
@pytest.mark.parametrize('align', [True, False])
@pytest.mark.parametrize('block_size', [1, 2, 7, 30])
def test_targets_that_count_equal_those_found_by_hand(tmp_path, per_line, align, block_size):
    """All windows of two epochs, on random text: empty lines, lines with several marks and none."""
    for seed in range(3):
        text = random_text(seed)
        data = loader(tmp_path, text, block_size, mask_per_line=per_line, align_to_lines=align)
        starts = data.train_starts(np.arange(2 * len(text) // block_size))
        X, Y = data.gather(starts)
        for start, x, y in zip(starts, X.tolist(), Y.tolist()):
            window = text[start : start + block_size + 1]
            assert ''.join(META['itos'][i] for i in x) == window[:-1]
            counts = counted_by_hand(window, per_line)
            want = [META['stoi'][c] if counts[i] else -1 for i, c in enumerate(window[1:])]
            assert y == want, (window, y, want)
        evaluated = [y for _, Y in data.eval_batches(10**6) for y in Y]
        assert all((y >= -1).all() for y in evaluated)


def test_what_counts_in_an_example():
    window = np.array([[META['stoi'][c] for c in 'b=a\na=bb\nab=']])
    for per_line, want in ((True, '.^^..^^^...'), (False, '.^^^^^^^^^^')):
        lines = read_lines(META, 4, '=', per_line, False)
        counts = mask_targets(window, lines)[0]
        assert ''.join('.^'[int(c)] for c in counts) == want


def test_aligned_windows_begin_with_lines_that_fit_and_reach_all_of_them(tmp_path):
    text = random_text(5)
    data = loader(tmp_path, text, 6, align_to_lines=True)
    firsts = [0] + [m.end() for m in re.finditer('\n', text)]
    fit = [i for i in firsts if i + 6 < len(text) and 0 < len(text[i:].partition('\n')[0]) <= 6]
    assert data.starts.tolist() == fit
    per_epoch = len(set(data.train_starts(np.arange(10**4)).tolist()))
    assert per_epoch == len(fit)  # in time every such line is a beginning
    T = max(1, round(len(fit) * 6 / len(text)))
    epoch = data.train_starts(np.arange((len(fit) + 1 - T) // T))
    assert len(set(epoch.tolist())) == len(epoch)  # none twice within an epoch
    windows = {text[i : i + 6] for i in fit}
    for X, _ in data.eval_batches(3):
        for x in X.tolist():
            assert ''.join(META['itos'][i] for i in x) in windows


def test_one_line_is_enough_to_align_to(tmp_path):
    data = loader(tmp_path, 'a=b\n' + 'a' * 20, 8, align_to_lines=True)
    assert data.train_starts(np.arange(5)).tolist() == [0] * 5


def test_line_starts_are_found_across_chunks(tmp_path):
    tokens = np.array([META['stoi'][c] for c in random_text(7)])
    lines = read_lines(META, 4, '=', True, True)
    assert np.array_equal(find_starts(tokens, lines, 10, chunk=7), find_starts(tokens, lines, 10))


def test_without_masks_and_alignment_nothing_changes(tmp_path):
    assert read_lines(META, 4, '', True, False) is None
    plain = loader(tmp_path, random_text(1), 9, mask_before_token='')
    assert plain.lines is None
    assert plain.targets == 8 * 9
    assert (plain.gather(np.arange(50))[1] >= 0).all()
    aligned = loader(tmp_path, random_text(1), 9, mask_before_token='', align_to_lines=True)
    assert aligned.targets == 8 * 9
    assert (aligned.gather(aligned.train_starts(np.arange(50)))[1] >= 0).all()


def test_bpe_tokens_mark_and_end_lines_too(fake_bpe):
    lines = read_lines(GPT2, 300, '=', True, True)
    assert np.flatnonzero(lines.mark).tolist() == [ord('=')]
    assert np.flatnonzero(lines.newline).tolist() == [ord('\n')]
    message = "mask_before_token='answer:' is 7 tokens in this vocabulary, it must be one"
    with pytest.raises(ValueError, match=message):
        read_lines(GPT2, 300, 'answer:', True, True)


@pytest.mark.parametrize(
    'knobs, text, said',
    [
        (dict(mask_before_token='?'), 'a=b\n' * 9, "the vocabulary lacks '?'"),
        (dict(mask_before_token='ab'), 'a=b\n' * 9, "mask_before_token='ab' is 2 tokens"),
        (dict(mask_before_token='\n'), 'a=b\n' * 9, 'ends lines, so it cannot stand within one'),
        (dict(), 'ab\n' * 9, 'so no target counts'),
        (dict(align_to_lines=True), 'a=b' * 9, 'has no newlines, so no lines to align to'),
        (dict(align_to_lines=True), 'aaaaaaa=bbbbb\n' * 9, 'no line fits in block_size=4'),
        (dict(align_to_lines=True, meta=char_meta('ab=')), 'a=b', 'the vocabulary has no newline'),
    ],
)
def test_bad_input_is_refused(tmp_path, knobs, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        loader(tmp_path, text, 4, **knobs)


# -----------------------------------------------------------------------------
# training
LINES = [*TINY, '--dataset=sums', '--block_size=8']
LINES += ['--mask_before_token==', '--align_to_lines=True']


@pytest.fixture(scope='module')
def sums(project):
    text = ''.join(f'{a}+{b}={a + b}\n' for a in range(30) for b in range(30))
    write_dataset(project.path / 'data' / 'sums', text)
    return project


def weights(project, out):
    return torch.load(project.path / out / 'ckpt.pt', weights_only=True)['model']


def test_the_share_of_targets_that_count_is_printed_once(sums):
    out = sums.run('train.py', *LINES, '--out_dir=out-sums').stdout
    assert len(re.findall(r'\d\d\.\d% of them targets that count', out)) == 1


def test_bad_lines_are_one_line_errors(sums):
    assert 'is 2 tokens' in sums.error('train.py', *LINES, '--mask_before_token=+=')
    assert "lacks '?'" in sums.error('train.py', *LINES, '--mask_before_token=?')
    write_dataset(sums.path / 'data' / 'unbroken', 'abc' * 100)
    flags = ['--dataset=unbroken', '--align_to_lines=True']
    assert 'has no newline' in sums.error('train.py', *TINY, *flags)
    assert 'no line fits' in sums.error('train.py', *LINES, '--block_size=4')
    assert 'needs prompts' in sums.error('train.py', *TINY, '--prefix_lm=True')
    flags = ['--prefix_lm=True', '--pos=alibi']
    assert "does not support pos='alibi'" in sums.error('train.py', *LINES, *flags)


def test_other_weights_may_become_a_prefix_lm_but_a_run_may_not(sums):
    sums.run('train.py', *LINES, '--max_iters=1', '--out_dir=out-causal')
    flags = [*LINES, '--max_iters=2', '--prefix_lm=True']
    sums.run('train.py', *flags, '--init_from=out-causal', '--out_dir=out-both-ways')
    path = sums.path / 'out-both-ways' / 'ckpt.pt'
    assert torch.load(path, weights_only=True)['model_args']['prefix_lm']
    said = sums.error('train.py', *flags, '--init_from=resume', '--out_dir=out-causal')
    assert 'add --prefix_lm=False' in said


def test_targets_weigh_the_same_in_every_micro_batch(sums):
    """Micro-batches with different numbers of targets give the weights of one whole batch."""
    flags = ['--max_iters=1', '--mask_per_line=True', '--align_to_lines=False', '--block_size=5']
    one = ['--batch_size=8', '--gradient_accumulation_steps=1', '--out_dir=out-weigh-1']
    four = ['--batch_size=2', '--gradient_accumulation_steps=4', '--out_dir=out-weigh-4']
    sums.run('train.py', *LINES, *flags, *one)
    sums.run('train.py', *LINES, *flags, *four)
    together, apart = weights(sums, 'out-weigh-1'), weights(sums, 'out-weigh-4')
    assert all(torch.allclose(together[name], apart[name], atol=1e-6) for name in together)


def test_a_micro_batch_without_targets_does_no_harm(sums):
    text = ('a' * 500 + '\n') * 20 + 'a=b\n' * 20
    write_dataset(sums.path / 'data' / 'sparse', text)
    flags = ['--dataset=sparse', '--align_to_lines=False', '--batch_size=1', '--eval_iters=2000']
    done = sums.run('train.py', *LINES, *flags, '--out_dir=out-sparse')
    assert 'step 10' in done.stdout
    assert 'nan' not in (sums.path / 'out-sparse' / 'log.csv').read_text()


def test_a_masked_run_resumes_exactly(sums):
    sums.run('train.py', *LINES, '--out_dir=out-whole')
    sums.run('train.py', *LINES, '--out_dir=out-parts', '--max_iters=5')
    sums.run('train.py', *LINES, '--out_dir=out-parts', '--init_from=resume')
    whole, parts = weights(sums, 'out-whole'), weights(sums, 'out-parts')
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# -----------------------------------------------------------------------------
# datasets
def prepare(name):
    return importlib.import_module(f'data.{name}.prepare')


def some_lines(name, n=20000, seed=1):
    questions, answers = prepare(name).make(np.random.default_rng(seed), n)
    return list(zip(texts(questions), texts(answers)))


def texts(rows):
    return [row[row > 0].tobytes().decode() for row in rows]


def test_the_calculator_computes_as_fractions_do():
    """Python's eval() with fractions, and round(), which rounds halves to the even number."""
    for question, answer in some_lines('calculator'):
        expression = re.sub(r'\d+(\.\d+)?', r'Fraction("\g<0>")', question)
        value = eval(expression, {'__builtins__': {}, 'Fraction': Fraction})
        assert Fraction(answer) == Fraction(round(value * 10**4), 10**4), (question, answer, value)
        assert re.fullmatch(r'0|-?(0|[1-9]\d*)(\.\d{0,3}[1-9])?', answer)
        assert answer != '-0'
        assert abs(value) <= 10**10


def test_halves_round_to_even_and_the_largest_values_are_in():
    calculator = prepare('calculator')
    top = np.array([1, 3, -1, -3, 5, 10**10], dtype=object)
    bottom = np.array([20000, 20000, 20000, 20000, 10000, 1], dtype=object)
    assert calculator.rounded(top, bottom).tolist() == [0, 2, 0, -2, 5, 10**14]
    values = np.array([0, 5, -5, 10**14, 123450000, -(10**14), 10000, -12000])
    want = ['0', '0.0005', '-0.0005', '10000000000', '12345', '-10000000000', '1', '-1.2']
    assert texts(calculator.written(values)) == want


def test_the_calculator_asks_what_it_says():
    questions = [question for question, _ in some_lines('calculator')]
    kinds_of = prepare('calculator').kinds
    kinds = [dict(kinds_of(question)) for question in questions]
    assert {kind['operations'] for kind in kinds} == {'1', '2'}
    assert {kind['decimals'] for kind in kinds} == set('01234')
    assert {kind['operators'] for kind in kinds} >= {'+', '-', '*', '/', '* /'}
    assert any('--' in question for question in questions)
    mix = 'with * or /, two operations, at most 2 decimals'
    want = [('operations', '2'), ('operators', '* -'), ('decimals', '2'), ('mix', mix)]
    assert kinds_of('-1.5--2.25*3') == want


def test_operators_may_be_chosen(monkeypatch):
    monkeypatch.setattr(prepare('calculator'), 'operators', '+')
    for question, _ in some_lines('calculator', 500):
        assert dict(prepare('calculator').kinds(question))['operators'] in ('+', '+ +')


def test_the_reverser_reverses():
    pairs = some_lines('reverser')
    for question, answer in pairs:
        assert question[::-1] == answer and '=' not in question and question == question.strip()
    assert {len(question) for question, _ in pairs} == set(range(3, 26))
    kinds = [dict(prepare('reverser').kinds(question))['kind'] for question, _ in pairs]
    for kind in ('lower case', 'mixed case', 'letters and digits', 'with spaces'):
        assert kinds.count(kind) > len(pairs) / 6


def from_words(text):
    """The expression in digits, read word by word."""
    values = dict(zip(prepare('wordcalc').ONES, range(20)))
    values |= zip(prepare('wordcalc').TENS[2:], range(20, 100, 10))
    signs = {'plus': '+', 'minus': '-', 'times': '*', 'divided': '/', 'by': ''}
    out, whole, part, behind = '', None, 0, False
    for word in text.split() + ['end']:
        if word in values and behind:
            out += str(values[word])
        elif word in values:
            whole, part = whole or 0, part + values[word]
        elif word == 'hundred':
            part *= 100
        elif word == 'thousand':
            whole, part = part * 1000, 0
        else:
            out += str(whole + part) if whole is not None else ''
            whole, part, behind = None, 0, word == 'point'
            out += '.' if behind else signs.get(word, '')
    return out


def test_words_say_the_digits():
    for question, answer in some_lines('wordcalc'):
        assert from_words(question) == answer, (question, answer)
    kinds = prepare('wordcalc').kinds
    question = 'minus one minus minus two point five'
    assert kinds(question) == [('operations', '1'), ('decimals', 'some')]
    question = 'one divided by minus two plus three'
    assert kinds(question) == [('operations', '2'), ('decimals', 'none')]


@pytest.mark.parametrize('name', ['calculator', 'reverser', 'wordcalc'])
def test_a_dataset_of_lines_is_the_same_every_time_and_its_splits_share_no_question(name, project):
    folder, script = project.path / 'data' / name, f'data/{name}/prepare.py'

    def read_files():
        names = ('input.txt', 'train.bin', 'val.bin', 'meta.pkl')
        return {file: (folder / file).read_bytes() for file in names}

    def read_split(file):
        itos = load_meta(folder / 'meta.pkl')['itos']
        ids = np.fromfile(folder / file, dtype=np.uint16).tolist()
        return ''.join(itos[i] for i in ids).splitlines()

    out = project.run(script, '--num_examples=60000').stdout
    files = read_files()
    project.run(script, '--num_examples=60000')
    assert files == read_files()
    assert not list(folder.glob('*.partial'))
    train, val = read_split('train.bin'), read_split('val.bin')
    assert files['input.txt'].decode().splitlines() == train + val
    assert len(train + val) == 60000 and 0.03 < len(val) / 60000 < 0.07
    assert f'{len(val):,} lines' in out
    assert max(map(len, train + val)) <= 64
    asked, held_out = ({line.partition('=')[0] for line in lines} for lines in (train, val))
    assert not asked & held_out
    project.run(script, '--num_examples=60000', '--seed=2')
    assert files['train.bin'] != (folder / 'train.bin').read_bytes()


@pytest.mark.parametrize(
    'name, flag, message',
    [
        ('reverser', '--num_examples=10', 'num_examples=10 must be at least 1000'),
        ('calculator', '--max_operations=3', 'max_operations=3 must be from 1 to 2'),
        ('calculator', '--operators=%', "operators='%' must be some of"),
        ('wordcalc', '--seed=-1', 'seed=-1 must not be negative'),
    ],
)
def test_too_few_examples_and_impossible_numbers_are_refused(project, name, flag, message):
    assert message in project.error(f'data/{name}/prepare.py', flag)


def test_an_interrupted_preparation_leaves_nothing_half_written(tmp_path):
    def make(rng, n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(str(tmp_path), make, 1000, 1)
    assert os.listdir(tmp_path) == []


def test_questions_are_read_back(tmp_path):
    words = letters(['ab', 'b', 'ccc'])

    def make(rng, n):
        questions = words[rng.integers(3, size=(n, 9))].reshape(n, -1)
        return questions, words[rng.integers(3, size=n)]

    write_lines(str(tmp_path), make, 5000, 1)
    lines = read_lines(ASCII, len(ASCII['stoi']), '=', True, True)
    text = (tmp_path / 'input.txt').read_text().splitlines()
    val = [line for line in text if zlib.crc32(line.partition('=')[0].encode()) < 0.05 * 2**32]
    found = read_questions(tmp_path / 'val.bin', lines, 10**6)
    pairs = [''.join(ASCII['itos'][i] for i in question + answer) for question, answer in found]
    assert pairs == [line + '\n' for line in val]
    assert len(read_questions(tmp_path / 'val.bin', lines, 7)) == 7
