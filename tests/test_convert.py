import json
import os
import sys

import pytest
import torch
from conftest import write_dataset
from test_model import MODERN
from test_train import nanogpt_checkpoint

from data.tokenizer import GPT2, char_meta, from_meta, gpt2_encoding, make_meta, same_tokenizer
from generate import stream
from model import GPT, GPTConfig
from support.hf import from_pretrained, to_transformers, tokenizer_files
from support.weights import open_model

TEXT = 'To be, or not to be: that is the question.\n\n  Zwölf Boxkämpfer — 漢字 42!\n'
SMALL = dict(block_size=24, vocab_size=64, n_layer=2, n_head=4, n_embd=32)


def scrambled(**knobs):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SMALL, **knobs})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


HOMES = [
    dict(),
    dict(bias=False),
    dict(dropout=0.1),
    MODERN,
    {**MODERN, 'n_kv_head': 2},
    {**MODERN, 'logit_cap': 0.0},
]


@pytest.mark.parametrize('knobs', HOMES)
def test_out_and_in_again_weights_are_the_same_bits_and_logits_equal_theirs(knobs, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = scrambled(**knobs)
    to_transformers(ours, None, str(tmp_path / 'hf'))
    idx = torch.randint(64, (3, 24))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    back, meta = from_pretrained(str(tmp_path / 'hf'))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx, idx)[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(back.eval()(idx, idx)[0], ours(idx, idx)[0], rtol=0, atol=1e-5)
    assert meta is None and (tmp_path / 'hf' / 'model.safetensors').exists()
    weights = back.state_dict()
    for name, p in ours.state_dict().items():
        assert weights[name].equal(p), name
    if not knobs.get('bias', True) and knobs.get('pos') is None:
        assert not weights['transformer.h.0.mlp.c_fc.bias'].any()  # their GPT-2 has biases


@pytest.mark.parametrize(
    'meta',
    [
        char_meta(TEXT),
        make_meta('char', characters=set(TEXT) | {'<|endoftext|>'}),
        make_meta('byte'),
        make_meta('train', 300, [TEXT * 5]),
    ],
)
def test_the_tokenizer_goes_along_and_comes_back(meta, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = scrambled(vocab_size=320, **{k: v for k, v in MODERN.items()})
    to_transformers(ours, meta, str(tmp_path / 'hf'))
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / 'hf'), from_meta(meta)
    assert (
        tokenizer(TEXT)['input_ids'] == own.encode(TEXT)
        and tokenizer.decode(own.encode(TEXT)) == TEXT
    )
    assert tokenizer.eos_token_id == own.eot
    again = from_pretrained(str(tmp_path / 'hf'))[1]
    assert from_meta(again).encode(TEXT) == own.encode(TEXT) and from_meta(again).eot == own.eot
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    assert model.config.vocab_size == own.vocab_size == len(tokenizer)  # without the padding
    idx = torch.tensor([own.encode('To be')])
    with torch.no_grad():
        logits = ours(idx, idx)[0][..., : own.vocab_size]
        torch.testing.assert_close(model(idx).logits, logits, rtol=0, atol=1e-4)


def test_a_classic_model_with_a_character_vocabulary_loads_by_auto_classes(tmp_path):
    from transformers import AutoTokenizer

    meta = char_meta(TEXT)
    to_transformers(scrambled(vocab_size=meta['vocab_size']), meta, str(tmp_path / 'hf'))
    assert AutoTokenizer.from_pretrained(tmp_path / 'hf')(TEXT)['input_ids'] == from_meta(
        meta
    ).encode(TEXT)


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """(a small network with GPT-2's BPE and padding, the folder that it is exported to)"""
    try:
        gpt2_encoding()
    except OSError:
        pytest.skip('GPT-2 vocabulary not on this machine')
    model = scrambled(vocab_size=50304, n_embd=8, block_size=64)
    folder = tmp_path_factory.mktemp('gpt2') / 'hf'
    to_transformers(model, GPT2, str(folder))
    return model, folder


def test_gpt2s_own_tokenizer_is_recognised(gpt2):
    from transformers import AutoTokenizer

    text = TEXT + "It's   spaced, isn't it? <|endoftext|>"
    tokenizer = AutoTokenizer.from_pretrained(gpt2[1])
    assert tokenizer(text)['input_ids'] == from_meta(GPT2).encode(text)
    special = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    assert special == {'<|endoftext|>'}  # as in OpenAI's
    back, meta = from_pretrained(str(gpt2[1]))
    assert meta == GPT2 and back.config.vocab_size == 50257


def test_the_files_say_what_other_readers_ask_for(gpt2):
    read = lambda name: json.loads((gpt2[1] / name).read_text(encoding='utf-8'))
    assert read('config.json')['n_ctx'] == 64  # llama.cpp
    kind = read('tokenizer_config.json')['tokenizer_class']
    assert kind == 'PreTrainedTokenizerFast'  # transformers 4
    assert 'suppress_tokens' not in read('generation_config.json')
    if os.name == 'posix':  # an engine may run as another user
        assert len({path.stat().st_mode for path in gpt2[1].iterdir()}) == 1


@pytest.mark.parametrize('kind', ['gpt2', 'byte', 'trained', 'char'])
def test_ctranslate2_writes_the_same_greedy_text(kind, request, tmp_path):
    ctranslate2 = pytest.importorskip('ctranslate2', reason='needs pip install -e .[test]')
    if kind == 'gpt2':
        meta, (model, folder) = GPT2, request.getfixturevalue('gpt2')
    else:
        characters = set(TEXT) | {'<|endoftext|>'}
        meta = {
            'byte': make_meta('byte'),
            'trained': make_meta('train', 300, [TEXT * 5]),
            'char': make_meta('char', characters=characters),
        }[kind]
        model, folder = scrambled(vocab_size=320, block_size=64), tmp_path / 'hf'
        to_transformers(model, meta, str(folder))
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(tmp_path / 'engine'))
    engine, tokenizer = ctranslate2.Generator(str(tmp_path / 'engine')), from_meta(meta)
    words = json.loads((tmp_path / 'engine' / 'vocabulary.json').read_text(encoding='utf-8'))
    assert len(words) == tokenizer.vocab_size
    for prompt in ('To be', ' or not', 'Zwölf\n'):
        ids = tokenizer.encode(prompt)
        theirs = engine.generate_batch(
            [[words[i] for i in ids]], max_length=30, end_token=[], include_prompt_in_result=False
        )
        ours = stream(model, [ids], 30, temperature=0, vocab_size=tokenizer.vocab_size)
        assert theirs[0].sequences_ids[0] == [int(token) for token in ours]


@pytest.mark.parametrize(
    'knobs, named',
    [
        (dict(pos='alibi'), "GPT2LMHeadModel has not pos='alibi'"),
        (dict(n_kv_head=2), 'has not n_kv_head=2'),
        ({**MODERN, 'activation': 'swiglu'}, "activation='swiglu'"),
        ({**MODERN, 'bias': True}, 'NanoChatForCausalLM has not bias=True'),
        (dict(logit_cap=5.0), 'logit_cap=5.0'),
    ],
)
def test_a_network_without_a_home_is_refused_by_its_knobs(knobs, named, tmp_path):
    with pytest.raises(ValueError, match='no architecture of transformers') as e:
        to_transformers(scrambled(**knobs), None, str(tmp_path / 'hf'))
    assert named in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(activation_function='relu'), 'activation_function='),
        (dict(n_inner=50), 'n_inner=50'),
        (dict(model_type='bart'), 'bart'),
    ],
)
def test_another_network_is_not_taken_for_gpt2(change, message, tmp_path):
    to_transformers(scrambled(), None, str(tmp_path / 'hf'))
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match='cannot load .*' + message):
        from_pretrained(str(tmp_path / 'hf'))


def test_a_run_goes_out_by_one_command_and_back_by_another(project, trained, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / 'hf'
    project.run('convert.py', '--init_from=out-trained', f'--output={out}')
    card = (out / 'README.md').read_text()
    assert 'GPT2LMHeadModel' in card and 'validation loss' in card and '| dataset | tiny |' in card
    model, loaded = open_model(str(project.path / 'out-trained'))
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    idx = torch.randint(model.config.vocab_size, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model.eval()(idx, idx)[0], rtol=0, atol=1e-4)
    project.run('convert.py', f'--init_from={out}', f'--output={tmp_path}/back', '--to=flatgpt')
    assert (
        len(
            project.run(
                'sample.py',
                f'--out_dir={tmp_path}/back',
                '--device=cpu',
                '--start=to',
                '--num_samples=1',
                '--max_new_tokens=5',
            ).stdout
        )
        > 5
    )
    assert (
        len(
            project.run(
                'sample.py',
                f'--init_from={out}',
                '--device=cpu',
                '--start=to',
                '--num_samples=1',
                '--max_new_tokens=5',
            ).stdout
        )
        > 5
    )


@pytest.mark.parametrize('knobs', [dict(), MODERN])
def test_exported_weights_without_their_padding_are_trained_on(knobs, project, tmp_path):
    hf, out = tmp_path / 'hf', tmp_path / 'out'
    meta = make_meta('train', 300, [TEXT * 5])
    to_transformers(scrambled(vocab_size=320, **knobs), meta, str(hf))
    (tmp_path / 'text.txt').write_text(TEXT * 200, encoding='utf-8')
    name = f'again{len(knobs)}'
    project.run(
        'data/text/prepare.py',
        f'--input={tmp_path}/text.txt',
        f'--tokenizer={hf}',
        f'--dataset={name}',
    )
    project.run(
        'train.py',
        '--device=cpu',
        '--compile=False',
        f'--dataset={name}',
        f'--init_from={hf}',
        f'--out_dir={out}',
        '--block_size=16',
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--eval_iters=2',
        '--max_iters=3',
    )
    assert open_model(str(out))[0].config.vocab_size == meta['vocab_size']
    project.run(
        'sample.py',
        f'--out_dir={out}',
        '--device=cpu',
        '--start=To',
        '--num_samples=1',
        '--max_new_tokens=5',
    )


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--init_from=out-trained'], 'must be a new folder'),
        (['--init_from=out-trained', '--output=data'], 'must be a new folder'),
        (['--init_from=out-trained', '--output=no/where'], 'is not there'),
        (['--init_from=nowhere', '--output=x'], 'nowhere not found'),
        (['--init_from=out-trained', '--output=x', '--to=gguf'], "to='gguf' is none of"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(project, trained, flags, message):
    assert message in project.error('convert.py', *flags) and not (project.path / 'x').exists()


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits of file sizes, and /proc')
@pytest.mark.parametrize('to', ['transformers', 'flatgpt'])
def test_a_disk_that_does_not_take_it_is_one_line_and_nothing_stays(project, trained, tmp_path, to):
    flags = ['convert.py', '--init_from=out-trained', f'--to={to}']
    limited = 'ulimit -f 8; exec "$@"'  # in KiB: small files only
    launcher = ['bash', '-c', limited, 'bash', sys.executable]
    done = project.run(*flags, f'--output={tmp_path}/full', launcher=launcher, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f'error: {tmp_path}/full cannot be written: ')
    assert 'File too large' in lines[0]
    assert not list(tmp_path.iterdir())
    line = project.error(*flags, '--output=/proc/hf')
    assert '/proc/hf cannot be made: No such file or directory' in line
    (tmp_path / 'link').symlink_to('nowhere')
    assert 'must be a new folder' in project.error(*flags, f'--output={tmp_path}/link')
    project.run(*flags, f'--output={tmp_path}/full/')  # and now it is taken


def test_special_tokens_of_tiktoken_keep_their_ids(monkeypatch):
    """As in cl100k_base: with ids between the last word and the first special token that stand for nothing."""
    import tiktoken
    import tokenizers

    bpe = tiktoken.Encoding(
        'gaps',
        pat_str=r'\w+|\W',
        mergeable_ranks={**{bytes([i]): i for i in range(256)}, b'to': 256, b'be': 257},
        special_tokens={'<|fim_prefix|>': 262, '<|endoftext|>': 260},
    )
    for module in ('support.hf', 'data.tokenizer'):
        monkeypatch.setattr(f'{module}.tiktoken_encoding', lambda name: bpe)
    meta = {'tokenizer': 'tiktoken', 'name': 'gaps', 'vocab_size': 263}
    files, own = tokenizer_files(meta, 64), from_meta(meta)
    tokenizer = tokenizers.Tokenizer.from_str(files['tokenizer.json'])
    assert tokenizer.encode(TEXT).ids == own.encode(TEXT)
    assert own.eot == tokenizer.token_to_id('<|endoftext|>') == 260
    assert json.loads(files['tokenizer_config.json'])['eos_token'] == '<|endoftext|>'
    text = tokenizer.decode([256, 260, 262], skip_special_tokens=False)
    assert text == own.decode([256, 260, 262]) == 'to<|endoftext|><|fim_prefix|>'
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(263))  # a name for each, for readers that count them
    assert tokenizer.encode('<|unused 258|>').ids == own.encode('<|unused 258|>')
    assert own.decode([256, 258, 259, 257]) == 'tobe'


@pytest.mark.parametrize(
    'meta',
    [
        char_meta(TEXT),
        make_meta('char', characters=set(TEXT) | {'<|endoftext|>'}),
        make_meta('train', 300, [TEXT * 5]),
    ],
)
def test_a_text_can_be_prepared_for_exported_weights(meta, tmp_path):
    """With --tokenizer=FOLDER, as train.py asks for where the weights had another one."""
    to_transformers(scrambled(vocab_size=320, **MODERN), meta, str(tmp_path / 'hf'))
    again = from_pretrained(str(tmp_path / 'hf'))[1]
    assert same_tokenizer(make_meta(str(tmp_path / 'hf')), again) and from_meta(again).encode(
        TEXT
    ) == from_meta(meta).encode(TEXT)
    assert same_tokenizer(make_meta('gpt2-xl'), GPT2)


def test_a_nanogpt_checkpoint_takes_its_datasets_vocabulary_along(project):
    from transformers import AutoTokenizer

    write_dataset(project.path / 'data' / 'eighteen', 'abcdefghijklmnopqr' * 50)
    for dataset, told in (('eighteen', ''), ('lost', 'without a tokenizer')):
        nanogpt_checkpoint(project.path / f'out-{dataset}-nano', dataset=dataset)
        assert (
            told
            in project.run(
                'convert.py', f'--init_from=out-{dataset}-nano', f'--output={dataset}-hf'
            ).stdout
        )
    assert AutoTokenizer.from_pretrained(project.path / 'eighteen-hf')('abc')['input_ids'] == [
        0,
        1,
        2,
    ]
    assert project.run(
        'sample.py',
        '--init_from=eighteen-hf',
        '--start=abc',
        '--num_samples=1',
        '--max_new_tokens=3',
    ).stdout.startswith('abc')
