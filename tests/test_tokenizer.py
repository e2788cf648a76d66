import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data import tokenizer
from data.make_tokenizer import make_meta
from data.tokenizer import GPT2, byte_counts, char_meta, continuation, from_meta, load_meta
from data.write import Piece, to_uint16, write_dataset, write_documents
from support.files import write_whole


def splits(folder):
    return [np.fromfile(folder / name, dtype=np.uint16) for name in ('train.bin', 'val.bin')]


def test_characters_come_back_as_they_went_in():
    text = 'To be, or not to be\n— 2+2=4 é'
    tok = from_meta(char_meta(text))
    assert tok.decode(tok.encode(text)) == text
    assert tok.vocab_size == len(set(text))


def test_characters_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert make_meta('char', characters={'a', 'b'})['itos'] == {0: 'a', 1: 'b'}


def test_a_character_outside_the_vocabulary_is_shown():
    with pytest.raises(ValueError, match="lacks '€', '漢'"):
        from_meta(char_meta('abc')).encode('a€b漢')


def test_a_meta_file_that_names_a_function_is_refused_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1, 'stoi': Evil(), 'itos': {}}))
    with pytest.raises(ValueError, match='refused: it names .*mkdir'):
        load_meta(tmp_path / 'meta.pkl')
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'garbage',
        pickle.dumps(char_meta('abc'))[:-9],
        pickle.dumps([1, 2]),
        pickle.dumps({'stoi': {}}),
        pickle.dumps({'vocab_size': 3, 'stoi': {'a': 0}, 'itos': {0: 'a'}}),
    ],
)
def test_a_damaged_meta_file_is_refused(tmp_path, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(ValueError, match='meta.pkl refused'):
        load_meta(tmp_path / 'meta.pkl')


def test_the_space_between_a_prompt_and_its_continuation_stays():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.WordLevel({'\u2581hello': 0, '\u2581world': 1}))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()  # as SentencePiece has
    bpe.decoder = decoders.Metaspace()
    words = from_meta({'tokenizer': 'json', 'json': bpe.to_str(), 'vocab_size': 2, 'eot': None})
    assert words.decode([1]) == 'world'
    assert continuation(words, [0], [1]) == ' world'
    assert continuation(words, [0] * 20, []) == ''
    assert continuation(words, [], [0, 1]) == 'hello world'


def test_bytes_of_words_in_pieces_count_the_spaces_between_them():
    from tokenizers import Tokenizer, decoders, models

    bpe = Tokenizer(models.WordPiece({'help': 0, '##ing': 1, '[UNK]': 2}, unk_token='[UNK]'))
    bpe.decoder = decoders.WordPiece()
    meta = {'tokenizer': 'json', 'json': bpe.to_str(), 'vocab_size': 3, 'eot': None}
    assert byte_counts(meta)[:2] == [5, 3]


def test_a_dataset_takes_the_place_of_all_of_another(tmp_path):
    for name in ('train.mask', 'val.mask', 'meta.pkl', 'train.mask.partial'):
        (tmp_path / name).write_bytes(b'of another')
    write_dataset(str(tmp_path), 'abc\n' * 50, char_meta('abc\n'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.pkl', 'train.bin', 'val.bin']


def test_a_token_id_that_does_not_fit_uint16_is_an_error():
    assert to_uint16([0, 65535]).tolist() == [0, 65535]
    for bad in (65536, -1):
        with pytest.raises(ValueError, match=f'token id {bad} does not fit uint16'):
            to_uint16([5, bad])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / 'train.bin')
    write_whole(path, lambda f: f.write(b'old'))

    def fail(f):
        f.write(b'half')
        raise OSError('disk full')

    with pytest.raises(OSError):
        write_whole(path, fail)
    assert os.listdir(tmp_path) == ['train.bin']
    assert open(path, 'rb').read() == b'old'


def test_a_character_dataset_splits_90_to_10(tmp_path, capsys):
    text = 'abcdefghij' * 100
    write_dataset(str(tmp_path), text, char_meta(text))
    train, val = splits(tmp_path)
    assert len(train) == 900 and len(val) == 100
    assert train[:3].tolist() == [0, 1, 2]
    assert load_meta(tmp_path / 'meta.pkl')['vocab_size'] == 10
    assert '900 tokens' in capsys.readouterr().out


DOCUMENTS = [f'document number {i} ' * (i % 5) for i in range(2500)]


def pieces_after(n):
    for i, text in enumerate(DOCUMENTS):
        if i >= n:
            yield Piece(text, 'val' if i % 50 == 49 else 'train', ends=True)


def test_documents_end_with_endoftext_and_every_nth_is_held_out(tmp_path, fake_bpe):
    write_documents(str(tmp_path), pieces_after, 'here')
    train, val = splits(tmp_path)
    assert (train == 256).sum() == 2450 and (val == 256).sum() == 50
    assert fake_bpe.decode(val.tolist()).split('<|endoftext|>')[1] == DOCUMENTS[99]
    assert sorted(os.listdir(tmp_path)) == ['train.bin', 'val.bin']


def test_interrupted_tokenizing_resumes_to_the_same_files(tmp_path, fake_bpe, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 0)  # no batch waits
    monkeypatch.setattr('data.write.ThreadPoolExecutor', lambda n: ThreadPoolExecutor(2))
    a, b = tmp_path / 'a', tmp_path / 'b'

    def interrupted(n):
        for i, piece in enumerate(pieces_after(n)):
            if i == 1100:
                raise KeyboardInterrupt
            yield piece

    write_documents(str(a), pieces_after, 'here')
    asked = []
    for source in (interrupted, interrupted, pieces_after):
        try:
            write_documents(str(b), lambda n: asked.append(n) or source(n), 'here')
        except KeyboardInterrupt:
            progress = json.loads((b / 'progress.json').read_text())
            assert progress['pieces'] == asked[-1] + 1000
            with open(b / 'train.bin.partial', 'ab') as f:
                f.write(b'half a batch')  # as if it was killed before it saved its progress
    assert asked == [0, 1000, 2000]
    for name in ('train.bin', 'val.bin'):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_too_few_documents_to_hold_one_out_is_said_and_leaves_nothing(tmp_path, fake_bpe):
    with pytest.raises(ValueError, match='too few of them'):
        one = iter([Piece('a', 'train', True)])
        write_documents(str(tmp_path), lambda n: one, 'here', few='too few of them')
    assert not os.listdir(tmp_path)


def test_gpt2_bpe_has_its_known_ids():
    cache = os.path.join(os.path.dirname(tokenizer.__file__), '.cache', 'gpt2', 'vocab.bpe')
    if not os.path.exists(cache):
        pytest.skip("GPT-2's vocabulary is missing; python data/shakespeare/prepare.py fetches it")
    tok = from_meta(GPT2)
    assert tok.vocab_size == 50257
    assert tok.encode('Hello world') == [15496, 995]
    assert tok.encode('<|endoftext|>') == [50256]
    assert tok.decode(tok.encode('naïve 漢字')) == 'naïve 漢字'
