"""
Checkpoint files. ckpt.pt holds what inference needs (weights, model_args, config, meta of the
tokenizer, iter_num, best_val_loss) and names the optimizer file that belongs to it, in the same
folder. Whenever the machine stops, a complete pair is on disk. best.pt, where a run keeps one,
is a ckpt.pt without an optimizer file.
"""

import contextlib
import errno
import glob
import itertools
import os
import re
import shutil
import warnings
import zipfile
from dataclasses import fields

import torch

from data.tokenizer import check_meta
from model import GPTConfig
from support.distributed import print0
from support.errors import FileError, UserError
from support.files import write_whole

PREFIXES = ('_orig_mod.', 'module.')  # torch.compile and DDP put these before parameter names
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')  # model_args must have these
CONFIG_TYPES = {  # of the settings that scripts other than train.py read
    'dataset': str,
    'mask_before_token': str,
    'mask_per_line': bool,
    'align_to_lines': bool,
    'eval_iters': int,
    'batch_size': int,
}


def path_as_text(*parts):
    """Stands in for pathlib's classes when a checkpoint of PopGPT is read: a path becomes a str."""
    return os.path.join(*parts) if parts else '.'


PATHS = [
    (path_as_text, f'{module}.{name}')
    for module in ('pathlib', 'pathlib._local')
    for name in ('PosixPath', 'WindowsPath', 'PurePosixPath')
]


# -----------------------------------------------------------------------------
# writing
def save(path, checkpoint, optimizer_state=None, keep=1):
    """
    Write `checkpoint` (a dict with iter_num) to `path`, and `optimizer_state`, if any, beside it.

    The optimizer file comes first and gets a new name. So the old pair stays complete until the
    new ckpt.pt is moved into place. With keep > 1 the latest `keep` pairs stay, the checkpoints
    as ckpt-ITERATION.pt. Raises FileError if a file cannot be written; the old pair then stays.
    """
    if optimizer_state is None:
        return write(path, checkpoint)
    folder = os.path.dirname(path)
    label = new_label(folder, checkpoint['iter_num'])
    optimizer_path = os.path.join(folder, f'optimizer-{label}.pt')
    write(optimizer_path, optimizer_state)
    before = inode(path)
    try:
        write(path, {**checkpoint, 'optimizer_file': os.path.basename(optimizer_path)})
    except OSError:
        if inode(path) == before:  # still the old ckpt.pt: nothing needs the new optimizer file
            with contextlib.suppress(OSError):
                os.remove(optimizer_path)
        raise
    try:  # the new pair is complete; if the rest fails, the next save does it
        remove_old(folder, label, keep, keep_best=checkpoint.get('best_file'))
        if keep > 1:  # a copy, not a link: writing to ckpt.pt must not change it
            with open(path, 'rb') as f:
                copy_path = os.path.join(folder, f'ckpt-{label}.pt')
                write_whole(copy_path, lambda copy: shutil.copyfileobj(f, copy))
    except OSError as e:
        print0(f'{folder}: {e.strerror or e}; older checkpoints are left as they are')


def new_label(folder, iter_num):
    """The iteration, with -1, -2, ... added if a file has that label already: no file is reused."""
    for n in itertools.count():
        label = f'{iter_num}-{n}' if n else f'{iter_num}'
        names = (f'optimizer-{label}.pt', f'ckpt-{label}.pt')
        if not any(os.path.exists(os.path.join(folder, name)) for name in names):
            return label


def inode(path):
    """The number of the file at `path`, which a new file does not share; None if there is none."""
    return os.stat(path).st_ino if os.path.exists(path) else None


def remove_old(folder, label, keep, keep_best):
    """Remove what the new pair `label` replaces; the latest keep - 1 pairs before it stay."""
    best_path = os.path.join(folder, 'best.pt')
    if not keep_best and os.path.exists(best_path):
        os.remove(best_path)  # from an earlier run, or no longer the best
    for old in glob.glob(os.path.join(glob.escape(folder), '*.pt.old')):
        os.remove(old)
    labels = {}  # of each file that save() wrote; a file with another name is the user's
    for name in os.listdir(folder):
        found = re.fullmatch(r'(ckpt|optimizer)-(\d+(-\d+)?)\.pt', name)
        if found:
            labels[os.path.join(folder, name)] = found[2]
    history = [file for file in labels if os.path.basename(file).startswith('ckpt')]
    history.sort(key=os.path.getmtime, reverse=True)
    kept = {label, *(labels[file] for file in history[: keep - 1])}
    for file in labels:
        if labels[file] not in kept:
            os.remove(file)


def try_save(path, checkpoint, *args):
    """save(); returns False and prints a line if a file cannot be written."""
    try:
        save(path, checkpoint, *args)
        return True
    except OSError as e:
        iter_num = checkpoint['iter_num']
        print0(f'iteration {iter_num}: {e}; training continues, the next save tries again')
        return False


def not_saved(saved, folder):
    """One line about the files whose last write failed, '' for none. saved: {name: written?}."""
    names = [name for name in saved if not saved[name]]
    if not names:
        return ''
    return (
        f'{" and ".join(names)} could not be written at the last attempt; '
        f'what {folder} holds is older, if anything'
    )


def set_aside(folder):
    """Rename an earlier run's checkpoint, so that a new run cannot resume it by mistake."""
    renamed = []
    for name in ('ckpt.pt', 'best.pt'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.replace(path, path + '.old')
            renamed.append(name + '.old')
    if renamed:
        print0(
            f'{folder} holds an earlier run: its log is replaced now, its checkpoint '
            f'(now {renamed[0]}) at the first save; to resume a run add --init_from=resume'
        )


def write(path, content):
    """torch.save to a whole new file. Raises FileError if it fails; the old file then stays."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        write_whole(path, lambda f: torch.save(content, f))
    except (OSError, RuntimeError) as e:  # torch turns some errors of the disk into RuntimeErrors
        reason = getattr(e, 'strerror', None) or str(e).splitlines()[0]
        raise FileError(f'cannot write {path}: {reason}') from e


# -----------------------------------------------------------------------------
# reading
def read(path):
    """torch.load that executes no code. Raises UserError for any kind of damage."""
    try:
        if zipfile.is_zipfile(path):  # torch does not check the checksums that it writes
            with zipfile.ZipFile(path) as f:
                damaged = f.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'checksum of {damaged}')
        # torch warns about old formats before it refuses them, and cannot open every path itself
        with open(path, 'rb') as f, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with torch.serialization.safe_globals(PATHS):
                return torch.load(f, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise FileError(
            f'{path} not found; train first, or name what is there: --out_dir=... '
            'or --init_from=... (on the hub: gpt2-xl or owner/name)'
        ) from e
    except Exception as e:  # damage raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        if isinstance(e, MemoryError) or 'allocate memory' in str(e):
            raise FileError(f'cannot read {path}: not enough memory') from e
        if isinstance(e, OSError) and e.errno != errno.EINVAL:  # EINVAL: an offset that is damaged
            raise FileError(f'cannot read {path}: {e.strerror or e}') from e
        reason = 'it is truncated or damaged'
        if 'unsupported global' in str(e).lower():
            reason = 'it holds code, not only weights'
        raise UserError(f'{path} refused: {reason}') from e


def best(folder):
    """Path of the weights to sample from: the run's best.pt if it keeps one, else its ckpt.pt."""
    path = os.path.join(folder, 'best.pt')
    return path if os.path.exists(path) else os.path.join(folder, 'ckpt.pt')


def load(path):
    """
    The checkpoint at `path` (a file, or a folder with a best.pt or a ckpt.pt), on CPU: ours, or
    the single file of nanoGPT or PopGPT. Raises FileError or UserError, one line each.
    """
    if os.path.isdir(path):
        path = best(path)
    checkpoint = read(path)
    if isinstance(checkpoint, dict):
        checkpoint['config'] = flat(checkpoint.get('config', {}))
    if not is_checkpoint(checkpoint):
        raise UserError(
            f'{path} refused: it is no checkpoint of a GPT '
            '(which has model, model_args and iter_num)'
        )
    for field in fields(GPTConfig):
        value = checkpoint['model_args'].get(field.name, field.default)
        int_for_float = type(field.default) is float and type(value) is int
        if not isinstance(value, field.type) and not int_for_float:
            raise UserError(f'{path} refused: {field.name}={value!r} in its model_args')
    if checkpoint.get('meta'):
        check_meta(checkpoint['meta'], path)
    checkpoint['model'] = {
        without_prefixes(name): p
        for name, p in checkpoint['model'].items()
        if not name.endswith('.attn.bias')  # the causal mask in early checkpoints of nanoGPT
    }
    checkpoint['path'] = path
    return checkpoint


def without_prefixes(name):
    while name.startswith(PREFIXES):
        name = name.partition('.')[2]
    return name


def flat(config):
    """
    PopGPT's settings without their sections; its None means not set, its data_dir names the
    dataset. Returns the settings of other projects as they are.
    """
    if not isinstance(config, dict) or not isinstance(config.get('data'), dict):
        return config
    settings = {}
    for section in config.values():
        if isinstance(section, dict):
            settings.update((name, value) for name, value in section.items() if value is not None)
    if isinstance(settings.get('data_dir'), str):
        settings['dataset'] = os.path.basename(os.path.normpath(settings['data_dir']))
    return settings


def is_checkpoint(checkpoint):
    """Whether it has all that a checkpoint of a GPT must have, each of the right type."""
    if not isinstance(checkpoint, dict):
        return False
    for name in ('model', 'model_args', 'config'):
        if not isinstance(checkpoint.get(name), dict):
            return False
    for name, p in checkpoint['model'].items():
        if not isinstance(name, str) or not is_plain(p):
            return False
    for name in SIZES:
        if type(checkpoint['model_args'].get(name)) is not int:
            return False
    for name, kind in CONFIG_TYPES.items():
        if not isinstance(checkpoint['config'].get(name, kind()), kind):
            return False
    for name in ('best_file', 'run_id', 'optimizer_file'):
        if not isinstance(checkpoint.get(name), str | None):
            return False
    iter_num, best_iter = checkpoint.get('iter_num'), checkpoint.get('best_iter', 0)
    if type(iter_num) is not int or not 0 <= iter_num < 2**63 or type(best_iter) is not int:
        return False
    loss = checkpoint.get('best_val_loss', 0.0)
    if is_plain(loss):
        return loss.numel() == 1
    return isinstance(loss, (int, float))


def is_plain(x):
    """Whether x is an ordinary tensor: not nested, sparse or quantized."""
    if not torch.is_tensor(x) or x.layout != torch.strided:
        return False
    return not x.is_nested and not x.is_quantized
