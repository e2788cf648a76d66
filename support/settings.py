"""Checks of the settings of a training run and of a network."""

import math

from configurator import check
from support.errors import UserError


def check_training(config, given, device):
    """
    Raise UserError for train.py's settings (a dict) that are out of range, contradict each other or
    would have no effect. given: those that were set; device: where the run trains
    """
    check(config, 'eval_interval save_interval log_interval eval_iters keep_checkpoints', least=1)
    check(config, 'gradient_accumulation_steps batch_size block_size dist_timeout', least=1)
    check(config, 'max_iters lr_decay_iters warmup_iters batch_size_warmup_iters', least=0)
    check(config, 'max_bad_steps patience loss_chunk', least=0)
    check(config, 'learning_rate min_lr matrix_lr embed_lr head_lr', least=0)
    check(config, 'weight_decay grad_clip', least=0)
    check(config, 'beta1 beta2', least=0, below=1)
    check(config, 'decay_share', above=0)
    check(config, 'seed', least=0, most=2**63 - 1)
    check(config, 'optimizer', choices=('adamw', 'muon'))
    check(config, 'lr_schedule', choices=('cosine', 'trapezoid'))
    check(config, 'backend', choices=('auto', 'nccl', 'gloo'))
    optimizer, lr, min_lr = config['optimizer'], config['learning_rate'], config['min_lr']
    for name in ('matrix_lr', 'embed_lr', 'head_lr'):
        if optimizer != 'muon' and given.get(name, '').startswith('--'):
            raise UserError(
                f'{name} needs --optimizer=muon (config/modern.py); {optimizer} has --learning_rate'
            )
    if config['decay_lr'] and min_lr > lr:
        raise UserError(
            f'min_lr={min_lr} is more than learning_rate={lr}; add --min_lr={lr / 10:g}'
        )
    if 'mps' in device and config['gradient_checkpointing'] and config['dropout'] > 0:
        raise UserError(
            'gradient_checkpointing with dropout is not supported on MPS; add --dropout=0'
        )


def check_network(config):
    """Raise UserError if the fields of a model.GPTConfig, a dict, fit no network."""
    check(config, 'pos', choices=('learned', 'rotary', 'alibi', 'none'))
    check(config, 'norm', choices=('layernorm', 'rmsnorm'))
    check(config, 'activation', choices=('gelu', 'relu2', 'swiglu'))
    check(config, 'init', choices=('gpt2', 'zero_proj'))
    check(config, 'block_size vocab_size n_head n_embd n_kv_head', least=1)
    check(config, 'n_layer', least=1, most=10_000)
    check(config, 'lora_rank', least=0, most=config['n_embd'])
    check(config, 'logit_cap', least=0, below=math.inf)
    check(config, 'dropout', least=0, below=1)
    n_embd, n_head, n_kv_head = config['n_embd'], config['n_head'], config['n_kv_head']
    width = n_embd / n_head
    if n_embd % n_head:
        raise UserError(
            f'n_embd={n_embd} must be divisible by n_head={n_head}: '
            f'{n_embd} / {n_head} = {width:.2f}'
        )
    if n_kv_head and n_head % n_kv_head:
        raise UserError(f'n_head={n_head} must be divisible by n_kv_head={n_kv_head}')
    if config['prefix_lm'] and config['pos'] == 'alibi':
        raise UserError("prefix_lm=True does not support pos='alibi'; take --pos=rotary")
    if config['pos'] == 'rotary' and width % 2:
        raise UserError(f"pos='rotary' needs an even n_embd / n_head, not {width:.0f}")
