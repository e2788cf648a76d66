"""Where a resumed run stood: its iteration, its best weights, its optimizer state."""

import os
from dataclasses import dataclass

from support.checkpoint import is_plain, load, read
from support.distributed import any_rank, broadcast, is_rank0, print0, shard_like
from support.errors import UserError


@dataclass
class Best:
    """The best validation loss of a run so far."""

    loss: float = float('inf')
    iter_num: int = 0  # the iteration it was found at
    file: str | None = None  # 'best.pt' if the weights are kept there

    def update(self, loss, iter_num, save=None):
        """
        Record a lower `loss`. save, if given, is called with 'best.pt' to write the weights. If
        that fails on rank 0, the record stays that of the old file.
        """
        if not loss < self.loss:
            return
        before = self.loss, self.iter_num, self.file
        self.loss, self.iter_num, self.file = loss, iter_num, 'best.pt' if save else None
        if save and not broadcast(save('best.pt')):
            self.loss, self.iter_num, self.file = before

    def why_stop(self, loss, iter_num, target_loss, patience):
        """Why the run ends after this evaluation, '' if it does not. patience: in iterations."""
        if loss <= target_loss:
            return f'val loss {loss:.4f} reached target_loss={target_loss}: '
        if patience and iter_num - self.iter_num >= patience:
            return f'no better val loss since iteration {self.iter_num}: '
        return ''

    def as_dict(self):
        """The entries of a checkpoint."""
        return {'best_val_loss': self.loss, 'best_iter': self.iter_num, 'best_file': self.file}


def where_it_stood(folder, checkpoint, config, only_look=False):
    """
    Return (iter_num, Best, wandb's run_id) of the run in `folder` from its loaded checkpoint.

    If the settings `config` change what is validated, the best loss starts anew. only_look: change
    nothing in the folder. Raises UserError if another machine found another checkpoint.
    """
    iter_num, run_id = checkpoint['iter_num'], checkpoint.get('run_id')
    if broadcast(iter_num) != iter_num:
        raise UserError(
            f'{checkpoint["path"]} is at iteration {iter_num} here and another at rank 0; '
            'out_dir must be one folder that all machines see'
        )
    then, now = validated(checkpoint.get('config', {})), validated(config)
    changed = [name for name in now if then[name] not in (None, now[name])]
    if changed:
        names = ', '.join(changed)
        print0(f'{names} changed, so the validation did: the best val loss so far does not count')
        return iter_num, Best(iter_num=iter_num), run_id
    file = broadcast(own_best(folder, checkpoint, only_look) if is_rank0() else None)
    loss = float(checkpoint.get('best_val_loss', 'inf'))
    return iter_num, Best(loss, checkpoint.get('best_iter', iter_num), file), run_id


def validated(config):
    """
    The settings that define the validation, None where `config` lacks one. eval_iters and
    batch_size count as their product, since recipes divide the windows among processes.
    """
    names = ('dataset', 'mask_before_token', 'mask_per_line', 'align_to_lines', 'block_size')
    settings = {name: config.get(name) for name in names}
    settings['eval_iters x batch_size'] = None
    if 'eval_iters' in config and 'batch_size' in config:
        settings['eval_iters x batch_size'] = config['eval_iters'] * config['batch_size']
    return settings


def own_best(folder, checkpoint, only_look=False):
    """
    'best.pt' if that file holds the best weights of the run that resumes from `checkpoint`, else
    None. A best.pt from a later iteration is renamed to best.pt.old, unless only_look.
    """
    path = os.path.join(folder, 'best.pt')
    if not checkpoint.get('best_file') or not os.path.exists(path):
        return None
    try:
        iter_num = load(path)['iter_num']
    except ValueError:  # damaged
        iter_num = None
    if iter_num == checkpoint.get('best_iter'):
        return 'best.pt'
    if not only_look:
        os.replace(path, path + '.old')
    return None


def where_from(init_from, own, config, of_files):
    """
    Replace init_from='auto' by 'resume' if the checkpoint `own` of this run exists, otherwise by
    what config files say (`of_files`, a dict of settings), otherwise by 'scratch'.

    After torchrun restarts a failed worker, a checkpoint with the same settings is resumed in any
    case. Rank 0 decides.
    """
    restarted = any_rank(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0')
    if init_from == 'auto' or (restarted and made_by(config, own)):
        init_from = of_files.get('init_from', 'auto')
        if os.path.exists(own):
            init_from = 'resume'
        elif init_from == 'auto':
            init_from = 'scratch'
    return broadcast(init_from)


def made_by(config, path):
    """Does the checkpoint at `path` come from a run with these settings, on any number of ranks?"""
    if not os.path.exists(path):
        return False
    checkpoint = load(path)
    theirs = checkpoint.get('config', {})
    # sizes are stored as resolved, and recipes divide the batch among processes
    ignored = {'d_head', 'd_model', 'batch_size', 'gradient_accumulation_steps', 'eval_iters'}
    ignored |= set(checkpoint['model_args'])
    return all(theirs.get(name) == config[name] for name in config if name not in ignored)


def load_optimizer(optimizer, scaler, checkpoint):
    """
    Load a checkpoint's optimizer and scaler state. Settings such as weight_decay stay as they are.
    Raises UserError unless the state is exactly what this optimizer has for each parameter.
    """
    path = checkpoint['path']
    state = checkpoint.get('optimizer')  # nanoGPT keeps it in the same file
    if state is None:
        state = read(optimizer_path(checkpoint))
    try:
        groups = optimizer.param_groups
        params = [p for group in groups for p in group['params']]
        muon = {p for group in groups if group.get('muon') for p in group['params']}
        if len(state['state']) > len(params):
            raise UserError(f'it is of {len(state["state"])} parameters, not {len(params)}')
        for i, p in enumerate(params):
            check_state(state['state'][i], p, is_muon=p in muon)
        settings = [
            {**ours, 'params': theirs['params']}
            for theirs, ours in zip(state['param_groups'], groups, strict=True)
        ]
        optimizer.load_state_dict({'state': state['state'], 'param_groups': settings})
        if state.get('scaler'):  # empty unless float16
            if not all(isinstance(value, (int, float)) for value in state['scaler'].values()):
                raise UserError('the state of the gradient scaler is not made of numbers')
            scaler.load_state_dict(state['scaler'])
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as e:
        raise UserError(
            f'{path}: its optimizer state does not fit this model ({e}); resume with the '
            f'--optimizer and the sizes of the run, or fine-tune from it: --init_from={path}'
        ) from e


def optimizer_path(checkpoint):
    path, name = checkpoint['path'], checkpoint.get('optimizer_file')
    if not name:
        raise UserError(
            f'{path} has no optimizer state to resume with; fine-tune from it: --init_from={path}'
        )
    return os.path.join(os.path.dirname(path), os.path.basename(name))


def check_state(tensors, p, is_muon):
    """Check the optimizer state of the parameter p, and shard it like p, in place."""
    shape = tuple(p.shape)
    if set(tensors) != ({'momentum_buffer'} if is_muon else {'step', 'exp_avg', 'exp_avg_sq'}):
        names = ', '.join(map(str, tensors)) or 'nothing'
        raise UserError(f'it has {names} for a parameter of {shape}')
    for name, t in tensors.items():
        if t.dim() == 2 and t.shape[1:] == p.shape[1:]:
            t = t[: len(p)]  # if block_size was cropped, wpe's state is too
        wanted = () if name == 'step' else p.shape
        if not is_plain(t) or t.shape != wanted or not t.is_floating_point():
            found = f'{tuple(t.shape)}, {t.dtype}'
            raise UserError(f'{name} is of {found} for a parameter of {shape}')
        tensors[name] = shard_like(t, p)
