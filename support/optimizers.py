"""The optimizer of a run: its settings, and the guard that skips bad steps."""

import math

import torch
from torch.nn.utils import clip_grad_norm_

import muon
from support.distributed import gather
from support.errors import UserError


def make_optimizer(model, config, given, device):
    """
    AdamW or Muon for `model`, a GPT. config: the settings; given: those that were set.

    Raises UserError for a flag --learning_rate that would have no effect.
    """
    device_type = device.partition(':')[0]
    betas = config['beta1'], config['beta2']
    settings = config['weight_decay'], config['learning_rate'], betas, device_type
    if config['optimizer'] == 'muon':
        optimizer = muon.configure(model, config, *settings)
        flag = given.get('learning_rate', '').startswith('--')
        has_vectors = any(p.dim() < 2 and p.requires_grad for p in model.parameters())
        if flag and not has_vectors and not config['min_lr']:
            raise UserError(
                'with muon, learning_rate is the rate of biases and norms, and this model trains '
                'none; set --matrix_lr, --embed_lr or --head_lr'
            )
    else:
        optimizer = model.configure_optimizers(*settings)
    for group in optimizer.param_groups:
        group['capturable'] = device_type == 'cuda'  # rates and step counts are tensors
    return optimizer


class StepGuard:
    """
    Clips gradients, skips steps whose loss or gradient is not finite, and counts both.

    All counts are tensors on the device that are written in place: nothing waits for the device,
    and the methods can be recorded as CUDA graphs. All ranks see the same gradient norm, so they
    skip the same steps.
    """

    def __init__(self, model, optimizer, scaler, grad_clip, max_bad_steps, device):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.max_norm, self.max_bad_steps = grad_clip or math.inf, max_bad_steps
        self.device = device
        counts = torch.zeros(5, device=device).unbind()
        self.norm, self.bad, self.bad_in_row, self.bad_steps, self.clipped = counts
        optimizer.found_inf = self.bad  # if 1, fused AdamW and Muon leave weights and state alone

    def check(self, loss):
        """`loss`, but nan where it is infinite: its gradient could be finite on some ranks."""
        return loss * (1 + 0 * loss.detach())

    def clip_gradients(self):
        self.scaler.unscale_(self.optimizer)
        self.norm.copy_(gather(clip_grad_norm_(self.model.parameters(), self.max_norm)))
        self.bad.copy_(~self.norm.isfinite())
        self.bad_in_row.add_(1).mul_(self.bad)
        self.bad_steps.add_(self.bad)
        self.clipped.add_(self.norm > self.max_norm)

    def step(self):
        """Update the weights, unless this step is bad."""
        if not ('mps' in self.device and self.bad):  # MPS's kernel ignores found_inf
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def read(self):
        """The gradient norm, and the numbers of clipped and bad steps since the last call."""
        numbers = {
            'grad_norm': self.norm.item(),
            'clipped': self.clipped.item(),
            'bad_steps': int(self.bad_steps),
        }
        self.bad_steps.zero_()
        self.clipped.zero_()
        return numbers

    def problem(self, log_path, wait):
        """
        Why the run must end, '' if it need not: too many bad steps in a row. Reading the count
        waits for the device, so on a GPU it is read only if `wait`.
        """
        if not self.max_bad_steps or not (wait or self.device == 'cpu'):
            return ''
        if self.bad_in_row < self.max_bad_steps:
            return ''
        return (
            f'no finite loss or gradient in {int(self.bad_in_row)} steps in a row; the last '
            f'checkpoint is from before them. Look at grad_norm in {log_path}; lower rates, a '
            'longer warmup or bfloat16 instead of float16 may help'
        )
