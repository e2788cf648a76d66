import csv
import gzip
import io
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY

from data import read
from data.hub import unbroken
from data.loader import Loader
from data.make_tokenizer import make_meta
from data.read import Reader, find_files
from data.text.prepare import split
from data.tokenizer import (
    byte_counts,
    char_meta,
    check_meta,
    from_meta,
    load_meta,
    model_vocab_size,
)
from data.write import Piece, write_dataset, write_documents

WORDS = 'the quick brown fox jumps over a lazy dog; zwölf Boxkämpfer jagen Viktor quer'.split()
WORDS += ['über', 'den', 'Sylter', 'Deich', '漢字\n']


def story(i, length=60):
    rng = np.random.default_rng(i)
    return f'story {i}: ' + ' '.join(rng.choice(WORDS, length))


def documents(folder, split, meta=None):
    """The documents in a split, each as a text."""
    meta = meta or load_meta(folder / 'meta.pkl')
    ids = np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])
    ends = np.flatnonzero(ids == from_meta(meta).eot)
    assert len(ends) and ends[-1] == len(ids) - 1
    return [from_meta(meta).decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def all_documents(folder):
    """Those of both splits, sorted."""
    return sorted(documents(folder, 'train') + documents(folder, 'val'))


def write_rows(path, rows):
    path.write_text('\n'.join(json.dumps(row) for row in rows), encoding='utf-8')


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def prepare(project, tmp_path):
    """Runs prepare.py on a folder of files; the folder of the dataset it wrote."""

    def run(*flags, dataset='mine'):
        project.run('data/text/prepare.py', f'--input={tmp_path}', f'--dataset={dataset}', *flags)
        return project.path / 'data' / dataset

    return run


def test_one_file_of_characters_is_what_shakespeare_char_makes_of_it(prepare, tmp_path):
    whole = '\n'.join(story(i) for i in range(50))
    (tmp_path / 'book.txt').write_text(whole, encoding='utf-8')
    made = prepare('--tokenizer=char', '--val_share=0.1')
    write_dataset(str(tmp_path), whole, char_meta(whole))
    for name in ('train.bin', 'val.bin'):
        assert (made / name).read_bytes() == (tmp_path / name).read_bytes()
    assert load_meta(made / 'meta.pkl')['stoi'] == char_meta(whole)['stoi']


def test_every_format_gives_its_documents_and_whole_ones_are_held_out(prepare, tmp_path):
    stories = [story(i) for i in range(240)]
    (tmp_path / 'a.md').write_text(stories[0], encoding='utf-8')
    (tmp_path / 'sub').mkdir()
    with gzip.open(tmp_path / 'sub' / 'b.txt.gz', 'wt', encoding='utf-8') as f:
        f.write(stories[1])
    rows = [json.dumps({'text': s, 'id': 1}) + '\n' for s in stories]
    (tmp_path / 'c.jsonl').write_text('\n'.join(rows[2:80]), encoding='utf-8')
    with gzip.open(tmp_path / 'd.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.writelines(rows[80:160])
    write_parquet(tmp_path / 'e.parquet', id=range(80), text=stories[160:])
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG\0')  # not asked for
    made = prepare('--tokenizer=byte', '--val_share=0.2')
    train, val = documents(made, 'train'), documents(made, 'val')
    assert sorted(train + val) == sorted(stories) and 20 < len(val) < 80
    more = 'one more document, before the others'
    (tmp_path / '0.txt').write_text(more, encoding='utf-8')
    made = prepare('--tokenizer=byte', '--val_share=0.2')
    assert set(documents(made, 'val')) - {more} == set(val)


def test_of_few_documents_the_end_is_held_out_and_no_end_stands_at_the_cut(prepare, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(story(i, 200), encoding='utf-8')
    for name in ('char', 'byte'):
        made = prepare(f'--tokenizer={name}', '--val_share=0.25')
        tok = from_meta(load_meta(made / 'meta.pkl'))
        train, val = (
            tok.decode(np.fromfile(made / name, np.uint16).tolist())
            for name in ('train.bin', 'val.bin')
        )
        whole = ''.join(story(i, 200) + '<|endoftext|>' for i in range(3))
        assert train + val == whole and train.count('<|endoftext|>') == 2
        assert abs(len(val) / len(whole) - 0.25) < 0.01


SUMS = [f'The sum of {i % 9} and {i // 9} is, we count, {i % 9 + i // 9}.' for i in range(99)]


@pytest.mark.parametrize('count', [10, 80, 99])
def test_rows_from_ten_on_are_learned_and_held_out_whole(prepare, tmp_path, count):
    write_rows(tmp_path / 'a.jsonl', [{'text': row} for row in SUMS[:count]])
    made = prepare('--tokenizer=byte')
    assert all_documents(made) == sorted(SUMS[:count])
    assert len(documents(made, 'val')) == max(1, round(count * 0.05))


def test_a_long_text_among_short_ones_is_not_what_is_held_out(prepare, tmp_path):
    for seed in range(5):
        rows = [f'note {i} of {seed}' for i in range(11)] + [story(seed, 3000)]
        write_rows(tmp_path / 'a.jsonl', [{'text': row} for row in rows])
        made = prepare('--tokenizer=byte')
        assert story(seed, 3000) in documents(made, 'train')
        assert len(documents(made, 'val')) == 1


def test_endoftext_in_a_text_ends_a_document_unless_it_is_to_be_text(prepare, tmp_path, project):
    poems = [story(i) for i in range(40)]
    whole = '<|endoftext|>\n'.join(['', *poems, ''])
    (tmp_path / 'a.txt').write_text(whole, encoding='utf-8')
    made = prepare('--tokenizer=byte')
    assert all_documents(made) == sorted(poems)
    command = ['data/text/prepare.py', f'--input={tmp_path}', '--dataset=mine', '--tokenizer=byte']
    assert 'documents end at 41 <|endoftext|>' in project.run(*command).stdout
    said = project.run(*command, '--endoftext_splits=False').stdout
    assert '41 <|endoftext|> are text' in said
    train, val = (np.fromfile(made / name, np.uint16) for name in ('train.bin', 'val.bin'))
    assert bytes([*train, *val]).count(b'<|endoftext|>') == 41  # so 256 is not among them


@pytest.mark.parametrize('size', range(1, 40))
def test_endoftext_splits_wherever_the_pieces_of_a_text_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(read, 'PIECE', size)
    documents = ['one two' * 90, 'three', 'four, five six', 'é' * 400]
    whole = '<|endoftext|>\n'.join([*documents, '\n'])
    (tmp_path / 'a.txt').write_text(whole, encoding='utf-8')
    found, current = [], ''
    for part in Reader('text').read(str(tmp_path / 'a.txt')):
        current += part.text
        if part.ends:
            found.append(current)
            current = ''
    assert found == documents and not current


TABLE = [
    {'id': str(i), 'body': f'{story(i)}, "so; it goes"\tand\non', 'ask': f'who is {i}?'}
    for i in range(60)
]


def csv_of(delimiter):
    out = io.StringIO()
    writer = csv.DictWriter(out, TABLE[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return out.getvalue().encode('utf-8-sig')


@pytest.mark.parametrize(
    'name, content',
    [
        ('a.csv', csv_of(',')),
        ('a.csv', csv_of(';')),
        ('a.csv', csv_of('\t')),
        ('a.tsv', csv_of('\t')),
        ('a.csv.gz', gzip.compress(csv_of(','), mtime=0)),
        ('a.json', json.dumps(TABLE, indent=1).encode()),
        ('a.json', '\n'.join(map(json.dumps, TABLE)).encode()),
        ('a.ndjson', '\n'.join(map(json.dumps, TABLE)).encode()),
    ],
)
def test_tables_are_read_as_tables(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    parts = list(Reader('body').read(str(tmp_path / name)))
    assert [part.text for part in parts] == [row['body'] for row in TABLE]
    assert all(part.ends and part.counts for part in parts)
    parts = list(Reader('body', 'ask').read(str(tmp_path / name)))
    assert [part.text for part in parts[::2]] == [row['ask'] for row in TABLE]
    assert [part.text for part in parts[1::2]] == ['\n' + row['body'] for row in TABLE]
    assert [part.counts for part in parts] == [False, True] * 60


def test_prompts_in_csv_are_not_learned(prepare, tmp_path):
    (tmp_path / 'a.csv').write_bytes(csv_of(','))
    made = prepare('--tokenizer=byte', '--column=body', '--prompt=ask')
    assert all_documents(made) == sorted(f'{row["ask"]}\n{row["body"]}' for row in TABLE)
    ids = np.fromfile(made / 'train.bin', np.uint16)
    counts = np.fromfile(made / 'train.mask', np.uint8)
    assert b'who is' not in bytes(ids[(counts == 1) & (ids < 256)].tolist())


def text_of(path):
    return ''.join(part.text for part in Reader('text').read(str(path)))


def test_settings_in_json_are_text(tmp_path):
    path = tmp_path / 'a.json'
    for content in ('{"compilerOptions": {"strict": true}}', '// a comment\n{"strict": true}', '3'):
        path.write_text(content)
        assert text_of(path) == content


def chat(i):
    turns = [
        ('system', 'be brief'),
        ('user', f'what is {i}?'),
        ('assistant', f'{i}.<|endoftext|>'),
        ('user', 'and more?'),
        ('assistant', f'{i + 1}!'),
        ('user', 'unanswered'),
    ]
    return [{'role': role, 'content': words} for role, words in turns]


def test_of_conversations_the_answers_are_learned(prepare, tmp_path):
    write_rows(tmp_path / 'a.jsonl', [{'messages': chat(i)} for i in range(50)])
    made = prepare('--tokenizer=byte')
    decode = from_meta(load_meta(made / 'meta.pkl')).decode
    ids = np.fromfile(made / 'train.bin', np.uint16)
    counts = np.fromfile(made / 'train.mask', np.uint8)
    train, learned = decode(ids.tolist()), decode(ids[counts == 1].tolist())
    val = decode(np.fromfile(made / 'val.bin', np.uint16).tolist())

    def whole(i):
        return f'be brief\nwhat is {i}?\n{i}.<|endoftext|>and more?\n{i + 1}!<|endoftext|>'

    kept = [i for i in range(50) if whole(i) in train]
    assert len(kept) == 48
    assert train == ''.join(map(whole, kept))
    assert val == ''.join(whole(i) for i in range(50) if i not in kept)
    assert learned == ''.join(f'\n{i}.<|endoftext|>\n{i + 1}!<|endoftext|>' for i in kept)


def test_conversations_in_the_words_of_sharegpt(tmp_path):
    names = {'assistant': 'gpt', 'user': 'human', 'system': 'system'}
    turns = [{'from': names[turn['role']], 'value': turn['content']} for turn in chat(0)]
    (tmp_path / 'a.json').write_text(json.dumps([{'conversations': turns}]))
    parts = list(Reader('conversations').read(str(tmp_path / 'a.json')))
    assert [part.text for part in parts] == ['be brief\nwhat is 0?', '\n0.', 'and more?', '\n1!']
    assert [(part.ends, part.stops) for part in parts[1::2]] == [(False, True), (True, False)]


def test_reading_walks_over_no_text_again(tmp_path, monkeypatch):
    monkeypatch.setattr(read, 'PIECE', 1000)
    looked = 0

    class Break:
        def match(self, rest, start):
            nonlocal looked
            looked += len(rest) - start
            return text_break.match(rest, start)

    text_break = read.BREAK
    monkeypatch.setattr(read, 'BREAK', Break())
    for content in ('12 34 ' * 20_000, ' ' * 100_000, '漢字' * 50_000, 'to be or not ' * 8000):
        looked = 0
        (tmp_path / 'a.txt').write_text(content, encoding='utf-8')
        assert text_of(tmp_path / 'a.txt') == content
        assert looked < 1.1 * len(content)


def test_pieces_of_a_long_text_give_the_same_tokens_as_the_whole(tmp_path, monkeypatch):
    whole = '\r\n\n'.join(story(i) + '\n  indented,\n\n\nfar below' for i in range(300))
    (tmp_path / 'long.txt').write_text(whole, encoding='utf-8', newline='')
    whole = whole.replace('\r\n', '\n')
    monkeypatch.setattr(read, 'PIECE', 1000)
    pieces = list(Reader('text').read(str(tmp_path / 'long.txt')))
    assert len(pieces) > 50
    assert ''.join(piece.text for piece in pieces) == whole
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    bpe = from_meta(make_meta('train', 600, [whole]))
    ids = np.concatenate([bpe.to_array(piece.text) for piece in pieces])
    assert ids.tolist() == bpe.to_array(whole).tolist() == bpe.encode(whole)


def test_a_text_without_lines_comes_in_pieces_too(tmp_path, monkeypatch):
    monkeypatch.setattr(read, 'PIECE', 100)
    (tmp_path / 'long.txt').write_text('ä' * 20_000, encoding='utf-8')
    pieces = [piece.text for piece in Reader('text').read(str(tmp_path / 'long.txt'))]
    assert ''.join(pieces) == 'ä' * 20_000 and max(map(len, pieces)) < 2000


def test_a_tokenizer_is_trained_travels_in_the_checkpoint_and_is_scored(prepare, project, tmp_path):
    stories = [story(i) for i in range(120)]
    for i in range(120):
        (tmp_path / f'{i}.txt').write_text(stories[i], encoding='utf-8')
    made = prepare('--tokenizer=train', '--vocab_size=400', '--val_share=0.1')
    meta = load_meta(made / 'meta.pkl')
    assert meta['vocab_size'] == 400 and meta['dtype'] == 'uint16'
    assert model_vocab_size(meta) == 448
    assert all_documents(made) == sorted(stories)
    counted = np.array(byte_counts(meta))[np.fromfile(made / 'val.bin', dtype=np.uint16)].sum()
    assert counted == sum(len(document.encode()) for document in documents(made, 'val'))
    project.run('train.py', 'config/train_text.py', *TINY, '--dataset=mine', '--out_dir=out-mine')
    loaded = torch.load(project.path / 'out-mine' / 'ckpt.pt', weights_only=True)
    assert loaded['meta'] == meta and loaded['model_args']['vocab_size'] == 448
    (made / 'meta.pkl').unlink()
    flags = ['--start=story', '--max_new_tokens=5', '--num_samples=1']
    sampled = project.run('sample.py', '--out_dir=out-mine', '--device=cpu', *flags).stdout
    assert len(sampled) > 5
    (made / 'meta.pkl').write_bytes(pickle.dumps(meta))
    scored = project.run('eval.py', '--out_dir=out-mine', '--device=cpu', '--eval_iters=2').stdout
    assert 'bits per byte' in scored


def test_a_tokenizer_json_or_a_folder_of_transformers_is_taken_as_it_is(prepare, tmp_path):
    from transformers import PreTrainedTokenizerFast

    texts = [story(i) for i in range(120)]
    meta = make_meta('train', 500, texts)
    home = tmp_path / '.tokenizer'  # hidden folders are not read
    home.mkdir()
    file = home / 'tokenizer.json'
    file.write_text(meta['json'], encoding='utf-8')
    fast = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token='<|endoftext|>')
    fast.save_pretrained(home / 'hub')
    write_rows(tmp_path / 'a.jsonl', [{'text': text} for text in texts])
    for where in (file, home / 'hub'):
        made = prepare(f'--tokenizer={where}')
        assert load_meta(made / 'meta.pkl')['eot'] == 0
        assert all_documents(made) == sorted(texts)


def test_endoftext_in_a_document_is_text_and_in_a_prompt_the_token():
    for meta in (make_meta('train', 300, ['a b c']), make_meta('byte')):
        tok = from_meta(meta)
        ids = tok.to_array('a<|endoftext|>b').tolist()
        assert tok.eot not in ids and tok.decode(ids) == 'a<|endoftext|>b'
    assert from_meta(make_meta('train', 300, ['a b c'])).encode('<|endoftext|>') == [0]


def test_more_ids_than_uint16_holds_are_recorded_and_read_as_uint32(tmp_path):
    characters = set(map(chr, range(0x10000, 0x10000 + 70_000)))
    assert make_meta('char', characters=characters)['dtype'] == 'uint32'
    np.arange(70_000, dtype=np.uint32).tofile(tmp_path / 'train.bin')
    meta = {'tokenizer': 'tiktoken', 'name': 'x', 'vocab_size': 70_000, 'dtype': 'uint32'}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    loader = Loader(str(tmp_path / 'train.bin'), 8, 4, 70_016)
    X, Y = loader.gather(np.array([69_000]))
    assert X[0].tolist() == list(range(69_000, 69_008)) and Y[0, -1] == 69_008
    (tmp_path / 'train.bin').write_bytes(bytes(4002))
    with pytest.raises(ValueError, match='no file of uint32'):
        Loader(str(tmp_path / 'train.bin'), 8, 4, 70_016)


@pytest.mark.parametrize(
    'meta',
    [
        {'tokenizer': 'json', 'vocab_size': 5},
        {'tokenizer': 'word', 'vocab_size': 5},
        {'tokenizer': 'byte', 'vocab_size': '5'},
        {'tokenizer': 'byte', 'vocab_size': 257, 'dtype': 'int8'},
    ],
)
def test_a_meta_that_describes_no_tokenizer_is_refused(meta):
    with pytest.raises(ValueError, match='refused'):
        check_meta(meta, 'here')


BAD_FILES = [
    ('a.txt', b'', 'holds 0 characters, too few'),
    ('a.txt', b'caf\xe9 ' * 100, 'a.txt is not UTF-8 text'),
    ('a.txt', b'text \0 and a zero byte ' * 100, 'a.txt is binary'),
    ('a.txt.gz', b'hello', 'is not a whole gzip file'),
    ('a.jsonl', b'{"body": "hello"}\n', "a.jsonl:1 has no text 'text'; it has body"),
    ('a.jsonl', b'{"text": "hello"}\n{"text": 3}\n', "a.jsonl:2 has no text 'text'"),
    ('a.jsonl', b'{"text": null}\n', "a.jsonl:1 has no text 'text'; 'text' is NoneType"),
    ('a.jsonl', b'{"text": "hello"\n', 'a.jsonl:1 is not JSON'),
    ('a.jsonl', b'[' * 100_000, 'a.jsonl:1 is not JSON'),
    ('a.jsonl', b'{"text": "the same text"}\n' * 20, 'two documents that begin differently'),
    ('a.jsonl', b'{"messages": [{"role": "user", "content": "hi"}]}', 'has no answer to learn'),
    ('a.jsonl', b'{"messages": [{"role": "user"}]}', 'message 1 needs a role and content'),
    ('a.json', b'[{"text": "hello"}, {"te', 'a.json is not JSON'),
    ('a.json', b'[{"text": "hello"}, 3]', "a.json: row 2 has no text 'text'; it has a int"),
    ('a.csv', b'id,body\n1,hello\n', "a.csv:2 has no text 'text'; it has id, body; try --column"),
    ('a.csv', b'id,text\n1,hello, you\n', 'a.csv:2 has 3 fields, its header 2'),
    ('a.csv', b'id,text\n1,"hello\n', 'a.csv:2 is not valid .csv'),
    ('a.parquet', b'hello', 'is not a Parquet file'),
]
BAD_FLAGS = [  # for a text
    ('--vocab_size=500', 'vocab_size is that of --tokenizer=train'),
    ('--tokenizer=train --vocab_size=100', 'vocab_size=100 must be from 257'),
    (f'--tokenizer=train --vocab_size={10**30}', 'vocab_size takes a finite number'),
    ('--tokenizer=no/where', "tokenizer='no/where' is none of 'char'"),
    ('--tokenizer=byte --val_share=0.999999', 'leaves nothing to train on; lower it'),
    ('--tokenizer=byte --val_share=1e-17', 'val_share=1e-17 holds nothing out; raise it'),
    ('--val_share=nan', 'val_share takes float'),
    ('--val_share=1e999', 'val_share takes a finite number'),
    ('--val_share=-0.5', 'must be between 0 and 1'),
    ('--val_share=0', 'must be between 0 and 1'),
    ('--column=', 'column must name'),
    ('--prompt=ask', "prompt='ask' is a column, and "),
    ('--dataset=../x', 'must be the name of a folder'),
    ('--hub_name=some/thing', 'say what to read'),
]
BAD_FLAGS_FOR_TABLES = [
    ('a.json', b'{"strict": true}', '--column=body', 'a.json is not a table'),
    (
        'a.jsonl',
        b'{"text": "yes", "ask": "what?"}\n' * 90,
        '--prompt=ask',
        'two documents that begin differently',
    ),
    (
        'a.jsonl',
        b''.join(b'{"text": "row %d"}\n' % i for i in range(200)),
        '--tokenizer=byte --val_share=0.999999',
        'lower it',
    ),
]


def assert_one_line(project, folder, flags, message):
    """prepare.py raises `message` and leaves nothing."""
    command = ['data/text/prepare.py', f'--input={folder}', '--dataset=bad', *flags.split()]
    assert message in project.error(*command)
    assert not (project.path / 'data' / 'bad').exists()


@pytest.mark.parametrize('name, content, message', BAD_FILES)
def test_bad_files_are_one_line(project, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert_one_line(project, tmp_path, '', message)


@pytest.mark.parametrize('flags, message', BAD_FLAGS)
def test_bad_flags_are_one_line(project, tmp_path, flags, message):
    (tmp_path / 'a.txt').write_bytes(b'text ' * 100)
    assert_one_line(project, tmp_path, flags, message)


@pytest.mark.parametrize('name, content, flags, message', BAD_FLAGS_FOR_TABLES)
def test_flags_that_do_not_fit_a_table_are_one_line(
    project, tmp_path, name, content, flags, message
):
    (tmp_path / name).write_bytes(content)
    assert_one_line(project, tmp_path, flags, message)


def test_an_empty_folder_is_one_line(project, tmp_path):
    assert_one_line(project, tmp_path, '', 'no such file, and no text in such a folder')


def test_one_bad_file_among_many_is_one_line(project, tmp_path):
    for i in range(120):
        (tmp_path / f'{i}.txt').write_bytes(b'text ' * 100)
    (tmp_path / 'z.txt').write_bytes(b'\xff' * 100)
    assert_one_line(project, tmp_path, '--tokenizer=byte', 'z.txt is not UTF-8')


def test_a_stream_that_breaks_off_is_one_line():
    def documents():
        yield 'one'
        raise ConnectionResetError('peer\nis gone')

    stream = unbroken(documents(), 'owner/name')
    assert next(stream) == 'one'
    with pytest.raises(OSError, match=r'owner/name broke off \(peer is gone\); repeat the command'):
        next(stream)


def test_a_hub_that_cannot_be_reached_is_one_line(project):
    flags = ['--hub_name=some/thing', '--dataset=bad']
    assert 'some/thing cannot be loaded' in project.error('data/text/prepare.py', *flags)


def test_prompts_are_read_but_not_learned(prepare, project, tmp_path):
    """The targets are the tokens of the answers, with <|endoftext|>, from jsonl and Parquet."""
    rows = [dict(ask=f'What is {i} and one?', say=f'That is {i + 1}.') for i in range(80)]
    write_rows(tmp_path / 'a.jsonl', rows[:40])
    columns = {name: [row[name] for row in rows[40:]] for name in ('say', 'ask')}
    write_parquet(tmp_path / 'b.parquet', **columns)
    flags = ['--tokenizer=byte', '--column=say']
    made = prepare(*flags, '--prompt=ask', '--val_share=0.2', dataset='talk')
    assert all_documents(made) == sorted(f'{row["ask"]}\n{row["say"]}' for row in rows)
    loader = Loader(str(made / 'train.bin'), 64, 4, 257)
    _, Y = loader.gather(loader.train_starts(np.arange(50)))
    learned = bytes(Y[(Y >= 0) & (Y < 256)].tolist()).decode()
    assert 'That is' in learned and 'What' not in learned and 'and one' not in learned
    assert 0 < loader.targets / 256 < 0.6
    train = ['config/train_text.py', *TINY, '--dataset=talk', '--out_dir=out-talk']
    assert 'of them targets that count' in project.run('train.py', *train).stdout
    scored = project.run('eval.py', '--out_dir=out-talk', '--device=cpu', '--eval_iters=2').stdout
    assert 'tokens of answers' in scored
    prepare(*flags, dataset='talk')  # the same rows without prompts
    assert not (made / 'train.mask').exists()
    assert not Loader(str(made / 'train.bin'), 64, 4, 257).masked


def test_a_mask_of_another_length_is_refused(tmp_path):
    np.zeros(500, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    np.ones(499, dtype=np.uint8).tofile(tmp_path / 'train.mask')
    with pytest.raises(ValueError, match='train.mask is not of'):
        Loader(str(tmp_path / 'train.bin'), 8, 4, 10)


def test_a_run_to_be_fine_tuned_lends_its_tokenizer(project, trained, tmp_path):
    (tmp_path / 'a.txt').write_text('to be or not to be ' * 30)
    prepare = ['data/text/prepare.py', f'--input={tmp_path}', '--tokenizer=out-trained']
    project.run(*prepare, '--dataset=more')
    sizes = ['--batch_size=4', '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_iters=2']
    run = ['--dataset=more', '--init_from=out-trained', '--out_dir=out-more']
    project.run('train.py', *TINY[:2], *sizes, *run)
    (tmp_path / 'a.jsonl').write_text('{"text": "be", "ask": "to"}\n' * 100)
    (tmp_path / 'a.txt').unlink()
    assert 'would have no end' in project.error(*prepare, '--dataset=m', '--prompt=ask')


def test_a_tokenizer_file_does_not_cut_texts_short(tmp_path):
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_str(make_meta('train', 300, ['to be'])['json'])
    bpe.enable_truncation(5)
    bpe.enable_padding(length=50)
    bpe.save(str(tmp_path / 'tokenizer.json'))
    tok, text = from_meta(make_meta(str(tmp_path / 'tokenizer.json'))), 'not to be cut' * 9
    assert tok.decode(tok.to_array(text).tolist()) == text


def test_half_a_character_in_json_becomes_a_replacement(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "cut \\ud83d here"}\n' * 120)
    parts = Reader('text').read(str(tmp_path / 'a.jsonl'))
    assert {part.text for part in parts} == {'cut \ufffd here'}


def test_endoftext_is_read_and_written_by_bytes_too():
    tok = from_meta({'tokenizer': 'byte', 'vocab_size': 257})
    assert tok.encode('ä<|endoftext|>b') == [0xC3, 0xA4, 256, 98]
    assert tok.decode([0xC3, 0xA4, 256, 98]) == 'ä<|endoftext|>b'


def test_endoftext_in_a_prompt_of_characters_is_the_token():
    meta = make_meta('char', characters={'a', 'b', '<|endoftext|>'})
    tok = from_meta(meta)
    assert tok.encode('<|endoftext|>ab<|endoftext|>') == [2, 0, 1, 2]
    assert tok.encode('') == []
    with pytest.raises(ValueError, match="the vocabulary lacks '<'"):
        tok.to_array('<|endoftext|>')
    with pytest.raises(ValueError, match="the vocabulary lacks '<'"):
        from_meta(char_meta('ab')).encode('<|endoftext|>')


def test_another_tokenizer_does_not_resume_the_work_of_one(tmp_path):
    def interrupted(n):
        yield from (Piece('a' * 2**18, 'train', True) for _ in range(30))
        raise KeyboardInterrupt

    def pieces(n):
        return (Piece('b' * 10, split, True) for split in ('train', 'val'))

    with pytest.raises(KeyboardInterrupt):
        write_documents(str(tmp_path), interrupted, 'one', make_meta('byte'))
    journal = tmp_path / 'progress.json'
    assert json.loads(journal.read_text())['pieces'] > 0
    older = {'source': 'two', 'documents': 3, 'train': 1, 'val': 1}  # by an earlier version
    for source, left in (('two', json.dumps(older)), ('three', None), ('four', '{"sour')):
        if left:
            journal.write_text(left)
        write_documents(str(tmp_path), pieces, source, make_meta('byte'))
        ids = np.fromfile(tmp_path / 'train.bin', dtype=np.uint16)
        assert ids.tolist() == [98] * 10 + [256]


def test_texts_that_differ_in_a_few_digits_are_held_out_too():
    parts = []
    for i in range(200):
        parts.append(read.Part(f'what is {i}?', False, 1, False))
        parts.append(read.Part('\nwho knows', True, 1, True))
    pieces = split(parts, [(20, 0)] * 100, 0.05, prompts=True)
    held_out = [piece for piece in pieces if piece.split == 'val']
    assert 4 <= len(held_out) <= 40


def test_hidden_files_are_not_read(tmp_path):
    (tmp_path / 'a.txt').write_text('to be')
    (tmp_path / '.#b.txt').symlink_to('nobody@nowhere.1')  # as Emacs locks a file
    assert find_files(str(tmp_path)) == [str(tmp_path / 'a.txt')]
