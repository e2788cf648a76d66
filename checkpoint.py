"""
Checkpoints, two files each. ckpt.pt is what inference needs (weights, model_args, config, meta of
the tokenizer, iter_num, best_val_loss) and names the optimizer file that belongs to it, in the same
folder. Whenever the machine stops, a pair that belongs together is on disk.
"""

import glob
import os

import torch

from data.tokenizer import GPT2
from model import GPT, GPTConfig

PREFIXES = ('_orig_mod.', 'module.') # what torch.compile and DDP put before parameter names


def save(path, checkpoint, optimizer_state):
    """
    Write `checkpoint` (a dict with iter_num) to `path` and `optimizer_state` beside it.

    The optimizer file goes first and under a new name, so the old pair stays whole until ckpt.pt,
    moved into place in one step, names the new one.
    """
    folder = os.path.dirname(path)
    name = f'optimizer-{checkpoint["iter_num"]}.pt'
    write(os.path.join(folder, name), optimizer_state)
    write(path, {**checkpoint, 'optimizer_file': name})
    for old in glob.glob(os.path.join(folder, 'optimizer-*.pt')):
        if os.path.basename(old) != name:
            os.remove(old)


def write(path, content):
    partial = path + '.partial'
    with open(partial, 'wb') as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def read(path):
    """torch.load that executes nothing and turns every kind of damage into a ValueError."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise FileNotFoundError(f'{path} not found') from e
    except Exception as e: # a damaged file raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        reason = 'it holds code, not only weights' if 'unsupported global' in str(e).lower() else 'it is truncated or damaged'
        raise ValueError(f'{path} refused: {reason}') from e


def load(path):
    """
    The checkpoint at `path` (a file, or a folder with a ckpt.pt), on CPU: ours, or nanoGPT's single
    file. Raises FileNotFoundError or ValueError, one line each.
    """
    path = os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path
    checkpoint = read(path)
    sizes = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict) \
            or not isinstance(checkpoint.get('model_args'), dict) \
            or not all(type(checkpoint['model_args'].get(name)) is int for name in sizes) \
            or type(checkpoint.get('iter_num')) is not int:
        raise ValueError(f'{path} refused: it is no checkpoint of a GPT (it needs model, model_args and iter_num)')
    for prefix in PREFIXES:
        checkpoint['model'] = {name.removeprefix(prefix): p for name, p in checkpoint['model'].items()
                               if not name.endswith('.attn.bias')} # the causal mask that early versions of nanoGPT kept
    checkpoint['path'] = path
    return checkpoint


def open_model(source, dropout=0.0):
    """
    (model, checkpoint) from a path to a checkpoint, a GPT-2 name, or a folder with a GPT2LMHeadModel.

    For the latter two the checkpoint holds no more than the tokenizer's meta, if it is known.
    """
    if os.path.exists(os.path.join(source, 'config.json')):
        return GPT.from_pretrained(source, dict(dropout=dropout)), {}
    if source.startswith('gpt2') and not os.path.exists(source):
        return GPT.from_pretrained(source, dict(dropout=dropout)), {'meta': GPT2}
    checkpoint = load(source)
    return build_model(checkpoint, dropout), checkpoint


def build_model(checkpoint, dropout=0.0):
    """The GPT that a loaded checkpoint describes, with its weights, on CPU; ValueError where they do not fit."""
    sizes = {name: value for name, value in checkpoint['model_args'].items() if name in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**{**sizes, 'dropout': dropout}))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        raise ValueError(f'{checkpoint["path"]} refused: its weights do not fit its model_args ({str(e).splitlines()[1].strip()})') from e
    return model


def load_optimizer(optimizer, checkpoint):
    """Put a checkpoint's optimizer state into `optimizer`; ValueError where it is missing or does not fit."""
    state = checkpoint.get('optimizer') # nanoGPT keeps it in the same file
    if state is None:
        state = read(os.path.join(os.path.dirname(checkpoint['path']), os.path.basename(str(checkpoint.get('optimizer_file')))))
    try:
        for group, ours in zip(state['param_groups'], optimizer.param_groups):
            group.update({name: ours[name] for name in ('fused', 'foreach', 'weight_decay', 'betas')}) # today's knobs count
        optimizer.load_state_dict(state)
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f'{checkpoint["path"]}: its optimizer state does not fit this model ({e})') from e
