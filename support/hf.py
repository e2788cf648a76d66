"""Weights in the formats of transformers, both directions."""

import os
import shutil
import sys

import torch

from data.make_tokenizer import GPT2_SIZES, hub_meta
from data.tokenizer import from_meta
from model import GPT, GPTConfig
from support.errors import UserError
from support.files import new_folder
from support.hf_tokenizer import tokenizer_files
from support.memory import NoInit

# our settings for the two architectures; other settings are free
GPT2_SETTINGS = dict(  # bias is free: GPT2LMHeadModel has biases, and gets zeros for bias=False
    pos='learned',
    norm='layernorm',
    activation='gelu',
    qk_norm=False,
    tie_embeddings=True,
    embed_norm=False,
    logit_cap=0.0,
    n_kv_head=None,
    token_shift=False,
    prefix_lm=False,
)
NANOCHAT_SETTINGS = dict(
    pos='rotary',
    norm='rmsnorm',
    activation='relu2',
    qk_norm=True,
    tie_embeddings=False,
    embed_norm=True,
    token_shift=False,
    prefix_lm=False,
    bias=False,
)


# -----------------------------------------------------------------------------
# both directions
def tensor_pairs(kind, theirs, ours, n_layer):
    """
    Pairs (their tensor, our tensor) of two state dicts, of the same shape, so that one can be
    copied into the other. kind: 'gpt2' or 'nanochat', transformers' model_type
    """
    if kind == 'gpt2':
        return gpt2_pairs(theirs, ours)
    return nanochat_pairs(theirs, ours, n_layer)


def gpt2_pairs(theirs, ours):
    for name, p in ours.items():  # the names are the same; theirs may have more biases
        if '.c_' in name and p.dim() == 2:  # their Conv1D keeps its matrix as (in, out)
            yield theirs[name].t(), p
        else:
            yield theirs[name], p


def nanochat_pairs(theirs, ours, n_layer):
    yield theirs['model.embed_tokens.weight'], ours['transformer.wte.weight']
    yield theirs['lm_head.weight'], ours['lm_head.weight']
    for i in range(n_layer):
        layer, block = f'model.layers.{i}', f'transformer.h.{i}'
        qkv = [theirs[f'{layer}.self_attn.{letter}_proj.weight'] for letter in 'qkv']
        yield from zip(qkv, ours[f'{block}.attn.c_attn.weight'].split([len(p) for p in qkv]))
        yield theirs[f'{layer}.self_attn.o_proj.weight'], ours[f'{block}.attn.c_proj.weight']
        yield theirs[f'{layer}.mlp.fc1.weight'], ours[f'{block}.mlp.c_fc.weight']
        yield theirs[f'{layer}.mlp.fc2.weight'], ours[f'{block}.mlp.c_proj.weight']


def quiet():
    """Silence the messages and progress bars of the hub's libraries, except for downloads."""
    import logging

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
    disable_progress_bar()
    enable_progress_bars()  # of downloads, which the line above disables too


# -----------------------------------------------------------------------------
# in
def from_pretrained(name, dropout=0.0):
    """
    (model, meta of its tokenizer or None) from a GPT2LMHeadModel or a NanoChatForCausalLM.

    name: a folder in the format of transformers, or a name of the hub; GPT-2 in all sizes, and
        models fine-tuned from it
    Raises UserError if it cannot be loaded, or is another kind of network.
    """
    if name not in GPT2_SIZES and '/' not in name and not os.path.isdir(name):
        raise UserError(f'{name!r} is neither a local folder nor one of {", ".join(GPT2_SIZES)}')
    kind, sizes, weights = load_theirs(name)
    with NoInit():
        model = GPT(GPTConfig(**sizes, dropout=dropout))
    for theirs, ours in tensor_pairs(kind, weights, model.state_dict(), model.config.n_layer):
        ours.copy_(theirs)
    return model, tokenizer_of(name)


def load_theirs(name):
    """(model_type, GPTConfig's arguments, state dict) of weights in the format of transformers."""
    from transformers import AutoConfig, GPT2LMHeadModel, NanoChatForCausalLM

    quiet()
    is_local = os.path.isdir(name)
    if not is_local and sys.stderr.isatty():  # this takes minutes, or seconds if it is cached
        print(f'asking the Hugging Face hub for {name} ...', file=sys.stderr, flush=True)
    try:
        hf = AutoConfig.from_pretrained(name)
        if hf.model_type == 'gpt2':
            architecture, sizes = GPT2LMHeadModel, gpt2_config(hf)
        elif hf.model_type == 'nanochat':
            architecture, sizes = NanoChatForCausalLM, nanochat_config(hf)
        else:
            raise UserError(f'it is a {hf.model_type}, not a gpt2 or nanochat')
        model = architecture.from_pretrained(name, dtype=torch.float32)
    except Exception as e:  # the hub's client and safetensors raise many types
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        if not is_local and name not in GPT2_SIZES:
            reason = f'no such file or folder is here, and from the hub: {reason}'
        raise UserError(f'cannot load {name}: {reason}') from e
    return hf.model_type, sizes, model.state_dict()


def gpt2_config(hf):
    """GPTConfig's arguments for a GPT2Config. Raises UserError for options that GPT lacks."""
    supported = dict(
        activation_function='gelu_new',
        scale_attn_weights=True,
        tie_word_embeddings=True,
        layer_norm_epsilon=1e-5,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    for name, value in supported.items():
        if getattr(hf, name, value) != value:
            raise UserError(f'it has {name}={getattr(hf, name)!r}, only {value!r} is supported')
    if hf.n_inner not in (None, 4 * hf.n_embd):
        raise UserError(f'it has n_inner={hf.n_inner}, which is not 4 * {hf.n_embd}')
    return dict(
        block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        n_layer=hf.n_layer,
        n_head=hf.n_head,
        n_embd=hf.n_embd,
        bias=True,
    )


def nanochat_config(hf):
    """GPTConfig's arguments for a NanoChatConfig. Raises UserError for options that GPT lacks."""
    rope = hf.rope_parameters or {}
    for name, value, supported in (
        ('hidden_act', hf.hidden_act, 'relu2'),
        ('attention_bias', hf.attention_bias, False),
        ('intermediate_size', hf.intermediate_size, 4 * hf.hidden_size),
        ('tie_word_embeddings', hf.tie_word_embeddings, False),
        ('rms_norm_eps', hf.rms_norm_eps, 1e-6),
        ('rope_theta', rope.get('rope_theta', 10000.0), 10000.0),
        ('rope_type', rope.get('rope_type', 'default'), 'default'),
    ):
        if value != supported:
            raise UserError(f'it has {name}={value!r}, only {supported!r} is supported')
    n_head, n_kv_head = hf.num_attention_heads, hf.num_key_value_heads
    return dict(
        block_size=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
        n_layer=hf.num_hidden_layers,
        n_head=n_head,
        n_embd=hf.hidden_size,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        logit_cap=hf.final_logit_softcapping or 0.0,
        **NANOCHAT_SETTINGS,
    )


def tokenizer_of(name):
    """The meta of the tokenizer beside weights in the format of transformers, or None."""
    files = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json')
    if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, file)) for file in files):
        return None
    return hub_meta(name)


# -----------------------------------------------------------------------------
# out
def to_transformers(model, meta, folder, figures=None):
    """
    Write `model` (a GPT), the tokenizer of `meta`, if any, a generation config and a model card to
    a new folder, which AutoModelForCausalLM and AutoTokenizer load. The embedding is cut to the
    tokenizer's number of ids, because other readers refuse more.

    figures: facts about the training for the model card, a dict
    Raises UserError if neither GPT2LMHeadModel nor NanoChatForCausalLM has such a network.
    """
    from transformers import GenerationConfig

    quiet()
    cfg, ours = model.config, model.state_dict()
    kind = kind_of(cfg)
    tokenizer = from_meta(meta) if meta else None
    eot = tokenizer.eot if meta else None
    vocab_size = tokenizer.vocab_size if meta else cfg.vocab_size
    for name in {'transformer.wte.weight', 'lm_head.weight'} & ours.keys():
        ours[name] = ours[name][:vocab_size]  # the rest is padding, never sampled
    new_export = new_gpt2 if kind == 'gpt2' else new_nanochat
    export = new_export(cfg, vocab_size, eot)
    for theirs, p in tensor_pairs(kind, export.state_dict(), ours, cfg.n_layer):
        theirs.copy_(p)
    export.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=200,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
    )
    texts = tokenizer_files(meta, cfg.block_size) if meta else {}
    title = os.path.basename(os.path.abspath(folder))
    texts['README.md'] = model_card(export, title, figures or {})
    with new_folder(folder) as partial:
        export.save_pretrained(partial)
        for name, text in texts.items():
            with open(os.path.join(partial, name), 'w', encoding='utf-8') as f:
                f.write(text)
        for name in os.listdir(partial):  # safetensors makes files that only their owner can read
            shutil.copymode(os.path.join(partial, 'README.md'), os.path.join(partial, name))


def kind_of(cfg):
    """transformers' model_type for `cfg`, a GPTConfig. Raises UserError if there is none."""
    gpt2, nanochat = differences(cfg, GPT2_SETTINGS), differences(cfg, NANOCHAT_SETTINGS)
    if gpt2 and nanochat:
        raise UserError(
            'transformers has no architecture for this network: '
            f'GPT2LMHeadModel does not support {gpt2}; '
            f'NanoChatForCausalLM does not support {nanochat}'
        )
    return 'nanochat' if gpt2 else 'gpt2'


def differences(cfg, settings):
    """The settings of `cfg`, a GPTConfig, that are not as in the dict `settings`, as text."""
    found = []
    for name, value in settings.items():
        ours = getattr(cfg, name)
        if name == 'n_kv_head' and ours == cfg.n_head:
            continue  # means the same as None
        if ours != value:
            found.append(f'{name}={ours!r}')
    return ', '.join(found)


def new_gpt2(cfg, vocab_size, eot):
    """A GPT2LMHeadModel with the sizes of `cfg`, a GPTConfig; its biases are zeros."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_positions=cfg.block_size,
        n_ctx=cfg.block_size,  # for llama.cpp
        vocab_size=vocab_size,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_embd=cfg.n_embd,
        n_inner=4 * cfg.n_embd,
        resid_pdrop=cfg.dropout,
        embd_pdrop=cfg.dropout,
        attn_pdrop=cfg.dropout,
        bos_token_id=eot,
        eos_token_id=eot,
    )
    return GPT2LMHeadModel(config)


def new_nanochat(cfg, vocab_size, eot):
    """A NanoChatForCausalLM with the sizes of `cfg`, a GPTConfig."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(
        max_position_embeddings=cfg.block_size,
        vocab_size=vocab_size,
        num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_kv_head or cfg.n_head,
        hidden_size=cfg.n_embd,
        intermediate_size=4 * cfg.n_embd,
        final_logit_softcapping=cfg.logit_cap or None,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
    )
    return NanoChatForCausalLM(config)


def model_card(model, title, figures):
    """A README.md for the hub: what the model is, how to load it, facts about its training."""
    rows = ''.join(f'| {key} | {value} |\n' for key, value in figures.items())
    return f'''---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A {type(model).__name__} of {model.num_parameters() / 1e6:.2f}M parameters, trained with flatgpt.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained('{title}')
tokenizer = AutoTokenizer.from_pretrained('{title}')
tokens = model.generate(**tokenizer('The', return_tensors='pt'), max_new_tokens=200)
print(tokenizer.decode(tokens[0]))
```

| training | |
|---|---|
{rows}'''
