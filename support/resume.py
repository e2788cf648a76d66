"""Where a run that is resumed stood."""

import os

from support.checkpoint import is_plain, load, read
from support.distributed import any_rank, broadcast, print0, shard_like


def where_it_stood(folder, checkpoint, config, only_look=False):
    """
    (iter_num, best_val_loss, best_iter, best_file, run_id) of the run in `folder` that goes on from its loaded checkpoint with
    the settings `config`. Where these change what is validated, the best so far is none. ValueError where another machine has
    found another checkpoint. With only_look nothing in the folder is changed.
    """
    iter_num = checkpoint['iter_num']
    if broadcast(iter_num) != iter_num:
        raise ValueError(
            f'{checkpoint["path"]} is at iteration {iter_num} here and another at rank 0; '
            'out_dir must be one folder that all machines see'
        )
    then, now = validated(checkpoint.get('config', {})), validated(config)
    changed = [name for name in now if then[name] not in (None, now[name])]
    if changed:
        print0(
            f'{", ".join(changed)} changed, and so what is validated: the best val loss so far does not count'
        )
        return iter_num, float('inf'), iter_num, None, checkpoint.get('run_id')
    best_file = broadcast(
        os.environ.get('RANK', '0') == '0' and own_best(folder, checkpoint, only_look)
    )  # rank 0's
    return (
        iter_num,
        float(checkpoint.get('best_val_loss', 'inf')),
        checkpoint.get('best_iter', iter_num),
        best_file,
        checkpoint.get('run_id'),
    )


def validated(config):
    """The settings that decide what is validated, None where `config` lacks one; recipes share the windows out to processes."""
    names = ('dataset', 'mask_before_token', 'mask_per_line', 'align_to_lines', 'block_size')
    windows = (
        config['eval_iters'] * config['batch_size']
        if {'eval_iters', 'batch_size'} <= set(config)
        else None
    )
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
    except ValueError:  # damaged
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
    return broadcast(init_from)


def made_by(config, path):
    """Whether the checkpoint at `path`, if there is one, comes from a run with these knobs, on whatever number of processes."""
    if not os.path.exists(path):
        return False
    checkpoint = load(path)
    theirs = checkpoint.get('config', {})  # sizes stand there as they turned out
    other = {
        *checkpoint['model_args'],
        'd_head',
        'd_model',
        'batch_size',
        'gradient_accumulation_steps',
        'eval_iters',
    }  # recipes share these out
    return all(theirs.get(name) == value for name, value in config.items() if name not in other)


def load_optimizer(optimizer, scaler, checkpoint):
    """
    Put a checkpoint's optimizer state, and the gradient scaler's, back; settings such as weight_decay stay as they are today.
    ValueError where the state is missing or is not exactly what this optimizer has for each parameter.
    """
    state = checkpoint.get('optimizer')  # nanoGPT keeps it in the same file
    if state is None:
        if not checkpoint.get('optimizer_file'):
            raise ValueError(
                f'{checkpoint["path"]} has no optimizer state to resume with; fine-tune from it: --init_from={checkpoint["path"]}'
            )
        state = read(
            os.path.join(
                os.path.dirname(checkpoint['path']), os.path.basename(checkpoint['optimizer_file'])
            )
        )
    try:
        params = [p for group in optimizer.param_groups for p in group['params']]
        muon = {p for group in optimizer.param_groups if group.get('muon') for p in group['params']}
        for i, p in enumerate(params):
            tensors = state['state'][i]
            if set(tensors) != (
                {'momentum_buffer'} if p in muon else {'step', 'exp_avg', 'exp_avg_sq'}
            ):
                raise ValueError(
                    f'it has {", ".join(map(str, tensors)) or "nothing"} for a parameter of {tuple(p.shape)}'
                )
            for name, t in tensors.items():
                if t.dim() == 2 and t.shape[1:] == p.shape[1:]:
                    t = t[: len(p)]  # where block_size was cropped, wpe's state is too
                if (
                    not is_plain(t)
                    or t.shape != (() if name == 'step' else p.shape)
                    or not t.is_floating_point()
                ):
                    raise ValueError(
                        f'{name} is of {tuple(t.shape)}, {t.dtype} for a parameter of {tuple(p.shape)}'
                    )
                tensors[name] = shard_like(t, p)
        if len(state['state']) != len(params):
            raise ValueError(f'it is of {len(state["state"])} parameters, not {len(params)}')
        groups = [
            {**ours, 'params': theirs['params']}
            for theirs, ours in zip(state['param_groups'], optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
        if state.get('scaler'):  # empty unless float16
            if not all(isinstance(value, (int, float)) for value in state['scaler'].values()):
                raise ValueError('the state of the gradient scaler is not made of numbers')
            scaler.load_state_dict(state['scaler'])
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as e:
        raise ValueError(
            f'{checkpoint["path"]}: its optimizer state does not fit this model ({e}); resume with the --optimizer and the sizes '
            f'of the run, or fine-tune from it: --init_from={checkpoint["path"]}'
        ) from e
