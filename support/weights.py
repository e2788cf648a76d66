"""A model, new or from weights that are there: their sizes, their tokenizer, LoRA."""

import os
import re
from dataclasses import replace

import torch

from data.tokenizer import dataset_dir, dataset_meta, model_vocab_size, same_tokenizer
from model import GPT, GPTConfig
from support.checkpoint import load


def tokenizer_meta(checkpoint, source, vocab_size):
    """
    The meta of a checkpoint's tokenizer; nanoGPT and PopGPT leave it with the dataset. ValueError
    where it has more ids than the model's vocab_size, or is of a dataset with fewer characters.
    """
    own, dataset = checkpoint.get('meta'), checkpoint.get('config', {}).get('dataset')
    meta = own or dataset_meta(dataset_dir(str(dataset)))
    other = not own and 'stoi' in meta and meta['vocab_size'] < vocab_size
    if other or meta['vocab_size'] > vocab_size:
        raise ValueError(
            f'{source} has {vocab_size} token ids and comes without its tokenizer; '
            f'put the meta.pkl of its dataset into {dataset_dir(str(dataset))}'
        )
    return meta


def is_hub_name(source):
    """Does `source` read like a model of the Hugging Face hub, such as gpt2-xl or owner/name, and not like a file?"""
    return (
        not os.path.exists(source)
        and not source.endswith('.pt')
        and not re.match(r'out([-_/]|$)', source)
        and (
            bool(re.fullmatch(r'gpt2[\w-]*', source))
            or bool(re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source))
        )
    )


def open_model(source, lora_rank=0, **dropouts):
    """
    (model, checkpoint) from a path to a checkpoint, or from weights in the format of transformers: a folder, or a
    name of the hub. For the latter the checkpoint holds no more than the tokenizer's meta, if it is known.
    `dropouts`: today's dropout and attn_dropout, none unless given; lora_rank: see with_lora(), None: as it is.
    """
    if os.path.exists(os.path.join(source, 'config.json')) or is_hub_name(source):
        from support.hf import from_pretrained  # with transformers, which takes seconds to load

        model, meta = from_pretrained(source, dropouts)
        return with_lora(model, lora_rank), {'meta': meta} if meta else {}
    checkpoint = load(source)
    return with_lora(build_model(checkpoint, **dropouts), lora_rank), checkpoint


def with_lora(model, rank):
    """`model` with new corrections of this rank to its blocks' matrices (0: none), unless it has such; others it has are merged into them."""
    if rank is None or model.config.lora_rank == rank:
        return model
    weights = model.state_dict()
    for name, module in model.named_modules():
        if getattr(module, 'lora_rank', 0):
            weights[f'{name}.weight'] = (module.weight + module.lora_b @ module.lora_a).detach()
    model = GPT(replace(model.config, lora_rank=rank))
    model.load_state_dict(
        {name: p for name, p in weights.items() if 'lora_' not in name}, strict=False
    )
    return model


def build_model(checkpoint, dropout=0.0, attn_dropout=None):
    """The GPT that a loaded checkpoint describes, with its weights, on CPU; ValueError where they do not fit."""
    sizes = {
        name: value
        for name, value in checkpoint['model_args'].items()
        if name in GPTConfig.__dataclass_fields__
    }
    layers = {
        name.split('.')[2] for name in checkpoint['model'] if name.startswith('transformer.h.')
    }
    if len(layers) != sizes['n_layer']:
        raise ValueError(
            f'{checkpoint["path"]} refused: its weights do not fit its model_args ({len(layers)} layers)'
        )
    config = GPTConfig(**{**sizes, 'dropout': dropout, 'attn_dropout': attn_dropout})
    with torch.device('meta'):  # before memory is taken for them
        wanted = {name: p.shape for name, p in GPT(config).state_dict().items()}
    found = {name: p.shape for name, p in checkpoint['model'].items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            shapes = [
                tuple(shapes[name]) if name in shapes else 'nothing' for shapes in (found, wanted)
            ]
            raise ValueError(
                f'{checkpoint["path"]} refused: its weights do not fit its model_args ({name}: {shapes[0]} instead of {shapes[1]})'
            )
    model = GPT(config)
    model.load_state_dict(checkpoint['model'])
    return model


def new_model(config, given, meta):
    """A GPT with random weights, of the sizes that the knobs ask for and the vocabulary of the tokenizer's `meta`."""
    if config['lora_rank'] > 0:
        raise ValueError(
            f'lora_rank={config["lora_rank"]} fine-tunes weights that are there: --init_from=gpt2, or a run\'s folder'
        )
    n_head, n_embd = resolve_sizes(
        asked_sizes(config, given), default=(config['n_head'], config['n_embd'])
    )
    vocab_size = config['vocab_size'] if 'vocab_size' in given else model_vocab_size(meta)
    sizes = {**config, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': vocab_size}
    return GPT(GPTConfig(**{name: sizes[name] for name in GPTConfig.__dataclass_fields__}))


def trained_model(init_from, own, config, given, data_dir):
    """
    (model, checkpoint) to train on: of this run's `own` checkpoint if init_from is 'resume', else of other weights. ValueError
    where they have another tokenizer than the dataset in data_dir, or other sizes than files or flags ask for.
    """
    source = own if init_from == 'resume' else init_from
    keep_lora = init_from == 'resume' and 'lora_rank' not in given
    model, checkpoint = open_model(
        source,
        None if keep_lora else config['lora_rank'],
        dropout=config['dropout'],
        attn_dropout=config['attn_dropout'],
    )
    check_tokenizer(checkpoint, source, data_dir)
    fit_sizes(model, asked_sizes(config, given), source, given)
    return model, checkpoint


def asked_sizes(config, given):
    """
    The knobs of the network that files and flags set; given: {name: '--name=value' or 'file:line'}, in the order in which they
    were set last. Of two words for one size, from two files or a file and a flag, the later counts; flags for n_head and d_head
    together take the place of a file's width.
    """
    asked = {
        name: config[name]
        for name in (*GPTConfig.__dataclass_fields__, 'd_head', 'd_model')
        if name in given
    }
    asked = {
        name: value
        for name, value in asked.items()
        if value is not None or name not in ('d_head', 'd_model')
    }  # None is not asked
    order, flags = list(given), {name for name in asked if given[name].startswith('--')}
    origin = lambda name: '--' if name in flags else given[name].rpartition(':')[0]
    for pair in (('d_model', 'n_embd'), ('d_head', 'n_head')):
        if asked.keys() >= set(pair) and origin(pair[0]) != origin(pair[1]):
            del asked[min(pair, key=order.index)]
    if flags >= {'n_head', 'd_head'}:
        asked = {
            name: value
            for name, value in asked.items()
            if name not in ('n_embd', 'd_model') or name in flags
        }
    return asked


def resolve_sizes(asked, default=(12, 768)):
    """
    (n_head, n_embd) from any sufficient subset of n_head, d_head and n_embd in the dict `asked`; d_model is
    another word for n_embd. A ValueError shows the arithmetic of a contradiction. `default` fills in for
    what the subset leaves open.
    """
    n_head, n_embd, d_head, d_model = (
        asked.get(name) for name in ('n_head', 'n_embd', 'd_head', 'd_model')
    )
    if n_embd is not None and d_model is not None and n_embd != d_model:
        raise ValueError(
            f'n_embd={n_embd} and d_model={d_model} are two words for one size; give one of them'
        )
    n_embd = n_embd if n_embd is not None else d_model
    if d_head is not None:
        if n_embd is None:
            n_embd = n_head * d_head if n_head is not None else default[1]
        if d_head < 1:
            raise ValueError(f'd_head={d_head} must be at least 1')
        if n_embd % d_head:
            raise ValueError(
                f'n_embd={n_embd} must be divisible by d_head={d_head}: {n_embd} / {d_head} = {n_embd / d_head:.2f}'
            )
        if n_head is not None and n_head * d_head != n_embd:
            raise ValueError(
                f'n_head={n_head} x d_head={d_head} = {n_head * d_head}, but n_embd={n_embd}; leave one of the three out'
            )
        n_head = n_embd // d_head
    return (n_head if n_head is not None else default[0]), (
        n_embd if n_embd is not None else default[1]
    )


def check_tokenizer(checkpoint, source, data_dir):
    """Refuse weights from `source` that were trained with another tokenizer than that of the dataset in data_dir."""
    theirs, meta = checkpoint.get('meta'), dataset_meta(data_dir)
    ids = checkpoint.get('model_args', {}).get('vocab_size')
    if not os.path.exists(os.path.join(data_dir, 'train.bin')):
        return
    if not theirs and ids and 'stoi' in meta and meta['vocab_size'] != ids:
        raise ValueError(
            f'{source}: weights of {ids} token ids that come without tokenizer, '
            f'{data_dir} has {meta["vocab_size"]}; train on their own dataset'
        )
    if theirs and not same_tokenizer(theirs, meta):
        raise ValueError(
            f'{source}: the weights were trained with another tokenizer than that of {data_dir}; prepare the text with theirs: '
            f'python data/text/prepare.py --input=... --tokenizer={source} --dataset=...'
        )


def fit_sizes(model, asked, source, given):
    """
    Give `model` the block_size that flags ask for (`asked`, a dict of knobs); refuse what they ask for and the
    weights from `source` do not have.
    """
    theirs = model.config
    n_head, n_embd = resolve_sizes(asked, default=(theirs.n_head, theirs.n_embd))
    free = ('block_size', 'd_head', 'd_model', 'dropout', 'attn_dropout', 'init')
    for name, value in {**asked, 'n_head': n_head, 'n_embd': n_embd}.items():
        if name not in free and value != getattr(theirs, name):
            words = {'n_head': ('n_head', 'd_head'), 'n_embd': ('n_embd', 'd_model', 'd_head')}.get(
                name, (name,)
            )
            asker = next(given[word] for word in words if word in asked)
            way = f'add --{name}={getattr(theirs, name)}' if name in asked else f'drop {asker}'
            raise ValueError(
                f'{source}: the weights have {name}={getattr(theirs, name)}, you ask for {value} ({asker}); {way}, '
                'or start anew with --init_from=scratch'
            )
    block_size = asked.get('block_size', theirs.block_size)
    if block_size > theirs.block_size and theirs.pos == 'learned':
        raise ValueError(
            f'{source}: the weights have block_size={theirs.block_size}, you ask for {block_size}; lower --block_size'
        )
    model.crop_block_size(block_size)
