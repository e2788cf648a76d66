"""
Checkpoints, two files each. ckpt.pt is what inference needs (weights, model_args, config, meta of
the tokenizer, iter_num, best_val_loss) and names the optimizer file that belongs to it, in the same
folder. Whenever the machine stops, a pair that belongs together is on disk. best.pt, where a run
keeps one, is a ckpt.pt without an optimizer.
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

import torch

from data.tokenizer import check_meta
from model import GPTConfig
from support.distributed import print0
from support.files import write_whole


def path_as_text(*parts):
    """What a path among a checkpoint's settings is read as; PopGPT writes some."""
    return os.path.join(*parts) if parts else '.'


PATHS = [
    (path_as_text, f'{module}.{name}')
    for module in ('pathlib', 'pathlib._local')
    for name in ('PosixPath', 'WindowsPath', 'PurePosixPath')
]
PREFIXES = ('_orig_mod.', 'module.')  # what torch.compile and DDP put before parameter names


def save(path, checkpoint, optimizer_state=None, keep=1):
    """
    Write `checkpoint` (a dict with iter_num) to `path` and, where there is one, `optimizer_state` beside it.

    The optimizer file goes first and under a name that no file has, so the old pair stays whole until
    ckpt.pt, moved into place in one step, names the new one. With keep > 1 so many of the latest pairs
    stay, as ckpt-ITERATION.pt. Raises OSError when the disk does not take it; the old pair then stays.
    """
    if optimizer_state is None:
        return write(path, checkpoint)
    folder = os.path.dirname(path)
    free = lambda stem: (
        not any(
            os.path.exists(os.path.join(folder, f'{kind}-{stem}.pt'))
            for kind in ('optimizer', 'ckpt')
        )
    )
    stem = next(
        filter(
            free,
            itertools.chain(
                [f'{checkpoint["iter_num"]}'],
                (f'{checkpoint["iter_num"]}-{n}' for n in itertools.count(1)),
            ),
        )
    )
    write(os.path.join(folder, f'optimizer-{stem}.pt'), optimizer_state)
    there = lambda: os.stat(path).st_ino if os.path.exists(path) else None
    before = there()
    try:
        write(path, {**checkpoint, 'optimizer_file': f'optimizer-{stem}.pt'})
    except OSError:
        if (
            there() == before
        ):  # ckpt.pt was not moved into place, so its other half only fills the disk
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, f'optimizer-{stem}.pt'))
        raise
    try:  # the new pair is whole; what follows may fail without harm, and is done again at the next save
        if not checkpoint.get('best_file') and os.path.exists(os.path.join(folder, 'best.pt')):
            os.remove(os.path.join(folder, 'best.pt'))  # an earlier run's, or no longer the best
        for old in glob.glob(os.path.join(glob.escape(folder), '*.pt.old')):
            os.remove(old)
        ours = r'(ckpt|optimizer)-(\d+(-\d+)?)\.pt'  # a copy by another name is the user's
        numbered = [
            found for found in (re.fullmatch(ours, name) for name in os.listdir(folder)) if found
        ]
        age = lambda found: os.path.getmtime(os.path.join(folder, found[0]))
        history = sorted([found for found in numbered if found[1] == 'ckpt'], key=age)
        kept = {stem} | {found[2] for found in history[1 - keep :] if keep > 1}
        for found in numbered:
            if found[2] not in kept:
                os.remove(os.path.join(folder, found[0]))
        if (
            keep > 1
        ):  # a copy, not a link: who copies an older one over ckpt.pt must not write into this one
            with open(path, 'rb') as f:
                write_whole(
                    os.path.join(folder, f'ckpt-{stem}.pt'),
                    lambda copy: shutil.copyfileobj(f, copy),
                )
    except OSError as e:
        print0(f'{folder}: {e.strerror or e}; older checkpoints stay as they are')


def try_save(path, checkpoint, *args):
    """save(), and whether the disk took it; if not one line says so, and what was saved last is still whole."""
    try:
        save(path, checkpoint, *args)
        return True
    except OSError as e:
        print0(
            f'iteration {checkpoint["iter_num"]}: {e}; training goes on, the next save tries again'
        )
        return False


def set_aside(folder):
    """Rename what an earlier run left in `folder`, so that nobody resumes it for this one; the first save removes it."""
    found = [
        path
        for path in (os.path.join(folder, name) for name in ('ckpt.pt', 'best.pt'))
        if os.path.exists(path)
    ]
    for path in found:
        os.replace(path, path + '.old')
    if found:
        print0(
            f'{folder} holds an earlier run: its log is replaced now, its checkpoint (now {os.path.basename(found[0])}.old) at the first save; '
            '--init_from=resume goes on with a run'
        )


def write(path, content):
    """torch.save that leaves either the whole new file at `path` or what was there before; OSError when it fails."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        write_whole(path, lambda f: torch.save(content, f))
    except (
        OSError,
        RuntimeError,
    ) as e:  # torch turns some failures of the file below it into RuntimeErrors
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
        raise OSError(f'cannot write {path}: {reason}') from e


def read(path):
    """torch.load that executes nothing and turns every kind of damage into a ValueError."""
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums it writes
            with zipfile.ZipFile(path) as f:
                damaged = f.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'checksum of {damaged}')
        # an open file, since torch does not take every path; it warns of old formats before it refuses them
        with (
            open(path, 'rb') as f,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(PATHS),
        ):
            warnings.simplefilter('ignore')
            return torch.load(f, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f'{path} not found; train first, or name what is there: --out_dir=... or --init_from=... '
            '(on the hub: gpt2-xl or owner/name)'
        ) from e
    except Exception as e:  # a damaged file raises RuntimeError, UnpicklingError, EOFError, KeyError, OSError of a bad offset, ...
        if isinstance(e, MemoryError) or 'allocate memory' in str(e):
            raise OSError(f'cannot read {path}: not enough memory') from e
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise OSError(f'cannot read {path}: {e.strerror or e}') from e
        reason = (
            'it holds code, not only weights'
            if 'unsupported global' in str(e).lower()
            else 'it is truncated or damaged'
        )
        raise ValueError(f'{path} refused: {reason}') from e


def best(folder):
    """Path of what a run has to sample from: its best.pt where it keeps one, else its ckpt.pt."""
    path = os.path.join(folder, 'best.pt')
    return path if os.path.exists(path) else os.path.join(folder, 'ckpt.pt')


def load(path):
    """
    The checkpoint at `path` (a file, or a folder with a best.pt or a ckpt.pt), on CPU: ours, or
    the single file of nanoGPT or PopGPT. Raises FileNotFoundError or ValueError, one line each.
    """
    path = best(path) if os.path.isdir(path) else path
    checkpoint = read(path)
    if isinstance(checkpoint, dict):
        checkpoint['config'] = flat(checkpoint.get('config', {}))
    if not is_checkpoint(checkpoint):
        raise ValueError(
            f'{path} refused: it is no checkpoint of a GPT (it needs model, model_args and iter_num)'
        )
    for name, field in GPTConfig.__dataclass_fields__.items():
        value = checkpoint['model_args'].get(name, field.default)
        if not isinstance(value, field.type) and not (
            type(field.default) is float and type(value) is int
        ):
            raise ValueError(f'{path} refused: {name}={value!r} in its model_args')
    if checkpoint.get('meta'):
        check_meta(checkpoint['meta'], path)
    for prefix in PREFIXES * 2:  # in either order
        checkpoint['model'] = {
            name.removeprefix(prefix): p
            for name, p in checkpoint['model'].items()
            if not name.endswith('.attn.bias')
        }  # the causal mask that early versions of nanoGPT kept
    checkpoint['path'] = path
    return checkpoint


def flat(config):
    """
    Settings without PopGPT's sections; what is None there is not set, and its data_dir tells the
    dataset. Others stay as they are.
    """
    if not isinstance(config, dict) or not isinstance(config.get('data'), dict):
        return config
    sections = [section for section in config.values() if isinstance(section, dict)]
    pairs = [pair for section in sections for pair in section.items()]
    config = {name: value for name, value in pairs if value is not None}
    if isinstance(config.get('data_dir'), str):
        config['dataset'] = os.path.basename(os.path.normpath(config['data_dir']))
    return config


def is_checkpoint(checkpoint):
    """Has it what a checkpoint of a GPT must have, and all of the right kind?"""
    if not isinstance(checkpoint, dict):
        return False
    parts = [checkpoint.get('model'), checkpoint.get('model_args'), checkpoint.get('config', {})]
    if not all(isinstance(part, dict) for part in parts):
        return False
    weights, sizes, config = parts
    iter_num, loss = checkpoint.get('iter_num'), checkpoint.get('best_val_loss', 0.0)
    return (
        all(isinstance(name, str) and is_plain(p) for name, p in weights.items())
        and all(
            type(sizes.get(name)) is int
            for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')
        )
        and all(isinstance(config.get(name, kind()), kind) for name, kind in CONFIG_KINDS.items())
        and type(iter_num) is int
        and 0 <= iter_num < 2**63
        and (isinstance(loss, (int, float)) or is_plain(loss) and loss.numel() == 1)
        and type(checkpoint.get('best_iter', 0)) is int
        and all(
            isinstance(checkpoint.get(name), (str, type(None)))
            for name in ('best_file', 'run_id', 'optimizer_file')
        )
    )


def is_plain(x):
    """Is it a tensor of the ordinary kind: not nested, sparse or quantized?"""
    return (
        torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested and not x.is_quantized
    )


CONFIG_KINDS = dict(
    dataset=str,
    mask_before_token=str,
    mask_per_line=bool,
    align_to_lines=bool,
    eval_iters=int,
    batch_size=int,
)  # what others than train.py read
