import json
import os
import sys

import pytest
import torch
from conftest import write_dataset
from test_model import MODERN
from test_train import nanogpt_checkpoint

from data.bpe import gpt2_encoding
from data.make_tokenizer import make_meta
from data.tokenizer import GPT2, char_meta, from_meta, same_tokenizer
from generate import stream
from model import GPT, GPTConfig
from support.hf import from_pretrained, to_transformers
from support.hf_tokenizer import tokenizer_files
from support.weights import open_model

TEXT = 'To be, or not to be: that is the question.\n\n  Zwölf Boxkämpfer — 漢字 42!\n'
CHARS, CHARS_AND_EOT = char_meta(TEXT), make_meta('char', characters={*TEXT, '<|endoftext|>'})
BYTES, TRAINED = make_meta('byte'), make_meta('train', 300, [TEXT * 5])
SMALL = dict(block_size=24, vocab_size=64, n_layer=2, n_head=4, n_embd=32)


def scrambled(**knobs):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SMALL, **knobs})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


NETWORKS = [
    dict(),
    dict(bias=False),
    dict(dropout=0.1),
    MODERN,
    {**MODERN, 'n_kv_head': 2},
    {**MODERN, 'logit_cap': 0.0},
]


@pytest.mark.parametrize('knobs', NETWORKS)
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


@pytest.mark.parametrize('meta', [CHARS, CHARS_AND_EOT, BYTES, TRAINED])
def test_the_tokenizer_goes_along_and_comes_back(meta, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = scrambled(vocab_size=320, **MODERN)
    to_transformers(ours, meta, str(tmp_path / 'hf'))
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / 'hf'), from_meta(meta)
    assert tokenizer(TEXT)['input_ids'] == own.encode(TEXT)
    assert tokenizer.decode(own.encode(TEXT)) == TEXT
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

    to_transformers(scrambled(vocab_size=CHARS['vocab_size']), CHARS, str(tmp_path / 'hf'))
    ids = AutoTokenizer.from_pretrained(tmp_path / 'hf')(TEXT)['input_ids']
    assert ids == from_meta(CHARS).encode(TEXT)


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


def test_the_files_have_what_other_readers_need(gpt2):
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
        meta = {'byte': BYTES, 'trained': TRAINED, 'char': CHARS_AND_EOT}[kind]
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
        (dict(pos='alibi'), "GPT2LMHeadModel does not support pos='alibi'"),
        (dict(n_kv_head=2), 'does not support n_kv_head=2'),
        ({**MODERN, 'activation': 'swiglu'}, "activation='swiglu'"),
        ({**MODERN, 'bias': True}, 'NanoChatForCausalLM does not support bias=True'),
        (dict(logit_cap=5.0), 'logit_cap=5.0'),
        (dict(token_shift=True), 'GPT2LMHeadModel does not support token_shift=True'),
        (dict(prefix_lm=True), 'GPT2LMHeadModel does not support prefix_lm=True'),
        ({**MODERN, 'token_shift': True}, 'NanoChatForCausalLM does not support token_shift=True'),
    ],
)
def test_an_unsupported_network_is_refused_by_its_settings(knobs, named, tmp_path):
    with pytest.raises(ValueError, match='transformers has no architecture') as e:
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
    sample = ['sample.py', '--device=cpu', '--start=to', '--num_samples=1', '--max_new_tokens=5']
    for weights in (f'--out_dir={tmp_path}/back', f'--init_from={out}'):
        assert len(project.run(*sample, weights).stdout) > 5


@pytest.mark.parametrize('knobs', [dict(), MODERN])
def test_exported_weights_without_their_padding_are_trained_on(knobs, project, tmp_path):
    hf, out = tmp_path / 'hf', tmp_path / 'out'
    to_transformers(scrambled(vocab_size=320, **knobs), TRAINED, str(hf))
    (tmp_path / 'text.txt').write_text(TEXT * 200, encoding='utf-8')
    dataset = f'--dataset=again{len(knobs)}'
    text = f'--input={tmp_path}/text.txt'
    project.run('data/text/prepare.py', text, f'--tokenizer={hf}', dataset)
    flags = ['--device=cpu', '--compile=False', dataset, f'--init_from={hf}', f'--out_dir={out}']
    flags += ['--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=1']
    project.run('train.py', *flags, '--eval_iters=2', '--max_iters=3')
    assert open_model(str(out))[0].config.vocab_size == TRAINED['vocab_size']
    flags = ['--device=cpu', '--start=To', '--num_samples=1', '--max_new_tokens=5']
    project.run('sample.py', f'--out_dir={out}', *flags)


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
def test_a_full_disk_is_one_line_and_leaves_nothing(project, trained, tmp_path, to):
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
    assert '/proc/hf cannot be created: No such file or directory' in line
    (tmp_path / 'link').symlink_to('nowhere')
    assert 'must be a new folder' in project.error(*flags, f'--output={tmp_path}/link')
    project.run(*flags, f'--output={tmp_path}/full/')  # and now it is taken


def test_special_tokens_of_tiktoken_keep_their_ids(monkeypatch):
    """As in cl100k_base, where some ids before the first special token are unused."""
    import tiktoken
    import tokenizers

    bpe = tiktoken.Encoding(
        'gaps',
        pat_str=r'\w+|\W',
        mergeable_ranks={**{bytes([i]): i for i in range(256)}, b'to': 256, b'be': 257},
        special_tokens={'<|fim_prefix|>': 262, '<|endoftext|>': 260},
    )
    for module in ('support.hf_tokenizer', 'data.tokenizer'):
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


@pytest.mark.parametrize('meta', [CHARS, CHARS_AND_EOT, TRAINED])
def test_a_text_can_be_prepared_for_exported_weights(meta, tmp_path):
    """With --tokenizer=FOLDER, which train.py suggests if the weights have another tokenizer."""
    to_transformers(scrambled(vocab_size=320, **MODERN), meta, str(tmp_path / 'hf'))
    again = from_pretrained(str(tmp_path / 'hf'))[1]
    assert same_tokenizer(make_meta(str(tmp_path / 'hf')), again)
    assert from_meta(again).encode(TEXT) == from_meta(meta).encode(TEXT)
    assert same_tokenizer(make_meta('gpt2-xl'), GPT2)


def test_a_nanogpt_checkpoint_takes_its_datasets_vocabulary_along(project):
    from transformers import AutoTokenizer

    write_dataset(project.path / 'data' / 'eighteen', 'abcdefghijklmnopqr' * 50)
    for dataset, printed in (('eighteen', ''), ('lost', 'without a tokenizer')):
        nanogpt_checkpoint(project.path / f'out-{dataset}-nano', dataset=dataset)
        flags = [f'--init_from=out-{dataset}-nano', f'--output={dataset}-hf']
        assert printed in project.run('convert.py', *flags).stdout
    tokenizer = AutoTokenizer.from_pretrained(project.path / 'eighteen-hf')
    assert tokenizer('abc')['input_ids'] == [0, 1, 2]
    flags = ['--start=abc', '--num_samples=1', '--max_new_tokens=3']
    text = project.run('sample.py', '--init_from=eighteen-hf', *flags).stdout
    assert text.startswith('abc')
