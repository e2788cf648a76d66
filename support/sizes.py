"""Which sizes a network can have."""

import math

from configurator import check
from support.errors import UserError


def check_sizes(config):
    """Raise UserError if the fields of a model.GPTConfig, a dict, fit no network."""
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
    if config['pos'] == 'rotary' and width % 2:
        raise UserError(f"pos='rotary' needs an even n_embd / n_head, not {width:.0f}")
