"""A model, new or from existing weights: its sizes, its tokenizer, LoRA."""

import os
import re
from dataclasses import fields, replace
from itertools import groupby

import torch

from data.tokenizer import dataset_dir, dataset_meta, model_vocab_size, same_tokenizer
from model import GPT, GPTConfig
from support.checkpoint import load
from support.errors import UserError
from support.memory import NoInit

NETWORK = [field.name for field in fields(GPTConfig)]


# -----------------------------------------------------------------------------
# opening weights
def open_model(source, lora_rank=0, dropout=0.0):
    """
    (model, checkpoint) from a checkpoint's path, or from weights in the format of transformers:
    a folder, or a name of the hub. For these the checkpoint holds only the tokenizer's meta, if
    it is known. lora_rank: see with_lora()
    """
    if os.path.exists(os.path.join(source, 'config.json')) or is_hub_name(source):
        from support.hf import from_pretrained  # imports transformers, which takes seconds

        model, meta = from_pretrained(source, dropout)
        checkpoint = {'meta': meta} if meta else {}
    else:
        checkpoint = load(source)
        model = build_model(checkpoint, dropout)
    return with_lora(model, lora_rank), checkpoint


def is_hub_name(source):
    """Whether `source` looks like a name of the Hugging Face hub, such as gpt2-xl or owner/name."""
    looks_like_path = source.endswith('.pt') or re.match(r'out([-_/]|$)', source)
    if looks_like_path or os.path.exists(source):
        return False
    return bool(re.fullmatch(r'gpt2[\w-]*|[\w-][\w.-]*/[\w.-]+', source))


def build_model(checkpoint, dropout=0.0):
    """The GPT of a loaded checkpoint, on CPU. Raises UserError if the weights do not fit it."""
    args = {name: value for name, value in checkpoint['model_args'].items() if name in NETWORK}
    weights = checkpoint['model']
    refused = f'{checkpoint["path"]} refused: its weights do not fit its model_args'
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    if len(layers) != args['n_layer']:
        raise UserError(f'{refused} ({len(layers)} layers)')
    config = GPTConfig(**{**args, 'dropout': dropout})
    with torch.device('meta'), NoInit():  # compare shapes before allocating memory
        expected = GPT(config).state_dict()
    for name in expected | weights:
        shape, wanted = (
            tuple(tensors[name].shape) if name in tensors else 'nothing'
            for tensors in (weights, expected)
        )
        if shape != wanted:
            raise UserError(f'{refused} ({name}: {shape} instead of {wanted})')
    with NoInit():
        model = GPT(config)
    model.load_state_dict(weights)
    return model


def with_lora(model, rank):
    """
    `model` with new LoRA matrices of this rank (0: none); those that it has are merged into its
    weights. If it has this rank already, or rank is None, `model` itself.
    """
    if rank is None or model.config.lora_rank == rank:
        return model
    weights = {name: p for name, p in model.state_dict().items() if 'lora_' not in name}
    for name, module in model.named_modules():
        if getattr(module, 'lora_rank', 0):
            merged = module.weight + module.lora_b @ module.lora_a
            weights[f'{name}.weight'] = merged.detach()
    new = GPT(replace(model.config, lora_rank=rank))
    new.load_state_dict(weights, strict=False)
    return new


# -----------------------------------------------------------------------------
# models to train
def new_model(config, given, meta):
    """A GPT with random weights, with the sizes in `config` and the vocabulary of `meta`."""
    if config['lora_rank'] > 0:
        raise UserError(
            f'lora_rank={config["lora_rank"]} fine-tunes weights that are there: '
            "--init_from=gpt2, or a run's folder"
        )
    default = config['n_head'], config['n_embd']
    n_head, n_embd = resolve_sizes(asked_sizes(config, given), default)
    vocab_size = config['vocab_size'] if 'vocab_size' in given else model_vocab_size(meta)
    sizes = {**config, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': vocab_size}
    return GPT(GPTConfig(**{name: sizes[name] for name in NETWORK}))


def trained_model(init_from, own, config, given, data_dir):
    """
    (model, checkpoint) to train: from this run's checkpoint, at the path `own`, if init_from is
    'resume', else from other weights. Raises UserError if they have another tokenizer than the
    dataset in data_dir, or other sizes than files or flags ask for.
    """
    source = own if init_from == 'resume' else init_from
    lora_rank = config['lora_rank']
    if init_from == 'resume' and 'lora_rank' not in given:
        lora_rank = None  # the checkpoint's
    model, checkpoint = open_model(source, lora_rank, config['dropout'])
    check_tokenizer(checkpoint, source, data_dir)
    if init_from != 'resume' and 'prefix_lm' in given:  # which has no weights
        model.config = replace(model.config, prefix_lm=config['prefix_lm'])
    fit_sizes(model, asked_sizes(config, given), source, given)
    return model, checkpoint


# -----------------------------------------------------------------------------
# sizes
def asked_sizes(config, given):
    """
    The settings of the network that files and flags ask for, a dict.

    From left to right a file, or a group of flags, that sets n_embd or d_model replaces what was
    said of the width before; one that sets n_head or d_head replaces what was said of the heads;
    one that sets both n_head and d_head replaces the width too.
    given: {name: '--name=value' or 'file:line'}, in the order in which they were set
    """
    asked = {}
    for _, names in groupby(given, key=lambda name: origin(given[name])):
        new = {}
        for name in names:
            if name in NETWORK or (name in ('d_head', 'd_model') and config[name] is not None):
                new[name] = config[name]
        heads = new.keys() & {'n_head', 'd_head'}
        width = new.keys() & {'n_embd', 'd_model'}
        replaced = {'n_head', 'd_head'} if heads else set()
        if width or len(heads) == 2:
            replaced |= {'n_embd', 'd_model'}
        asked = {name: value for name, value in asked.items() if name not in replaced} | new
    return asked


def origin(place):
    """The file of 'file:line'; 'flags' for a flag."""
    return 'flags' if place.startswith('--') else place.rpartition(':')[0]


def resolve_sizes(asked, default=(12, 768)):
    """
    (n_head, n_embd) from the dict `asked`: any two of n_head, n_embd and d_head give the third;
    d_model is another name for n_embd. `default` fills in what is missing. Raises UserError with
    the arithmetic of a contradiction.
    """
    n_head, d_head = asked.get('n_head'), asked.get('d_head')
    n_embd = asked.get('n_embd', asked.get('d_model'))
    if asked.get('d_model', n_embd) != n_embd:
        raise UserError(
            f'n_embd={n_embd} and d_model={asked["d_model"]} are two names for one size; '
            'give one of them'
        )
    if d_head is None:
        return asked.get('n_head', default[0]), default[1] if n_embd is None else n_embd
    if d_head < 1:
        raise UserError(f'd_head={d_head} must be at least 1')
    if n_embd is None:
        n_embd = default[1] if n_head is None else n_head * d_head
    if n_embd % d_head:
        raise UserError(
            f'n_embd={n_embd} must be divisible by d_head={d_head}: '
            f'{n_embd} / {d_head} = {n_embd / d_head:.2f}'
        )
    if n_head is not None and n_head * d_head != n_embd:
        raise UserError(
            f'n_head={n_head} x d_head={d_head} = {n_head * d_head}, but n_embd={n_embd}; '
            'leave one of the three out'
        )
    return n_embd // d_head, n_embd


def fit_sizes(model, asked, source, given):
    """
    Crop `model` to the block_size in `asked`. Raises UserError if `asked` differs in another
    setting from the weights, which come from `source`.
    """
    have = model.config
    n_head, n_embd = resolve_sizes(asked, default=(have.n_head, have.n_embd))
    free = ('block_size', 'd_head', 'd_model', 'dropout', 'init')
    for name, value in {**asked, 'n_head': n_head, 'n_embd': n_embd}.items():
        if name in free or value == getattr(have, name):
            continue
        others = {'n_head': ['d_head'], 'n_embd': ['d_model', 'd_head']}.get(name, [])
        place = next(given[setting] for setting in [name, *others] if setting in asked)
        fix = f'add --{name}={getattr(have, name)}' if name in asked else f'drop {place}'
        raise UserError(
            f'{source}: the weights have {name}={getattr(have, name)}, you ask for {value} '
            f'({place}); {fix}, or train a new model: --init_from=scratch'
        )
    block_size = asked.get('block_size', have.block_size)
    if block_size > have.block_size and have.pos == 'learned':
        raise UserError(
            f'{source}: the weights have block_size={have.block_size}, you ask for {block_size}; '
            'lower --block_size'
        )
    model.crop_block_size(block_size)


# -----------------------------------------------------------------------------
# tokenizers
def tokenizer_meta(checkpoint, source, vocab_size):
    """
    The meta of a checkpoint's tokenizer; for nanoGPT and PopGPT that of its dataset. Raises
    UserError if it has more ids than vocab_size, or is of a dataset with fewer characters.
    """
    own, dataset = checkpoint.get('meta'), checkpoint.get('config', {}).get('dataset')
    folder = dataset_dir(str(dataset))
    meta = own or dataset_meta(folder)
    too_few = not own and 'stoi' in meta and meta['vocab_size'] < vocab_size
    if too_few or meta['vocab_size'] > vocab_size:
        raise UserError(
            f'{source} has {vocab_size} token ids and comes without its tokenizer; '
            f'put the meta.pkl of its dataset into {folder}'
        )
    return meta


def check_tokenizer(checkpoint, source, data_dir):
    """Raise UserError if the weights from `source` have another tokenizer than the dataset."""
    if not os.path.exists(os.path.join(data_dir, 'train.bin')):
        return
    theirs, meta = checkpoint.get('meta'), dataset_meta(data_dir)
    ids = checkpoint.get('model_args', {}).get('vocab_size')
    if not theirs and ids and 'stoi' in meta and meta['vocab_size'] != ids:
        raise UserError(
            f'{source}: weights of {ids} token ids that come without tokenizer, '
            f'{data_dir} has {meta["vocab_size"]}; train on their own dataset'
        )
    if theirs and not same_tokenizer(theirs, meta):
        raise UserError(
            f'{source}: the weights were trained with another tokenizer than that of {data_dir}; '
            'prepare the text with theirs: '
            f'python data/text/prepare.py --input=... --tokenizer={source} --dataset=...'
        )
