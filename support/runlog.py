"""
The log of a run: out_dir/log.csv, the same numbers to wandb when asked for, the picture drawn from them,
and out_dir/config.py, the knobs and the command of the run.

    python runlog.py out-a out-b --png=compare.png    # several runs in one picture
"""

import csv
import io
import math
import os
import shlex
import socket
import sys
import threading
import time

from configurator import fail, one_line_errors

if __name__ == '__main__':
    sys.excepthook = one_line_errors  # from here on, since a package of these may be missing
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from support.distributed import gather, print0
from support.files import remove_partials, write_whole

# Of each logged iteration: mean loss over its batch; of each evaluation: train_loss and val_loss; then the health
# of the network: norm of the gradient before clipping, share of steps since the last row that were clipped, at
# evaluations the norms of all weights and of the step they took, and steps skipped since the last row because the
# loss or the gradient was not finite. memory_gb is the peak so far, of the GPU, else of the process.
COLUMNS = (
    'iter',
    'tokens',
    'seconds',
    'loss',
    'train_loss',
    'val_loss',
    'lr',
    'grad_norm',
    'clipped',
    'weight_norm',
    'update_norm',
    'bad_steps',
    'tokens_per_second',
    'mfu',
    'memory_gb',
)


class RunLog:
    def __init__(self, out_dir, config, iter_num=0, tokens=0, run_id=None, quiet=False):
        """
        Open out_dir/log.csv. A run that resumes at iteration `iter_num`, after `tokens` tokens, keeps the rows
        before it, and its seconds count on from theirs. `config`: the knobs, for config.py and wandb. `run_id`: wandb's, of the
        run that goes on, or None. quiet=True, for all ranks but one: does and writes nothing.
        Raises OSError where out_dir cannot be written to.
        """
        self.out_dir, self.path, self.quiet = out_dir, os.path.join(out_dir, 'log.csv'), quiet
        self.broken, self.wandb, self.run_id, self.lock, rows = set(), None, None, None, []
        if not quiet:
            try:
                os.makedirs(out_dir, exist_ok=True)
                self.lock = lock(out_dir)
                remove_partials(out_dir)
                rows = [row for row in read_log(self.path) if row['iter'] < iter_num]
                write_whole(self.path, lambda f: f.write(table(rows, header=True).encode()))
                write_whole(
                    os.path.join(out_dir, 'config.py'),
                    lambda f: f.write(
                        describe(out_dir, config, iter_num).encode(errors='backslashreplace')
                    ),
                )
            except OSError as e:
                raise OSError(f'cannot write into out_dir={out_dir!r}: {e.strerror}') from e
        if config.get('wandb_log') and not quiet:
            try:
                import wandb as client
            except ImportError as e:
                raise ValueError(
                    'wandb_log=True needs the package wandb: pip install wandb, then wandb login'
                ) from e
            try:
                self.wandb = client.init(
                    project=config['wandb_project'],
                    name=config['wandb_run_name'],
                    config=config,
                    id=run_id,
                    resume='allow',
                )
            except Exception as e:  # its errors are of many kinds
                reason = (str(e).strip() or type(e).__name__).rstrip('.')  # names `wandb login`
                raise ValueError(
                    f'wandb does not start: {reason}; WANDB_MODE=offline keeps its '
                    'log here, --wandb_log=False does without'
                ) from e
            self.run_id = self.wandb.id
            self.wandb.define_metric(
                '*', step_metric='iter'
            )  # a resumed run draws on from where it stopped
        # a bar on a terminal, plain lines into files and pipes
        plain = quiet or not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(
            total=config.get('max_iters'),
            initial=iter_num,
            dynamic_ncols=True,
            disable=plain,
            smoothing=0,  # time left: at the speed so far, evaluations included
            bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]',
        )
        if not plain:
            threading.Thread(target=self.tick, daemon=True).start()
        self.started = self.last_time = (
            time.perf_counter()
        )  # of no calendar: never set back, fine on Windows too
        self.last_iter = self.last_row = iter_num
        self.last_tokens = tokens
        self.seconds_before = rows[-1]['seconds'] if rows else 0.0

    def tick(self):
        """Redraw the bar each second, so that the time goes on while a compiler or a long step runs."""
        while not self.bar.disable:
            time.sleep(1)
            self.bar.refresh()

    def seconds(self):
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started

    def evaluation(self, iter_num, tokens, **numbers):
        """An evaluation before iteration iter_num, `tokens` being those trained on before: a row and a new loss.png."""
        self.advance(iter_num)
        self.row(iter=iter_num, tokens=tokens, **numbers)
        self.attempt(
            draw, [self.out_dir], os.path.join(self.out_dir, 'loss.png'), where='as a picture'
        )
        # the speed in the log is that of training alone
        self.last_time, self.last_iter, self.last_tokens = time.perf_counter(), iter_num, tokens

    def iteration(self, iter_num, tokens, loss, clipped, peak_speed, **numbers):
        """
        Iteration iter_num, `tokens` being those trained on up to its end: a row, and a line or the bar.

        clipped: how many steps since the last such row were; peak_speed: tokens/s that would be an MFU of 1, 0 where unknown
        """
        steps, now = iter_num + 1 - self.last_iter, time.perf_counter()
        dt = max(now - self.last_time, 1e-9) / steps  # seconds per iteration
        speed = (tokens - self.last_tokens) / steps / dt
        mfu = speed / peak_speed if peak_speed else None
        self.row(
            iter=iter_num,
            tokens=tokens,
            loss=loss,
            clipped=clipped / (iter_num + 1 - self.last_row),
            tokens_per_second=speed,
            mfu=mfu,
            **numbers,
        )
        text = f'{speed:,.0f} tok/s' + (f', mfu {mfu * 100:.1f}%' if mfu else '')
        if self.bar.disable and not self.quiet:
            losses = f'loss {loss:.4f}, perplexity {perplexity(loss):.2f}'
            print0(f'iter {iter_num}: {losses}, {dt * 1000:.2f} ms, {text}')
        self.bar.set_postfix_str(f'loss {loss:.4f}, {text}', refresh=False)
        self.advance(iter_num + 1)
        self.last_time, self.last_iter, self.last_row, self.last_tokens = (
            now,
            iter_num + 1,
            iter_num + 1,
            tokens,
        )

    def advance(self, iterations):
        """Bring the bar to so many iterations done."""
        try:
            self.bar.update(iterations - self.bar.n)
        except OSError:  # as in print0()
            self.bar.disable = True

    def row(self, **numbers):
        """One row of log.csv; the names are COLUMNS. A disk that does not take it is told once and does not end the run."""
        numbers['seconds'] = round(self.seconds(), 3)
        self.attempt(self.append, numbers)
        if self.wandb:
            self.attempt(
                self.wandb.log,
                {name: value for name, value in numbers.items() if value is not None},
                where='to wandb',
            )

    def append(self, numbers):
        with open(self.path, 'ab+') as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            torn = size > 0 and f.read(1) != b'\n'  # by a disk that was full
            f.write((torn * '\n' + table([numbers], header=size == 0)).encode())

    def close(self):
        self.bar.close()
        if self.lock:
            self.lock.close()
        if self.wandb:
            self.attempt(self.wandb.finish, where='to wandb')

    def attempt(self, write, *args, where=''):
        if self.quiet:
            return
        try:
            write(*args)
            self.broken.discard(where)
        except Exception as e:  # OSError mostly, but a picture and wandb have many ways to fail
            if where not in self.broken:  # said once
                print0(
                    f'cannot write the log {where or f"into {self.out_dir}"}: {getattr(e, "strerror", None) or e}; training goes on'
                )
            self.broken.add(where)


def perplexity(loss):
    """e to the power of a loss: among so many tokens, all alike, a model with that loss guesses."""
    return math.inf if loss > 700 else math.exp(loss)


def lock(folder):
    """
    The open file run.lock in `folder`, locked until this process ends, in whatever way, also over NFS. A ValueError tells
    which process holds it. None where the system has no locks.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    file = open(os.path.join(folder, 'run.lock'), 'a+', encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        raise ValueError(
            f'out_dir={folder!r} is that of a run under way ({file.read().strip()}); give this one its own --out_dir'
        ) from e
    except OSError:  # the file system has none
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    return file


def health(model, before):
    """
    The norm of all weights of `model` and of the step they took from `before`, a list of their values; {} for
    None. All ranks must call it.
    """
    if before is None:
        return {}
    after = [p.detach() for p in model.parameters()]
    return {
        'weight_norm': gather(get_total_norm(after)).item(),
        'update_norm': gather(get_total_norm([a - b for a, b in zip(after, before)])).item(),
    }


def table(rows, header):
    """Rows (dicts) as lines of CSV."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, COLUMNS, restval='')
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def describe(out_dir, config, iter_num):
    """A config file that repeats this run; the command lines that led to it stand on top as comments."""
    path, before = os.path.join(out_dir, 'config.py'), []
    if iter_num and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            before = [line.rstrip() for line in f if line.startswith('# from iteration ')]
    command = f'# from iteration {iter_num}: {shlex.join(["python", *sys.argv])}'.replace('\n', ' ')
    return (
        '\n'.join(
            [*before, command, '', *(f'{name} = {value!r}' for name, value in config.items())]
        )
        + '\n'
    )


def read_log(path):
    """The rows of a log.csv as dicts of numbers, empty cells left out; [] where there is none."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, newline='', encoding='utf-8', errors='replace') as f:
        lines = csv.DictReader(line.replace('\0', '') for line in f)
        for line in lines:
            try:
                row = {name: float(text) for name, text in line.items() if name in COLUMNS and text}
                rows.append({**row, 'iter': int(row['iter']), 'seconds': row['seconds']})
            except (ValueError, KeyError, TypeError):  # torn by a full disk or a power cut
                continue
    return rows


def draw(out_dirs, png):
    """Loss over iterations and over training time of one or more runs, as a picture at `png`; ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError('it needs matplotlib: pip install matplotlib') from e
    matplotlib.use('Agg')  # no screen needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    figure.subplots_adjust(
        left=0.06, right=0.99, top=0.97, bottom=0.12, wspace=0.03
    )  # a layout engine takes twice as long
    for i, out_dir in enumerate(out_dirs):
        rows = read_log(os.path.join(out_dir, 'log.csv'))
        name = os.path.basename(os.path.normpath(out_dir))
        for axis, x in zip(axes, ('iter', 'seconds')):
            axis.plot(*columns(rows, x, 'loss'), color=f'C{i}', alpha=0.25, linewidth=0.8)
            axis.plot(
                *columns(rows, x, 'train_loss'),
                color=f'C{i}',
                linestyle='--',
                label=f'{name}: train',
            )
            axis.plot(
                *columns(rows, x, 'val_loss'),
                color=f'C{i}',
                marker='.',
                label=f'{name}: validation',
            )
    for axis, label in zip(axes, ('iterations', 'seconds of training')):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel('loss (nats per token)')
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=os.path.splitext(png)[1][1:] or 'png')
    plt.close(figure)
    write_whole(png, lambda f: f.write(picture.getvalue()))


def columns(rows, x, y):
    return [row[x] for row in rows if y in row], [row[y] for row in rows if y in row]


if __name__ == '__main__':
    import argparse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out_dirs', nargs='+', help='folders with a log.csv')
    parser.add_argument('--png', default='loss.png', help='where the picture goes')
    args = parser.parse_args()
    missing = [d for d in args.out_dirs if not os.path.exists(os.path.join(d, 'log.csv'))]
    if missing:
        fail(f'no log.csv in {", ".join(missing)}')
    try:
        draw(args.out_dirs, args.png)
    except (
        OSError,
        ValueError,
    ) as e:  # a folder that is not there, a kind of picture that matplotlib does not know
        fail(f'{args.png}: {getattr(e, "strerror", None) or e}')
    print(f'wrote {args.png}')
