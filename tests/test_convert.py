import json

import pytest
import torch

from checkpoint import open_model
from conftest import write_dataset
from convert import fast_tokenizer, from_pretrained, to_transformers
from data.tokenizer import GPT2, char_meta, from_meta, make_meta, same_tokenizer
from model import GPT, GPTConfig
from test_model import MODERN
from test_train import nanogpt_checkpoint

TEXT = 'To be, or not to be: that is the question.\n\n  Zwölf Boxkämpfer — 漢字 42!\n'
SMALL = dict(block_size=24, vocab_size=64, n_layer=2, n_head=4, n_embd=32)


def scrambled(**knobs):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SMALL, **knobs})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


HOMES = [dict(), dict(bias=False), dict(dropout=0.1), MODERN, {**MODERN, 'n_kv_head': 2}, {**MODERN, 'logit_cap': 0.0}]


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
        assert not weights['transformer.h.0.mlp.c_fc.bias'].any() # their GPT-2 has biases


@pytest.mark.parametrize('meta', [char_meta(TEXT), make_meta('char', characters=set(TEXT) | {'<|endoftext|>'}), make_meta('byte'),
                                  make_meta('train', 300, [TEXT * 5])])
def test_the_tokenizer_goes_along_and_comes_back(meta, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ours = scrambled(vocab_size=320, **{k: v for k, v in MODERN.items()})
    to_transformers(ours, meta, str(tmp_path / 'hf'))
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / 'hf'), from_meta(meta)
    assert tokenizer(TEXT)['input_ids'] == own.encode(TEXT) and tokenizer.decode(own.encode(TEXT)) == TEXT
    assert tokenizer.eos_token_id == own.eot
    again = from_pretrained(str(tmp_path / 'hf'))[1]
    assert from_meta(again).encode(TEXT) == own.encode(TEXT) and from_meta(again).eot == own.eot
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    made = model.generate(torch.tensor([own.encode('To be')]), max_new_tokens=15)
    assert made.max() < own.vocab_size # ids that stand for nothing are suppressed


def test_a_classic_model_with_a_character_vocabulary_loads_by_auto_classes(tmp_path):
    from transformers import AutoTokenizer
    meta = char_meta(TEXT)
    to_transformers(scrambled(vocab_size=meta['vocab_size']), meta, str(tmp_path / 'hf'))
    assert AutoTokenizer.from_pretrained(tmp_path / 'hf')(TEXT)['input_ids'] == from_meta(meta).encode(TEXT)


def test_gpt2s_own_tokenizer_is_recognised(tmp_path):
    try:
        fast = fast_tokenizer(GPT2, 1024)
    except OSError:
        pytest.skip('GPT-2 vocabulary not on this machine')
    text = TEXT + "It's   spaced, isn't it? <|endoftext|>"
    assert fast(text)['input_ids'] == from_meta(GPT2).encode(text)
    to_transformers(scrambled(vocab_size=50304, n_embd=8), GPT2, str(tmp_path / 'hf'))
    assert from_pretrained(str(tmp_path / 'hf'))[1] == GPT2
    assert json.loads((tmp_path / 'hf' / 'generation_config.json').read_text())['suppress_tokens'] == list(range(50257, 50304))


@pytest.mark.parametrize('knobs, named', [
    (dict(pos='alibi'), "GPT2LMHeadModel has not pos='alibi'"), (dict(n_kv_head=2), 'has not n_kv_head=2'), ({**MODERN, 'activation': 'swiglu'}, "activation='swiglu'"),
    ({**MODERN, 'bias': True}, 'NanoChatForCausalLM has not bias=True'), (dict(logit_cap=5.0), 'logit_cap=5.0')])
def test_a_network_without_a_home_is_refused_by_its_knobs(knobs, named, tmp_path):
    with pytest.raises(ValueError, match='no architecture of transformers') as e:
        to_transformers(scrambled(**knobs), None, str(tmp_path / 'hf'))
    assert named in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('change, message', [(dict(activation_function='relu'), 'activation_function='), (dict(n_inner=50), 'n_inner=50'), (dict(model_type='bart'), 'bart')])
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
    assert len(project.run('sample.py', f'--out_dir={tmp_path}/back', '--device=cpu', '--start=to', '--num_samples=1', '--max_new_tokens=5').stdout) > 5
    assert len(project.run('sample.py', f'--init_from={out}', '--device=cpu', '--start=to', '--num_samples=1', '--max_new_tokens=5').stdout) > 5


@pytest.mark.parametrize('flags, message', [(['--init_from=out-trained'], 'must be a new folder'), (['--init_from=out-trained', '--output=data'], 'must be a new folder'),
                                            (['--init_from=out-trained', '--output=no/where'], 'is not there'), (['--init_from=nowhere', '--output=x'], 'nowhere not found'),
                                            (['--init_from=out-trained', '--output=x', '--to=gguf'], "to='gguf' is none of")])
def test_bad_input_is_one_line_and_writes_nothing(project, trained, flags, message):
    assert message in project.error('convert.py', *flags) and not (project.path / 'x').exists()


def test_special_tokens_of_tiktoken_keep_their_ids(monkeypatch):
    """As in cl100k_base: with ids between the last word and the first special token that stand for nothing."""
    import tiktoken
    bpe = tiktoken.Encoding('gaps', pat_str=r'\w+|\W', mergeable_ranks={**{bytes([i]): i for i in range(256)}, b'to': 256, b'be': 257},
                            special_tokens={'<|fim_prefix|>': 262, '<|endoftext|>': 260})
    for module in ('convert', 'data.tokenizer'):
        monkeypatch.setattr(f'{module}.tiktoken_encoding', lambda name: bpe)
    meta = {'tokenizer': 'tiktoken', 'name': 'gaps', 'vocab_size': 263}
    tokenizer, own = fast_tokenizer(meta, 64), from_meta(meta)
    assert tokenizer(TEXT)['input_ids'] == own.encode(TEXT) and tokenizer.eos_token_id == own.eot == 260
    assert tokenizer.decode([256, 260, 262]) == own.decode([256, 260, 262]) == 'to<|endoftext|><|fim_prefix|>'
    assert own.decode([256, 258, 259, 257]) == 'tobe'


@pytest.mark.parametrize('meta', [char_meta(TEXT), make_meta('char', characters=set(TEXT) | {'<|endoftext|>'}), make_meta('train', 300, [TEXT * 5])])
def test_a_text_can_be_prepared_for_exported_weights(meta, tmp_path):
    """With --tokenizer=FOLDER, as train.py asks for where the weights had another one."""
    to_transformers(scrambled(vocab_size=320, **MODERN), meta, str(tmp_path / 'hf'))
    again = from_pretrained(str(tmp_path / 'hf'))[1]
    assert same_tokenizer(make_meta(str(tmp_path / 'hf')), again) and from_meta(again).encode(TEXT) == from_meta(meta).encode(TEXT)
    assert same_tokenizer(make_meta('gpt2-xl'), GPT2)


def test_a_nanogpt_checkpoint_takes_its_datasets_vocabulary_along(project):
    from transformers import AutoTokenizer
    write_dataset(project.path / 'data' / 'eighteen', 'abcdefghijklmnopqr' * 50)
    for dataset, told in (('eighteen', ''), ('lost', 'without a tokenizer')):
        nanogpt_checkpoint(project.path / f'out-{dataset}-nano', dataset=dataset)
        assert told in project.run('convert.py', f'--init_from=out-{dataset}-nano', f'--output={dataset}-hf').stdout
    assert AutoTokenizer.from_pretrained(project.path / 'eighteen-hf')('abc')['input_ids'] == [0, 1, 2]
    assert project.run('sample.py', '--init_from=eighteen-hf', '--start=abc', '--num_samples=1', '--max_new_tokens=3').stdout.startswith('abc')
