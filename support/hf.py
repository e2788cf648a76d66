"""Weights and tokenizers in the formats of transformers, both directions."""

import contextlib
import json
import os
import shutil
import sys
import tempfile

import torch

from configurator import fail
from data.tokenizer import GPT2_SIZES, from_meta, gpt2_encoding, hub_meta, tiktoken_encoding
from model import GPT, GPTConfig
from support.files import partial_name

# what each architecture of transformers is, in our knobs; the rest is free. Its biases are ours too, where bias=False has zeros
GPT2_KNOBS = dict(
    pos='learned',
    norm='layernorm',
    activation='gelu',
    qk_norm=False,
    tie_embeddings=True,
    embed_norm=False,
    logit_cap=0.0,
    n_kv_head=None,
)
NANOCHAT_KNOBS = dict(
    pos='rotary',
    norm='rmsnorm',
    activation='relu2',
    qk_norm=True,
    tie_embeddings=False,
    embed_norm=True,
    bias=False,
)


def gpt2_names(n_layer):
    """Which of GPT2LMHeadModel's parameters is which of ours, and whether it is kept (in, out) there: [(theirs, ours, bool)]."""
    names = ['wte.weight', 'wpe.weight', 'ln_f.weight', 'ln_f.bias'] + [
        f'h.{i}.{name}.{kind}'
        for i in range(n_layer)
        for kind in ('weight', 'bias')
        for name in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
    ]
    return [
        (f'transformer.{name}', f'transformer.{name}', '.c_' in name and name.endswith('weight'))
        for name in names
    ]


def nanochat_names(n_layer):
    """Which of NanoChatForCausalLM's parameters are which of ours: [(theirs, ours)]; several of theirs stand below each other in one."""
    return [
        (['model.embed_tokens.weight'], 'transformer.wte.weight'),
        (['lm_head.weight'], 'lm_head.weight'),
    ] + [
        ([f'model.layers.{i}.{name}.weight' for name in theirs], f'transformer.h.{i}.{ours}.weight')
        for i in range(n_layer)
        for theirs, ours in (
            (['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], 'attn.c_attn'),
            (['self_attn.o_proj'], 'attn.c_proj'),
            (['mlp.fc1'], 'mlp.c_fc'),
            (['mlp.fc2'], 'mlp.c_proj'),
        )
    ]


# -----------------------------------------------------------------------------
# in
def from_pretrained(name, override_args=None):
    """
    (model, meta of its tokenizer or None) from a GPT2LMHeadModel or a NanoChatForCausalLM.

    name: a folder in the format of transformers, or a name of the hub; all of GPT-2's sizes and what was fine-tuned from them
    override_args: dropout and attn_dropout at most; everything else is as it was trained
    Raises ValueError where it cannot be reached, or is another network.
    """
    assert set(override_args or {}) <= {'dropout', 'attn_dropout'}, (
        f'cannot override {override_args} of pretrained weights'
    )
    if name not in GPT2_SIZES and '/' not in name and not os.path.isdir(name):
        raise ValueError(f'{name!r} is neither a local folder nor one of {", ".join(GPT2_SIZES)}')
    from transformers import AutoConfig, GPT2LMHeadModel, NanoChatForCausalLM

    quiet()
    kinds = {
        'gpt2': (GPT2LMHeadModel, gpt2_config),
        'nanochat': (NanoChatForCausalLM, nanochat_config),
    }
    if not os.path.isdir(name) and sys.stderr.isatty():
        print(
            f'asking the Hugging Face hub for {name} ...', file=sys.stderr, flush=True
        )  # minutes, or seconds where it is cached
    try:
        hf = AutoConfig.from_pretrained(name)
        if hf.model_type not in kinds:
            raise ValueError(f'it is a {hf.model_type}, not one of {", ".join(kinds)}')
        load, convert = kinds[hf.model_type]
        config = convert(hf)
        theirs = load.from_pretrained(name, dtype=torch.float32).state_dict()
    except Exception as e:  # the hub's client and safetensors raise many kinds
        nowhere = (
            ''
            if os.path.isdir(name) or name in GPT2_SIZES
            else 'no such file or folder is here, and from the hub: '
        )
        raise ValueError(
            f'cannot load {name}: {nowhere}{(str(e).strip() or type(e).__name__).splitlines()[0]}'
        ) from e
    model = GPT(GPTConfig(**config, **(override_args or {})))
    weights = model.state_dict()
    with torch.no_grad():
        if hf.model_type == 'gpt2':
            for from_name, to_name, turned in gpt2_names(hf.n_layer):
                weights[to_name].copy_(theirs[from_name].t() if turned else theirs[from_name])
        else:
            for from_names, to_name in nanochat_names(hf.num_hidden_layers):
                weights[to_name].copy_(torch.cat([theirs[from_name] for from_name in from_names]))
    return model, tokenizer_of(name)


def quiet():
    """Keep what the libraries of the hub print of their own accord from between our lines."""
    import logging

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
    disable_progress_bar()
    enable_progress_bars()  # of downloads, which that took away too


def gpt2_config(hf):
    """GPTConfig's arguments for a GPT2Config, a ValueError where ours has no such network."""
    for knob, ours in dict(
        activation_function='gelu_new',
        scale_attn_weights=True,
        tie_word_embeddings=True,
        layer_norm_epsilon=1e-5,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    ).items():
        if getattr(hf, knob, ours) != ours:
            raise ValueError(f'it has {knob}={getattr(hf, knob)!r}, which GPT-2 itself has not')
    if hf.n_inner not in (None, 4 * hf.n_embd):
        raise ValueError(f'it has n_inner={hf.n_inner}, which is not 4 * {hf.n_embd}')
    return dict(
        block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        n_layer=hf.n_layer,
        n_head=hf.n_head,
        n_embd=hf.n_embd,
        bias=True,
    )


def nanochat_config(hf):
    """GPTConfig's arguments for a NanoChatConfig, a ValueError where ours has no such network."""
    rope = hf.rope_parameters or {}
    for knob, value, ours in (
        ('hidden_act', hf.hidden_act, 'relu2'),
        ('attention_bias', hf.attention_bias, False),
        ('intermediate_size', hf.intermediate_size, 4 * hf.hidden_size),
        ('tie_word_embeddings', hf.tie_word_embeddings, False),
        ('rms_norm_eps', hf.rms_norm_eps, 1e-6),
        ('rope_theta', rope.get('rope_theta', 10000.0), 10000.0),
        ('rope_type', rope.get('rope_type', 'default'), 'default'),
    ):
        if value != ours:
            raise ValueError(f'it has {knob}={value!r}, only {ours!r} has a home here')
    heads = hf.num_key_value_heads
    return dict(
        block_size=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
        n_layer=hf.num_hidden_layers,
        n_head=hf.num_attention_heads,
        n_embd=hf.hidden_size,
        n_kv_head=None if heads == hf.num_attention_heads else heads,
        logit_cap=hf.final_logit_softcapping or 0.0,
        **NANOCHAT_KNOBS,
    )


def tokenizer_of(name):
    """The meta of the tokenizer that comes with weights in the format of transformers; None where none comes."""
    files = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json')
    if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, file)) for file in files):
        return None
    return hub_meta(name)


# -----------------------------------------------------------------------------
# out
@contextlib.contextmanager
def new_folder(path):
    """
    A folder to write to that becomes `path` at the end: there whole, or not at all. Ends in one
    line, with exit code 2 where no folder can be made and 1 where the disk does not take the files.
    """
    from safetensors import SafetensorError

    partial = partial_name(os.path.abspath(path))  # which has no slash at its end
    try:
        os.mkdir(partial)
    except OSError as e:
        raise OSError(f'{path} cannot be made: {e.strerror}') from e
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as e:
        cause = e
        while cause.__context__ and not getattr(cause, 'strerror', None):
            cause = cause.__context__  # torch wraps what the disk said
        fail(f'{path} cannot be written: {getattr(cause, "strerror", None) or cause}', 1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_transformers(model, meta, folder, figures=None):
    """
    Write `model` (a GPT), the tokenizer of `meta` where there is one, a generation config and a model card to a new folder that
    AutoModelForCausalLM and AutoTokenizer load. The embedding goes out
    with as many rows as the tokenizer has ids, since other readers refuse more.
    figures: what the card tells of the training, a dict

    Raises ValueError, naming the knobs, for a network that neither GPT2LMHeadModel nor NanoChatForCausalLM is.
    """
    from transformers import (
        GenerationConfig,
        GPT2Config,
        GPT2LMHeadModel,
        NanoChatConfig,
        NanoChatForCausalLM,
    )

    quiet()
    cfg, ours = model.config, {name: p.detach().cpu() for name, p in model.state_dict().items()}
    differs = {
        home: [
            f'{name}={getattr(cfg, name)!r}'
            for name, value in knobs.items()
            if getattr(cfg, name) != value
            and not (name == 'n_kv_head' and cfg.n_kv_head == cfg.n_head)
        ]
        for home, knobs in (
            ('GPT2LMHeadModel', GPT2_KNOBS),
            ('NanoChatForCausalLM', NANOCHAT_KNOBS),
        )
    }
    if all(differs.values()):
        reasons = '; '.join(f'{home} has not {", ".join(knobs)}' for home, knobs in differs.items())
        raise ValueError(f'no architecture of transformers is this network: {reasons}')
    tokenizer = from_meta(meta) if meta else None
    eot = tokenizer.eot if meta else None
    vocab_size = tokenizer.vocab_size if meta else cfg.vocab_size
    for name in {'transformer.wte.weight', 'lm_head.weight'} & ours.keys():
        ours[name] = ours[name][:vocab_size]  # the rest is padding, never sampled
    theirs = {}
    if not differs['GPT2LMHeadModel']:
        sizes = dict(
            n_positions=cfg.block_size,
            n_ctx=cfg.block_size,  # n_ctx: for llama.cpp
            vocab_size=vocab_size,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            n_embd=cfg.n_embd,
            n_inner=4 * cfg.n_embd,
        )
        attn_dropout = cfg.dropout if cfg.attn_dropout is None else cfg.attn_dropout
        drop = dict(resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=attn_dropout)
        export = GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=eot, eos_token_id=eot))
        for to_name, from_name, turned in gpt2_names(cfg.n_layer):
            p = ours.get(from_name)
            theirs[to_name] = (
                torch.zeros(export.state_dict()[to_name].shape)
                if p is None
                else p.t()
                if turned
                else p
            )
        theirs['lm_head.weight'] = ours['transformer.wte.weight']
    else:
        sizes = dict(
            max_position_embeddings=cfg.block_size,
            vocab_size=vocab_size,
            num_hidden_layers=cfg.n_layer,
            num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head or cfg.n_head,
            hidden_size=cfg.n_embd,
            intermediate_size=4 * cfg.n_embd,
        )
        special = dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
        export = NanoChatForCausalLM(
            NanoChatConfig(**sizes, **special, final_logit_softcapping=cfg.logit_cap or None)
        )
        kv = (cfg.n_kv_head or cfg.n_head) * (cfg.n_embd // cfg.n_head)
        for to_names, from_name in nanochat_names(cfg.n_layer):
            parts = (
                ours[from_name].split((cfg.n_embd, kv, kv))
                if len(to_names) > 1
                else [ours[from_name]]
            )
            theirs.update(zip(to_names, parts))
    export.load_state_dict(theirs)
    export.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=200,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
    )
    texts = tokenizer_files(meta, cfg.block_size) if meta else {}
    name = os.path.basename(os.path.abspath(folder))
    texts['README.md'] = model_card(export, type(export).__name__, name, figures or {})
    with new_folder(folder) as partial:
        export.save_pretrained(partial)
        for name, text in texts.items():
            with open(os.path.join(partial, name), 'w', encoding='utf-8') as f:
                f.write(text)
        for name in os.listdir(partial):  # safetensors' files are readable by their owner only
            shutil.copymode(os.path.join(partial, 'README.md'), os.path.join(partial, name))


def tokenizer_files(meta, block_size):
    """The tokenizer of a meta in the format of the package tokenizers: {file: text}."""
    import base64

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    kind, eot = meta.get('tokenizer'), '<|endoftext|>'
    if kind == 'json':
        bpe = Tokenizer.from_str(meta['json'])
        eot = bpe.id_to_token(meta['eot']) if meta.get('eot') is not None else None
    elif kind == 'byte':
        letters = bytes_to_unicode()
        bpe = Tokenizer(
            models.BPE(vocab={**{letters[i]: i for i in range(256)}, eot: 256}, merges=[])
        )
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.ByteLevel(),
        )
    elif kind in ('gpt2', 'tiktoken'):
        encoding = gpt2_encoding() if kind == 'gpt2' else tiktoken_encoding(meta['name'])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'ranks')
            with open(path, 'wb') as f:
                special = {
                    token.encode(): i for token, i in encoding._special_tokens.items()
                }  # here too: they keep their ids, gaps before them
                f.writelines(
                    base64.b64encode(token) + b' %d\n' % i
                    for token, i in {**encoding._mergeable_ranks, **special}.items()
                )
            bpe = TikTokenConverter(
                vocab_file=path,
                pattern=encoding._pat_str,
                extra_special_tokens=list(encoding._special_tokens),
            ).converted()
    else:  # every character for itself
        bpe = Tokenizer(models.WordLevel(meta['stoi']))
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.Split(Regex('[\\s\\S]'), 'isolated'),
            decoders.Fuse(),
        )
        eot = eot if meta.get('eot') is not None else None
    whole = json.loads(bpe.to_str())
    if isinstance(whole['model']['vocab'], dict):  # readers count them; cl100k_base has gaps
        unused = set(range(from_meta(meta).vocab_size)) - set(bpe.get_vocab().values())
        whole['model']['vocab'].update({f'<|unused {i}|>': i for i in sorted(unused)})
    unknown = whole['model'].get('unk_token')
    if unknown is None or bpe.token_to_id(unknown) is None:
        unknown = eot  # as in GPT-2's own; no text needs it, but CTranslate2 asks for one
    # Until version 5 transformers had no TokenizersBackend, which is its name for this class today.
    config = dict(
        tokenizer_class='PreTrainedTokenizerFast',
        bos_token=eot,
        eos_token=eot,
        unk_token=unknown,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )
    return {
        'tokenizer.json': json.dumps(whole, ensure_ascii=False),
        'tokenizer_config.json': json.dumps(config, ensure_ascii=False, indent=2),
    }


def model_card(model, architecture, name, figures):
    """A README.md for the hub: what it is, how to load it, what is known of its training."""
    known = ''.join(f'| {key} | {value} |\n' for key, value in figures.items())
    return f'''---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {architecture} of {model.num_parameters() / 1e6:.2f}M parameters, trained with flatgpt.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained('{name}'), AutoTokenizer.from_pretrained('{name}')
print(tokenizer.decode(model.generate(**tokenizer('The', return_tensors='pt'), max_new_tokens=200)[0]))
```

| training | |
|---|---|
{known}'''
