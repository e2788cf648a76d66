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
from dataclasses import replace

import torch

from data.tokenizer import check_meta, dataset_dir, dataset_meta, model_vocab_size, same_tokenizer, write_whole
from model import GPT, GPTConfig
from parallel import agree, any_rank, shard_like
from runlog import say

def path_as_text(*parts):
    """What a path among a checkpoint's settings is read as; PopGPT writes some."""
    return os.path.join(*parts) if parts else '.'


PATHS = [(path_as_text, f'{module}.{name}') for module in ('pathlib', 'pathlib._local') for name in ('PosixPath', 'WindowsPath', 'PurePosixPath')]
PREFIXES = ('_orig_mod.', 'module.') # what torch.compile and DDP put before parameter names


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
    free = lambda stem: not any(os.path.exists(os.path.join(folder, f'{kind}-{stem}.pt')) for kind in ('optimizer', 'ckpt'))
    stem = next(filter(free, itertools.chain([f'{checkpoint["iter_num"]}'], (f'{checkpoint["iter_num"]}-{n}' for n in itertools.count(1)))))
    write(os.path.join(folder, f'optimizer-{stem}.pt'), optimizer_state)
    there = lambda: os.stat(path).st_ino if os.path.exists(path) else None
    before = there()
    try:
        write(path, {**checkpoint, 'optimizer_file': f'optimizer-{stem}.pt'})
    except OSError:
        if there() == before: # ckpt.pt was not moved into place, so its other half only fills the disk
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, f'optimizer-{stem}.pt'))
        raise
    try: # the new pair is whole; what follows may fail without harm, and is done again at the next save
        if not checkpoint.get('best_file') and os.path.exists(os.path.join(folder, 'best.pt')):
            os.remove(os.path.join(folder, 'best.pt')) # an earlier run's, or no longer the best
        for old in glob.glob(os.path.join(glob.escape(folder), '*.pt.old')):
            os.remove(old)
        ours = r'(ckpt|optimizer)-(\d+(-\d+)?)\.pt' # a copy by another name is the user's
        numbered = [found for found in (re.fullmatch(ours, name) for name in os.listdir(folder)) if found]
        age = lambda found: os.path.getmtime(os.path.join(folder, found[0]))
        history = sorted([found for found in numbered if found[1] == 'ckpt'], key=age)
        kept = {stem} | {found[2] for found in history[1 - keep:] if keep > 1}
        for found in numbered:
            if found[2] not in kept:
                os.remove(os.path.join(folder, found[0]))
        if keep > 1: # a copy, not a link: who copies an older one over ckpt.pt must not write into this one
            with open(path, 'rb') as f:
                write_whole(os.path.join(folder, f'ckpt-{stem}.pt'), lambda copy: shutil.copyfileobj(f, copy))
    except OSError as e:
        say(f'{folder}: {e.strerror or e}; older checkpoints stay as they are')


def try_save(path, checkpoint, *args):
    """save(), and whether the disk took it; if not one line says so, and what was saved last is still whole."""
    try:
        save(path, checkpoint, *args)
        return True
    except OSError as e:
        say(f'iteration {checkpoint["iter_num"]}: {e}; training goes on, the next save tries again')
        return False


def set_aside(folder):
    """Rename what an earlier run left in `folder`, so that nobody resumes it for this one; the first save removes it."""
    found = [path for path in (os.path.join(folder, name) for name in ('ckpt.pt', 'best.pt')) if os.path.exists(path)]
    for path in found:
        os.replace(path, path + '.old')
    if found:
        say(f'{folder} holds an earlier run: its log is replaced now, its checkpoint (now {os.path.basename(found[0])}.old) at the first save; '
            '--init_from=resume goes on with a run')


def write(path, content):
    """torch.save that leaves either the whole new file at `path` or what was there before; OSError when it fails."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        write_whole(path, lambda f: torch.save(content, f))
    except (OSError, RuntimeError) as e: # torch turns some failures of the file below it into RuntimeErrors
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
        raise OSError(f'cannot write {path}: {reason}') from e


def read(path):
    """torch.load that executes nothing and turns every kind of damage into a ValueError."""
    try:
        if zipfile.is_zipfile(path): # torch itself does not look at the checksums it writes
            with zipfile.ZipFile(path) as f:
                damaged = f.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'checksum of {damaged}')
        # an open file, since torch does not take every path; it warns of old formats before it refuses them
        with open(path, 'rb') as f, warnings.catch_warnings(), torch.serialization.safe_globals(PATHS):
            warnings.simplefilter('ignore')
            return torch.load(f, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise FileNotFoundError(f'{path} not found; train first, or name what is there: --out_dir=... or --init_from=... '
                                '(on the hub: gpt2-xl or owner/name)') from e
    except Exception as e: # a damaged file raises RuntimeError, UnpicklingError, EOFError, KeyError, OSError of a bad offset, ...
        if isinstance(e, MemoryError) or 'allocate memory' in str(e):
            raise OSError(f'cannot read {path}: not enough memory') from e
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise OSError(f'cannot read {path}: {e.strerror or e}') from e
        reason = 'it holds code, not only weights' if 'unsupported global' in str(e).lower() else 'it is truncated or damaged'
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
        raise ValueError(f'{path} refused: it is no checkpoint of a GPT (it needs model, model_args and iter_num)')
    for name, field in GPTConfig.__dataclass_fields__.items():
        value = checkpoint['model_args'].get(name, field.default)
        if not isinstance(value, field.type) and not (type(field.default) is float and type(value) is int):
            raise ValueError(f'{path} refused: {name}={value!r} in its model_args')
    if checkpoint.get('meta'):
        check_meta(checkpoint['meta'], path)
    for prefix in PREFIXES * 2: # in either order
        checkpoint['model'] = {name.removeprefix(prefix): p for name, p in checkpoint['model'].items()
                               if not name.endswith('.attn.bias')} # the causal mask that early versions of nanoGPT kept
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
    return (all(isinstance(name, str) and is_plain(p) for name, p in weights.items())
            and all(type(sizes.get(name)) is int for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'))
            and all(isinstance(config.get(name, kind()), kind) for name, kind in CONFIG_KINDS.items())
            and type(iter_num) is int and 0 <= iter_num < 2**63
            and (isinstance(loss, (int, float)) or is_plain(loss) and loss.numel() == 1)
            and type(checkpoint.get('best_iter', 0)) is int
            and all(isinstance(checkpoint.get(name), (str, type(None))) for name in ('best_file', 'run_id', 'optimizer_file')))


def is_plain(x):
    """Is it a tensor of the ordinary kind: not nested, sparse or quantized?"""
    return torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested and not x.is_quantized


CONFIG_KINDS = dict(dataset=str, mask_before_token=str, mask_per_line=bool, align_to_lines=bool, eval_iters=int, batch_size=int) # what others than train.py read


def tokenizer_meta(checkpoint, source, vocab_size):
    """
    The meta of a checkpoint's tokenizer; nanoGPT and PopGPT leave it with the dataset. ValueError
    where it has more ids than the model's vocab_size, or is of a dataset with fewer characters.
    """
    own, dataset = checkpoint.get('meta'), checkpoint.get('config', {}).get('dataset')
    meta = own or dataset_meta(dataset_dir(str(dataset)))
    other = not own and 'stoi' in meta and meta['vocab_size'] < vocab_size
    if other or meta['vocab_size'] > vocab_size:
        raise ValueError(f'{source} has {vocab_size} token ids and comes without its tokenizer; '
                         f'put the meta.pkl of its dataset into {dataset_dir(str(dataset))}')
    return meta


def is_hub_name(source):
    """Does `source` read like a model of the Hugging Face hub, such as gpt2-xl or owner/name, and not like a file?"""
    return not os.path.exists(source) and not source.endswith('.pt') and not re.match(r'out([-_/]|$)', source) and (
        bool(re.fullmatch(r'gpt2[\w-]*', source)) or bool(re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source)))


def open_model(source, lora_rank=0, **dropouts):
    """
    (model, checkpoint) from a path to a checkpoint, or from weights in the format of transformers: a folder, or a
    name of the hub. For the latter the checkpoint holds no more than the tokenizer's meta, if it is known.
    `dropouts`: today's dropout and attn_dropout, none unless given; lora_rank: see with_lora(), None: as it is.
    """
    if os.path.exists(os.path.join(source, 'config.json')) or is_hub_name(source):
        from convert import from_pretrained # with transformers, which takes seconds to load
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
    model.load_state_dict({name: p for name, p in weights.items() if 'lora_' not in name}, strict=False)
    return model


def build_model(checkpoint, dropout=0.0, attn_dropout=None):
    """The GPT that a loaded checkpoint describes, with its weights, on CPU; ValueError where they do not fit."""
    sizes = {name: value for name, value in checkpoint['model_args'].items() if name in GPTConfig.__dataclass_fields__}
    layers = {name.split('.')[2] for name in checkpoint['model'] if name.startswith('transformer.h.')}
    if len(layers) != sizes['n_layer']:
        raise ValueError(f'{checkpoint["path"]} refused: its weights do not fit its model_args ({len(layers)} layers)')
    config = GPTConfig(**{**sizes, 'dropout': dropout, 'attn_dropout': attn_dropout})
    with torch.device('meta'): # before memory is taken for them
        wanted = {name: p.shape for name, p in GPT(config).state_dict().items()}
    found = {name: p.shape for name, p in checkpoint['model'].items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            shapes = [tuple(shapes[name]) if name in shapes else 'nothing' for shapes in (found, wanted)]
            raise ValueError(f'{checkpoint["path"]} refused: its weights do not fit its model_args ({name}: {shapes[0]} instead of {shapes[1]})')
    model = GPT(config)
    model.load_state_dict(checkpoint['model'])
    return model


def new_model(config, given, meta):
    """A GPT with random weights, of the sizes that the knobs ask for and the vocabulary of the tokenizer's `meta`."""
    if config['lora_rank'] > 0:
        raise ValueError(f'lora_rank={config["lora_rank"]} fine-tunes weights that are there: --init_from=gpt2, or a run\'s folder')
    n_head, n_embd = resolve_sizes(asked_sizes(config, given), default=(config['n_head'], config['n_embd']))
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
    model, checkpoint = open_model(source, None if keep_lora else config['lora_rank'], dropout=config['dropout'],
                                   attn_dropout=config['attn_dropout'])
    check_tokenizer(checkpoint, source, data_dir)
    fit_sizes(model, asked_sizes(config, given), source, given)
    return model, checkpoint


def asked_sizes(config, given):
    """
    The knobs of the network that files and flags set; given: {name: '--name=value' or 'file:line'}, in the order in which they
    were set last. Of two words for one size, from two files or a file and a flag, the later counts; flags for n_head and d_head
    together take the place of a file's width.
    """
    asked = {name: config[name] for name in (*GPTConfig.__dataclass_fields__, 'd_head', 'd_model') if name in given}
    asked = {name: value for name, value in asked.items() if value is not None or name not in ('d_head', 'd_model')} # None is not asked
    order, flags = list(given), {name for name in asked if given[name].startswith('--')}
    origin = lambda name: '--' if name in flags else given[name].rpartition(':')[0]
    for pair in (('d_model', 'n_embd'), ('d_head', 'n_head')):
        if asked.keys() >= set(pair) and origin(pair[0]) != origin(pair[1]):
            del asked[min(pair, key=order.index)]
    if flags >= {'n_head', 'd_head'}:
        asked = {name: value for name, value in asked.items() if name not in ('n_embd', 'd_model') or name in flags}
    return asked


def resolve_sizes(asked, default=(12, 768)):
    """
    (n_head, n_embd) from any sufficient subset of n_head, d_head and n_embd in the dict `asked`; d_model is
    another word for n_embd. A ValueError shows the arithmetic of a contradiction. `default` fills in for
    what the subset leaves open.
    """
    n_head, n_embd, d_head, d_model = (asked.get(name) for name in ('n_head', 'n_embd', 'd_head', 'd_model'))
    if n_embd is not None and d_model is not None and n_embd != d_model:
        raise ValueError(f'n_embd={n_embd} and d_model={d_model} are two words for one size; give one of them')
    n_embd = n_embd if n_embd is not None else d_model
    if d_head is not None:
        if n_embd is None:
            n_embd = n_head * d_head if n_head is not None else default[1]
        if d_head < 1:
            raise ValueError(f'd_head={d_head} must be at least 1')
        if n_embd % d_head:
            raise ValueError(f'n_embd={n_embd} must be divisible by d_head={d_head}: {n_embd} / {d_head} = {n_embd / d_head:.2f}')
        if n_head is not None and n_head * d_head != n_embd:
            raise ValueError(f'n_head={n_head} x d_head={d_head} = {n_head * d_head}, but n_embd={n_embd}; leave one of the three out')
        n_head = n_embd // d_head
    return (n_head if n_head is not None else default[0]), (n_embd if n_embd is not None else default[1])


def check_tokenizer(checkpoint, source, data_dir):
    """Refuse weights from `source` that were trained with another tokenizer than that of the dataset in data_dir."""
    theirs, meta = checkpoint.get('meta'), dataset_meta(data_dir)
    ids = checkpoint.get('model_args', {}).get('vocab_size')
    if not os.path.exists(os.path.join(data_dir, 'train.bin')):
        return
    if not theirs and ids and 'stoi' in meta and meta['vocab_size'] != ids:
        raise ValueError(f'{source}: weights of {ids} token ids that come without tokenizer, '
                         f'{data_dir} has {meta["vocab_size"]}; train on their own dataset')
    if theirs and not same_tokenizer(theirs, meta):
        raise ValueError(f'{source}: the weights were trained with another tokenizer than that of {data_dir}; prepare the text with theirs: '
                         f'python data/text/prepare.py --input=... --tokenizer={source} --dataset=...')


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
            words = {'n_head': ('n_head', 'd_head'), 'n_embd': ('n_embd', 'd_model', 'd_head')}.get(name, (name,))
            asker = next(given[word] for word in words if word in asked)
            way = f'add --{name}={getattr(theirs, name)}' if name in asked else f'drop {asker}'
            raise ValueError(f'{source}: the weights have {name}={getattr(theirs, name)}, you ask for {value} ({asker}); {way}, '
                             'or start anew with --init_from=scratch')
    block_size = asked.get('block_size', theirs.block_size)
    if block_size > theirs.block_size and theirs.pos == 'learned':
        raise ValueError(f'{source}: the weights have block_size={theirs.block_size}, you ask for {block_size}; lower --block_size')
    model.crop_block_size(block_size)


def where_it_stood(folder, checkpoint, config, only_look=False):
    """
    (iter_num, best_val_loss, best_iter, best_file, run_id) of the run in `folder` that goes on from its loaded checkpoint with
    the settings `config`. Where these change what is validated, the best so far is none. ValueError where another machine has
    found another checkpoint. With only_look nothing in the folder is changed.
    """
    iter_num = checkpoint['iter_num']
    if agree(iter_num) != iter_num:
        raise ValueError(f'{checkpoint["path"]} is at iteration {iter_num} here and another at rank 0; '
                         'out_dir must be one folder that all machines see')
    then, now = validated(checkpoint.get('config', {})), validated(config)
    changed = [name for name in now if then[name] not in (None, now[name])]
    if changed:
        say(f'{", ".join(changed)} changed, and so what is validated: the best val loss so far does not count')
        return iter_num, float('inf'), iter_num, None, checkpoint.get('run_id')
    best_file = agree(os.environ.get('RANK', '0') == '0' and own_best(folder, checkpoint, only_look)) # rank 0's
    return iter_num, float(checkpoint.get('best_val_loss', 'inf')), checkpoint.get('best_iter', iter_num), best_file, checkpoint.get('run_id')


def validated(config):
    """The settings that decide what is validated, None where `config` lacks one; recipes share the windows out to processes."""
    names = ('dataset', 'mask_before_token', 'mask_per_line', 'align_to_lines', 'block_size')
    windows = config['eval_iters'] * config['batch_size'] if {'eval_iters', 'batch_size'} <= set(config) else None
    return {**{name: config.get(name) for name in names}, 'eval_iters x batch_size': windows}


def own_best(folder, checkpoint, only_look=False):
    """
    The name of the file with the best weights of a run that goes on from `checkpoint`, or None. A best.pt of a later time,
    which was gone back from, is set aside, unless only_look.
    """
    path = os.path.join(folder, 'best.pt')
    if not checkpoint.get('best_file') or not os.path.exists(path):
        return None
    try:
        iter_num = load(path)['iter_num']
    except ValueError: # damaged
        iter_num = None
    if iter_num == checkpoint.get('best_iter'):
        return 'best.pt'
    if not only_look:
        os.replace(path, path + '.old')


def where_from(init_from, own, config, of_files={}):
    """
    `init_from` with 'auto' replaced by 'resume' where this run's own checkpoint is there, else by what config files say
    (`of_files`, a dict of knobs), else by 'scratch'. After a restart by torchrun, which any rank may have noticed, a
    checkpoint of the same knobs is resumed whatever it says. What rank 0 finds counts.
    """
    restarted = any_rank(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0')
    if init_from == 'auto' or (restarted and made_by(config, own)):
        first = of_files.get('init_from', 'auto')
        init_from = 'resume' if os.path.exists(own) else 'scratch' if first == 'auto' else first
    return agree(init_from)


def made_by(config, path):
    """Whether the checkpoint at `path`, if there is one, comes from a run with these knobs, on whatever number of processes."""
    if not os.path.exists(path):
        return False
    checkpoint = load(path)
    theirs = checkpoint.get('config', {}) # sizes stand there as they turned out
    other = {*checkpoint['model_args'], 'd_head', 'd_model', 'batch_size', 'gradient_accumulation_steps', 'eval_iters'} # recipes share these out
    return all(theirs.get(name) == value for name, value in config.items() if name not in other)


def load_optimizer(optimizer, scaler, checkpoint):
    """
    Put a checkpoint's optimizer state, and the gradient scaler's, back; settings such as weight_decay stay as they are today.
    ValueError where the state is missing or is not exactly what this optimizer has for each parameter.
    """
    state = checkpoint.get('optimizer') # nanoGPT keeps it in the same file
    if state is None:
        if not checkpoint.get('optimizer_file'):
            raise ValueError(f'{checkpoint["path"]} has no optimizer state to resume with; fine-tune from it: --init_from={checkpoint["path"]}')
        state = read(os.path.join(os.path.dirname(checkpoint['path']), os.path.basename(checkpoint['optimizer_file'])))
    try:
        params = [p for group in optimizer.param_groups for p in group['params']]
        muon = {p for group in optimizer.param_groups if group.get('muon') for p in group['params']}
        for i, p in enumerate(params):
            tensors = state['state'][i]
            if set(tensors) != ({'momentum_buffer'} if p in muon else {'step', 'exp_avg', 'exp_avg_sq'}):
                raise ValueError(f'it has {", ".join(map(str, tensors)) or "nothing"} for a parameter of {tuple(p.shape)}')
            for name, t in tensors.items():
                if t.dim() == 2 and t.shape[1:] == p.shape[1:]:
                    t = t[:len(p)] # where block_size was cropped, wpe's state is too
                if not is_plain(t) or t.shape != (() if name == 'step' else p.shape) or not t.is_floating_point():
                    raise ValueError(f'{name} is of {tuple(t.shape)}, {t.dtype} for a parameter of {tuple(p.shape)}')
                tensors[name] = shard_like(t, p)
        if len(state['state']) != len(params):
            raise ValueError(f'it is of {len(state["state"])} parameters, not {len(params)}')
        groups = [{**ours, 'params': theirs['params']} for theirs, ours in zip(state['param_groups'], optimizer.param_groups, strict=True)]
        optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
        if state.get('scaler'): # empty unless float16
            if not all(isinstance(value, (int, float)) for value in state['scaler'].values()):
                raise ValueError('the state of the gradient scaler is not made of numbers')
            scaler.load_state_dict(state['scaler'])
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{checkpoint["path"]}: its optimizer state does not fit this model ({e}); resume with the --optimizer and the sizes '
                         f'of the run, or fine-tune from it: --init_from={checkpoint["path"]}') from e
