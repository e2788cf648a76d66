"""
Whatever the input, a script succeeds, or prints one line and exits with a fitting code. It never
hangs, never shows a traceback, and writes no files but those it should. Some examples by
default; many with

    FUZZ=2000 python -m pytest tests/test_fuzz.py
"""

import os
import pickle
import string

import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import read_settings

MANY = int(os.environ.get('FUZZ', 12))
fuzz = settings(
    max_examples=MANY,
    deadline=None,
    derandomize='FUZZ' not in os.environ,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != 'posix', reason='forks thousands of scripts from one process'),
]

SHORT = [*TINY, '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--out_dir=out-fuzz']
SAMPLE = [
    '--device=cpu',
    '--dtype=float32',
    '--num_samples=1',
    '--max_new_tokens=3',
    '--block_size=16',
]
words = st.one_of(
    st.integers(-3, 40).map(str),
    st.sampled_from(
        [
            '',
            'None',
            'True',
            'False',
            'nan',
            'inf',
            '-inf',
            '1e-3',
            '0.5',
            '1e400',
            '-0.0',
            '[]',
            "['a', 'b']",
            "''",
            '10**9',
            '99999999999999999999',
            '1000000000000000000',
            '-9223372036854775809',
            '1e300',
            '0x10',
            '1_0',
            '(1,',
            '{1: 2}',
            'auto',
            'cpu',
            'cuda',
            'mps',
            'float16',
            'resume',
            'scratch',
            'tiny',
            'README.md',
            'out-trained',
            'gpt2',
            '../..',
            '/',
            '.',
            'a b',
            '=',
            '--',
        ]
    ),
    st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=8),
)
HEAVY = {
    'n_layer',
    'n_embd',
    'd_model',
    'd_head',
    'n_head',
    'block_size',
    'batch_size',
    'gradient_accumulation_steps',
    'vocab_size',
    'max_iters',
    'max_new_tokens',
    'num_samples',
    'eval_iters',
    'steps',
    'warmup_steps',
    'batch_size_warmup_iters',
    'prompt_tokens',
    'new_tokens',
    'lora_rank',
    'n_kv_head',
}  # small numbers only, or nonsense
NOT_HERE = {
    'compile',
    'wandb_log',
    'interactive',
    'out_dir',
    'profile',
    'json',
    'png',
    'output',
    'eval_output',
    'dist_timeout',
}  # slow, or say where to write


HUGE = [str(10**18), str(10**22), str(2**62), str(2**31), '1e300', str(-(10**22))]


def flags(script):
    names = sorted(
        set(read_settings(ROOT / script))
        | (
            set(read_settings(str(ROOT / 'model.py:GPTConfig')))
            if script in ('train.py', 'bench.py')
            else set()
        )
    )
    tame = st.one_of(
        st.integers(-2, 20).map(str),
        st.sampled_from(['', 'None', 'True', '0.5', 'nan', 'x', '1e400', '[]', *HUGE]),
    )
    one = st.sampled_from([name for name in names if name not in NOT_HERE]).flatmap(
        lambda name: (tame if name in HEAVY else words).map(lambda text: f'--{name}={text}')
    )
    return st.lists(
        st.one_of(one, one, one, words.filter(lambda text: text not in ('', '-'))),
        min_size=1,
        max_size=3,
    )


def snapshot(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob('*')
        if path.is_file()
        and not path.name.startswith('run-')
        and not {'out-fuzz', '__pycache__', '.cache', 'fuzzed'} & set(path.parts)
    }


def holds(project, *args):
    """Run a script, which must end as it should."""
    before = snapshot(project.path)
    done = project.run(*args, check=False)
    told = f'{args}\n{done.stdout[-2000:]}{done.stderr[-4000:]}'
    assert done.returncode in (0, 1, 2), told
    assert 'Traceback' not in done.stderr, told
    if done.returncode:
        assert [line.startswith('error: ') for line in done.stderr.splitlines() if line.strip()][
            -1:
        ] == [True], told
    assert snapshot(project.path) == before, told
    for name in ('out', 'err'):
        (project.path / f'run-{project.count}.{name}').unlink()


def fuzzed_dataset_holds(project, *flags):
    holds(project, 'train.py', *SHORT, '--dataset=fuzzed', *flags)
    evaluate = '--out_dir=out-trained', '--device=cpu', '--dataset=fuzzed', '--eval_iters=1'
    holds(project, 'eval.py', *evaluate)


@fuzz
@given(flags('train.py'))
def test_flags_of_train(project, trained, extra):
    holds(project, 'train.py', *SHORT, *extra)


@fuzz
@given(flags('sample.py'))
def test_flags_of_sample(project, trained, extra):
    holds(project, 'sample.py', '--out_dir=out-trained', *SAMPLE, *extra)


@fuzz
@given(flags('eval.py'))
def test_flags_of_eval(project, trained, extra):
    holds(
        project,
        'eval.py',
        '--out_dir=out-trained',
        '--device=cpu',
        '--dataset=tiny',
        '--eval_iters=1',
        '--batch_size=4',
        *extra,
    )


@fuzz
@given(flags('bench.py'))
def test_flags_of_bench(project, trained, extra):
    holds(
        project,
        'bench.py',
        '--device=cpu',
        '--dataset=tiny',
        '--n_layer=1',
        '--n_head=1',
        '--n_embd=8',
        '--block_size=16',
        '--batch_size=2',
        '--steps=1',
        '--vocab_size=50',
        *extra,
        '--mode=train',
        '--compile=False',
    )


@fuzz
@given(flags('data/text/prepare.py'))
def test_flags_of_prepare(project, trained, extra):
    (project.path / 'fuzzed.txt').write_text('to be or not to be\n' * 30)
    holds(
        project,
        'data/text/prepare.py',
        '--tokenizer=byte',
        *extra,
        '--input=fuzzed.txt',
        '--dataset=fuzzed',
    )
    (project.path / 'fuzzed.txt').unlink()


@settings(fuzz, max_examples=MANY // 4)  # transformers takes seconds to load
@given(flags('convert.py'))
def test_flags_of_convert(project, trained, extra):
    holds(project, 'convert.py', '--init_from=out-trained', *extra, '--output=out-fuzz')


code = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    'max_iters',
                    'dropout',
                    'bias',
                    'out_dir',
                    'dataset',
                    '_x',
                    'x',
                    'n_layer',
                    'seed',
                    'lr_schedule',
                    'import os;seed',
                ]
            ),
            st.sampled_from(['=', '+=', '==', ': int =', '//=', '']),
            words,
        ),
        max_size=4,
    ).map(lambda rows: '\n'.join(map(' '.join, rows)).encode()),
    st.text(string.printable, max_size=40).map(str.encode),
)


@fuzz
@given(code)
def test_config_files(project, trained, text):
    path = project.path / 'fuzzed.py'
    path.write_bytes(text)
    # flags after the file keep it small, whatever it says
    holds(project, 'train.py', 'fuzzed.py', *SHORT)
    path.unlink()


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.integers(-1, 40), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=6,
)
broken = st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.booleans())


def damage(data, how):
    """Bytes with some in the middle replaced, and perhaps all that follows gone."""
    place, new, cut = how
    place %= len(data)
    return data[:place] + new + (b'' if cut else data[place + len(new) :])


@fuzz
@given(
    st.one_of(
        broken,
        st.tuples(
            st.sampled_from(
                ['vocab_size', 'stoi', 'itos', 'tokenizer', 'dtype', 'eot', 'name', 'json']
            ),
            plain,
        ),
        plain.map(lambda value: (value,)),
    )
)
def test_metas(project, trained, how):
    meta = (project.path / 'data' / 'tiny' / 'meta.pkl').read_bytes()
    folder = project.path / 'data' / 'fuzzed'
    folder.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        (folder / f'{split}.bin').write_bytes(
            (project.path / 'data' / 'tiny' / f'{split}.bin').read_bytes()
        )
    new = (
        damage(meta, how)
        if len(how) == 3
        else pickle.dumps({**pickle.loads(meta), how[0]: how[1]} if len(how) == 2 else how[0])
    )
    (folder / 'meta.pkl').write_bytes(new)
    fuzzed_dataset_holds(project)


@fuzz
@given(
    st.one_of(
        broken,
        st.tuples(
            st.sampled_from(['model', 'model_args', 'meta', 'config', 'iter_num', 'best_val_loss']),
            plain,
        ),
        st.tuples(
            st.just('model_args'),
            st.sampled_from(
                [
                    'n_layer',
                    'n_head',
                    'n_embd',
                    'block_size',
                    'vocab_size',
                    'pos',
                    'bias',
                    'dropout',
                    'new',
                ]
            ),
            st.one_of(st.integers(-2, 50), plain),
            st.none(),
        ),
    )
)
def test_checkpoints(project, trained, how):
    folder = project.path / 'out-fuzz'
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    data = (trained[0] / 'ckpt.pt').read_bytes()
    if len(how) == 3:
        (folder / 'ckpt.pt').write_bytes(damage(data, how))
    else:
        state = torch.load(trained[0] / 'ckpt.pt', weights_only=True)
        state[how[0]] = how[1] if len(how) == 2 else {**state[how[0]], how[1]: how[2]}
        torch.save(state, folder / 'ckpt.pt')
    holds(project, 'sample.py', '--out_dir=out-fuzz', *SAMPLE)
    holds(project, 'train.py', *SHORT, '--init_from=resume')


@fuzz
@given(
    st.one_of(
        st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=20),
        st.text('to be\n', max_size=40),
    ),
    st.sampled_from(['', 'FILE:', 'LINES:']),
    st.sampled_from(
        [
            [],
            ['--temperature=0'],
            ['--top_p=0.1', '--repetition_penalty=1.3'],
            ['--stop=e'],
            ['--num_samples=3'],
        ]
    ),
)
def test_prompts(project, trained, prompt, kind, how):
    if kind:
        (project.path / 'fuzzed.txt').write_text(prompt, encoding='utf-8')
        prompt = 'fuzzed.txt'
    holds(project, 'sample.py', '--out_dir=out-trained', *SAMPLE, f'--start={kind}{prompt}', *how)


def once(project, trained):
    """A run of two iterations of which an optimizer file is there: (folder, name of the file)."""
    folder = project.path / 'out-once'
    if not folder.exists():
        project.run('train.py', *SHORT, '--out_dir=out-once')
    return folder, next(
        path.name for path in folder.iterdir() if path.name.startswith('optimizer-')
    )


@fuzz
@given(
    st.one_of(
        broken,
        st.tuples(st.sampled_from(['state', 'param_groups', 'scaler']), plain),
        st.tuples(
            st.integers(0, 8),
            st.sampled_from(['step', 'exp_avg', 'exp_avg_sq', 'other']),
            st.one_of(plain, st.just(torch.ones(2)), st.just(torch.ones(16, 16))),
            st.just('state'),
        ),
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(
                ['lr', 'betas', 'eps', 'amsgrad', 'maximize', 'foreach', 'params', 'new']
            ),
            plain,
            st.just('group'),
        ),
    )
)
def test_optimizer_files(project, trained, how):
    source, name = once(project, trained)
    folder = project.path / 'out-fuzz'
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / 'ckpt.pt').write_bytes((source / 'ckpt.pt').read_bytes())
    if len(how) == 3:
        (folder / name).write_bytes(damage((source / name).read_bytes(), how))
    else:
        state = torch.load(source / name, weights_only=True)
        if len(how) == 2:
            state[how[0]] = how[1]
        elif how[3] == 'state':
            state['state'].setdefault(how[0], {})[how[1]] = how[2]
        else:
            state['param_groups'][how[0]][how[1]] = how[2]
        torch.save(state, folder / name)
    holds(project, 'train.py', *SHORT, '--max_iters=4', '--init_from=resume')


@fuzz
@given(
    st.sampled_from(['train.bin', 'val.bin', 'train.mask', 'val.mask']),
    st.one_of(
        st.binary(max_size=300),
        st.binary(min_size=5040, max_size=5041),
        st.integers(0, 3000).map(lambda n: bytes(n)),
    ),
    st.sampled_from([[], ['--align_to_lines=True'], ['--mask_before_token=,']]),
)
def test_data_files(project, trained, name, data, how):
    folder = project.path / 'data' / 'fuzzed'
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for source in ('train.bin', 'val.bin', 'meta.pkl'):
        (folder / source).write_bytes((project.path / 'data' / 'tiny' / source).read_bytes())
    (folder / name).write_bytes(data)
    fuzzed_dataset_holds(project, *how)


@fuzz
@given(
    st.binary(max_size=200),
    st.sampled_from(['txt', 'jsonl', 'json', 'csv', 'tsv', 'md']),
    st.sampled_from(
        [
            [],
            ['--column=text'],
            ['--column=a', '--prompt=b'],
            ['--tokenizer=char'],
            ['--val_share=0.5'],
        ]
    ),
)
def test_texts_to_prepare(project, trained, data, kind, how):
    (project.path / f'fuzzed.{kind}').write_bytes(data * 20)
    holds(
        project,
        'data/text/prepare.py',
        '--tokenizer=byte',
        *how,
        f'--input=fuzzed.{kind}',
        '--dataset=fuzzed',
    )
    (project.path / f'fuzzed.{kind}').unlink()
