"""
The log of a run: out_dir/log.csv, the picture drawn from it, out_dir/config.py with the settings of
the run, the progress bar, the lines that are printed, and wandb if asked for.
"""

import csv
import io
import math
import os
import shlex
import sys
import threading
import time

from torch.nn.utils import get_total_norm
from tqdm import tqdm

from data.order import micro_batches
from support.device import memory_gb, peak_flops
from support.distributed import gather, is_rank0, print0
from support.errors import FileError, UserError
from support.files import lock, remove_partials, write_whole
from support.plot import draw

# Rows of logged iterations have the mean loss of their batch, those of evaluations train_loss and
# val_loss. grad_norm is from before clipping; clipped is the share of clipped steps since the last
# row, bad_steps the number of skipped ones; weight_norm is taken after evaluations. memory_gb is
# the peak so far, of the GPU if there is one, otherwise of the process.
COLUMNS = (
    'iter tokens seconds loss train_loss val_loss lr grad_norm clipped weight_norm bad_steps '
    'tokens_per_second mfu memory_gb'
).split()


class RunLog:
    """The log of one run. On ranks other than 0 it writes nothing."""

    def __init__(
        self,
        out_dir,
        config,
        iter_num=0,
        run_id=None,
        model=None,
        device='cpu',
        dtype='float32',
        world_size=1,
    ):
        """
        Open out_dir/log.csv. A run that resumes at iteration `iter_num` keeps the rows before it.

        config: the settings, for config.py and wandb; run_id: of the wandb run to continue
        model, device, dtype, world_size: for MFU, memory and the norm of the weights

        Raises FileError if out_dir cannot be written to, UserError if another run is using it.
        """
        self.out_dir, self.path = out_dir, os.path.join(out_dir, 'log.csv')
        self.config, self.model, self.device = config, model, device
        self.quiet = not is_rank0()
        self.broken, self.lock, self.wandb, self.run_id = set(), None, None, None
        self.peak_speed = 0  # tokens per second at an MFU of 1, 0 if unknown
        if model is not None:
            peak = world_size * (peak_flops(device, dtype) or 0)
            self.peak_speed = peak / model.flops_per_token()
        rows = [] if self.quiet else self.open(iter_num)
        if config.get('wandb_log') and not self.quiet:
            self.start_wandb(run_id)
        self.bar = self.start_bar(iter_num)
        self.started = self.last_time = time.perf_counter()
        self.last_iter = self.last_row = iter_num
        self.seconds_before = rows[-1]['seconds'] if rows else 0.0

    def open(self, iter_num):
        """Lock out_dir, write log.csv and config.py; returns the rows that are kept."""
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock = lock(self.out_dir)
            remove_partials(self.out_dir)
            rows = [row for row in read_log(self.path) if row['iter'] < iter_num]
            write_whole(self.path, lambda f: f.write(table(rows, header=True).encode()))
            text = describe_config(self.out_dir, self.config, iter_num)
            text = text.encode(errors='backslashreplace')
            write_whole(os.path.join(self.out_dir, 'config.py'), lambda f: f.write(text))
        except OSError as e:
            raise FileError(f'cannot write into out_dir={self.out_dir!r}: {e.strerror}') from e
        return rows

    def start_wandb(self, run_id):
        try:
            import wandb
        except ImportError as e:
            raise UserError(
                'wandb_log=True needs the package wandb: pip install wandb, then wandb login'
            ) from e
        project, name = self.config['wandb_project'], self.config['wandb_run_name']
        try:
            self.wandb = wandb.init(
                project=project, name=name, config=self.config, id=run_id, resume='allow'
            )
        except Exception as e:  # it raises errors of many classes
            reason = (str(e).strip() or type(e).__name__).rstrip('.')  # names `wandb login`
            raise UserError(
                f'wandb does not start: {reason}; WANDB_MODE=offline keeps its log here, '
                '--wandb_log=False does without'
            ) from e
        self.run_id = self.wandb.id
        self.wandb.define_metric('*', step_metric='iter')  # a resumed run continues its curves

    def start_bar(self, iter_num):
        """A progress bar on a terminal; files and pipes get lines instead."""
        plain = self.quiet or not (sys.stdout.isatty() and sys.stderr.isatty())
        bar = tqdm(
            total=self.config.get('max_iters'),
            initial=iter_num,
            dynamic_ncols=True,
            disable=plain,
            smoothing=0,  # estimate the time left from the mean speed, evaluations included
            bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} '
            '[{elapsed}<{remaining}{postfix}]',
        )
        if not plain:
            threading.Thread(target=self.tick, args=[bar], daemon=True).start()
        return bar

    def tick(self, bar):
        """Redraw the bar every second, so that time passes during compilation and long steps."""
        while not bar.disable:
            time.sleep(1)
            bar.refresh()

    def seconds(self):
        """Seconds of training so far, including those before a resume."""
        return self.seconds_before + time.perf_counter() - self.started

    def tokens_before(self, iter_num):
        """Number of tokens trained on before an iteration."""
        most = self.config.get('gradient_accumulation_steps', 1)
        first = micro_batches(iter_num, most, self.config.get('batch_size_warmup_iters', 0))[0]
        return first * self.config.get('batch_size', 1) * self.config.get('block_size', 1)

    def evaluation(self, iter_num, losses, lr):
        """Log an evaluation before iteration iter_num: a row and a new loss.png."""
        self.advance(iter_num)
        numbers = {'iter': iter_num, 'tokens': self.tokens_before(iter_num), 'lr': lr}
        self.row(train_loss=losses['train'], val_loss=losses['val'], **numbers)
        self.attempt(self.draw, where='as a picture')
        # the logged speed is that of training alone
        self.last_time, self.last_iter = time.perf_counter(), iter_num

    def draw(self):
        name = os.path.basename(os.path.normpath(self.out_dir))
        draw({name: read_log(self.path)}, os.path.join(self.out_dir, 'loss.png'))

    def iteration(self, iter_num, loss, lr, evaluated, clipped, **numbers):
        """
        Log iteration iter_num, after its step: a row, and a line or the bar. All ranks call this.

        evaluated: also log the norm of all weights; clipped: number of clipped steps since the
        last call; numbers: other columns
        """
        done, now = iter_num + 1, time.perf_counter()
        if evaluated:
            numbers['weight_norm'] = weight_norm(self.model)
        seconds = max(now - self.last_time, 1e-9)
        tokens = self.tokens_before(done)
        speed = (tokens - self.tokens_before(self.last_iter)) / seconds
        mfu = speed / self.peak_speed if self.peak_speed else None
        self.row(
            iter=iter_num,
            tokens=tokens,
            loss=loss,
            lr=lr,
            clipped=clipped / (done - self.last_row),
            tokens_per_second=speed,
            mfu=mfu,
            memory_gb=memory_gb(self.device),
            **numbers,
        )
        text = f'{speed:,.0f} tok/s'
        if mfu:
            text += f', mfu {mfu * 100:.1f}%'
        if self.bar.disable:
            ms = 1000 * seconds / (done - self.last_iter)
            losses = f'loss {loss:.4f}, perplexity {perplexity(loss):.2f}'
            print0(f'iter {iter_num}: {losses}, {ms:.2f} ms, {text}')
        self.bar.set_postfix_str(f'loss {loss:.4f}, {text}', refresh=False)
        self.advance(done)
        self.last_time, self.last_iter, self.last_row = now, done, done

    def advance(self, iterations):
        """Move the bar to this number of completed iterations."""
        try:
            self.bar.update(iterations - self.bar.n)
        except OSError:  # the terminal is gone, as in print0()
            self.bar.disable = True

    def row(self, **numbers):
        """Write a row; the names are COLUMNS. A failure is reported once and ends no run."""
        numbers['seconds'] = round(self.seconds(), 3)
        self.attempt(self.append, numbers)
        if self.wandb:
            known = {name: value for name, value in numbers.items() if value is not None}
            self.attempt(self.wandb.log, known, where='to wandb')

    def append(self, numbers):
        with open(self.path, 'ab+') as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            if size and f.read(1) != b'\n':  # a full disk cut the last line short
                f.write(b'\n')
            f.write(table([numbers], header=size == 0).encode())

    def close(self):
        self.bar.close()
        if self.lock:
            self.lock.close()
        if self.wandb:
            self.attempt(self.wandb.finish, where='to wandb')

    def attempt(self, write, *args, where=''):
        """Call write(*args), on rank 0 only; print one line if it starts to fail."""
        if self.quiet:
            return
        try:
            write(*args)
            self.broken.discard(where)
        except Exception as e:  # mostly OSError, but matplotlib and wandb raise others
            if where not in self.broken:
                reason = getattr(e, 'strerror', None) or e
                where_to = where or f'into {self.out_dir}'
                print0(f'cannot write the log {where_to}: {reason}; training continues')
            self.broken.add(where)


def perplexity(loss):
    """exp(loss): a model with this loss is as uncertain as among that many equal choices."""
    return math.inf if loss > 700 else math.exp(loss)


def weight_norm(model):
    """The norm of all weights. All ranks must call this."""
    return gather(get_total_norm([p.detach() for p in model.parameters()])).item()


def describe_data(dataset, train_data, val_data, tokens_per_iter):
    """The line about the data that a run starts with."""
    train, val = len(train_data.tokens), len(val_data.tokens)
    text = f'{dataset}: {train:,} tokens to train on, {val:,} to validate, '
    text += f'{tokens_per_iter:,} per iteration'
    if train_data.masked:
        share = train_data.targets / train_data.batch_size / train_data.block_size
        text += f', {share:.1%} of them targets that count'
    return text


def describe_model(model, device, dtype, compile, too_short, cuda_graph, world_size, fsdp):
    """The line about the model that a run starts with."""
    parts = [f'model: {model.get_num_params() / 1e6:.2f}M parameters on {device}', dtype]
    if compile:
        parts.append('compiled')
    if too_short:
        parts.append('not compiled since the run is short')
    if cuda_graph:
        parts.append('recorded as CUDA graphs')
    if model.config.lora_rank:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts.append(f'{count / 1e6:.2f}M of them trained')
    if world_size > 1:
        parts.append(f'{world_size} processes')
    if fsdp:
        parts.append('sharded')
    return ', '.join(parts)


def describe_losses(iter_num, losses):
    """The line that an evaluation prints."""
    train, val = losses['train'], losses['val']
    perplexity_ = f'perplexity {perplexity(val):.2f}'
    return f'step {iter_num}: train loss {train:.4f}, val loss {val:.4f} ({perplexity_})'


def table(rows, header):
    """Rows (dicts) as lines of CSV."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, COLUMNS, restval='')
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def describe_config(out_dir, config, iter_num):
    """A config file that repeats this run; its first comments are the commands that led to it."""
    path, commands = os.path.join(out_dir, 'config.py'), []
    if iter_num and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            commands = [line.rstrip() for line in f if line.startswith('# from iteration ')]
    command = shlex.join(['python', *sys.argv]).replace('\n', ' ')
    commands.append(f'# from iteration {iter_num}: {command}')
    settings = [f'{name} = {value!r}' for name, value in config.items()]
    return '\n'.join([*commands, '', *settings]) + '\n'


def read_log(path):
    """The rows of a log.csv as dicts of numbers, without empty cells; [] if it does not exist."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, newline='', encoding='utf-8', errors='replace') as f:
        for line in csv.DictReader(line.replace('\0', '') for line in f):
            try:
                row = {name: float(text) for name, text in line.items() if name in COLUMNS and text}
                rows.append({**row, 'iter': int(row['iter']), 'seconds': row['seconds']})
            except (ValueError, KeyError, TypeError):  # a full disk or a power cut tore the line
                continue
    return rows
