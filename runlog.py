"""
The log of a run: out_dir/log.csv, the same numbers to wandb when asked for, and the picture drawn from them.

    python runlog.py out-a out-b --png=compare.png    # several runs in one picture
"""

import csv
import os
import time

COLUMNS = ('iter', 'seconds', 'loss', 'train_loss', 'val_loss', 'lr', 'tokens_per_second', 'mfu')


class RunLog:

    def __init__(self, out_dir, iter_num=0, wandb=None):
        """
        Open out_dir/log.csv. A run that resumes at iteration `iter_num` keeps the rows before it, and
        its seconds count on from theirs. `wandb`: what to pass to wandb.init, or None.
        """
        self.out_dir, self.path, self.drawn = out_dir, os.path.join(out_dir, 'log.csv'), time.time()
        try:
            os.makedirs(out_dir, exist_ok=True)
            rows = [row for row in read_log(self.path) if row['iter'] < iter_num]
            self.file = open(self.path, 'w', newline='', encoding='utf-8')
        except OSError as e:
            raise OSError(f'cannot write into out_dir={out_dir!r}: {e.strerror}') from e
        self.seconds_before = rows[-1]['seconds'] if rows else 0.0
        self.writer = csv.DictWriter(self.file, COLUMNS, restval='')
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.wandb = None
        if wandb:
            try:
                import wandb as client
            except ImportError as e:
                raise ValueError('wandb_log=True needs the package wandb: pip install wandb, then wandb login') from e
            self.wandb = client.init(**wandb)

    def row(self, seconds, **numbers):
        """One row. `seconds` since this process began to train; the other names are COLUMNS."""
        numbers['seconds'] = round(self.seconds_before + seconds, 3)
        self.writer.writerow(numbers)
        self.file.flush()
        if self.wandb:
            self.wandb.log({name: value for name, value in numbers.items() if value is not None})

    def picture(self, final):
        """Redraw out_dir/loss.png, but not again within a minute unless final: it takes some tenths of a second."""
        if final or time.time() - self.drawn > 60:
            draw([self.out_dir], os.path.join(self.out_dir, 'loss.png'))
            self.drawn = time.time()


def read_log(path):
    """The rows of a log.csv as dicts of numbers, empty cells left out; [] where there is none."""
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        rows = [{name: float(text) for name, text in row.items() if name in COLUMNS and text} for row in csv.DictReader(f)]
    return [{**row, 'iter': int(row['iter'])} for row in rows if 'iter' in row and 'seconds' in row]


def draw(out_dirs, png):
    """Loss over iterations and over training time of one or more runs, as a picture at `png`."""
    try:
        import matplotlib
    except ImportError:
        print(f'no {png}: it needs matplotlib (pip install matplotlib)')
        return
    matplotlib.use('Agg') # no screen needed
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout='constrained')
    for i, out_dir in enumerate(out_dirs):
        rows = read_log(os.path.join(out_dir, 'log.csv'))
        name = os.path.basename(os.path.normpath(out_dir))
        for axis, x in zip(axes, ('iter', 'seconds')):
            axis.plot(*columns(rows, x, 'loss'), color=f'C{i}', alpha=0.25, linewidth=0.8)
            axis.plot(*columns(rows, x, 'train_loss'), color=f'C{i}', linestyle='--', label=f'{name}: train')
            axis.plot(*columns(rows, x, 'val_loss'), color=f'C{i}', marker='.', label=f'{name}: validation')
    for axis, label in zip(axes, ('iterations', 'seconds of training')):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel('loss (nats per token)')
    figure.savefig(png, dpi=110)
    plt.close(figure)


def columns(rows, x, y):
    return [row[x] for row in rows if y in row], [row[y] for row in rows if y in row]


if __name__ == '__main__':
    import argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dirs', nargs='+', help='folders with a log.csv')
    parser.add_argument('--png', default='loss.png', help='where the picture goes')
    args = parser.parse_args()
    missing = [d for d in args.out_dirs if not os.path.exists(os.path.join(d, 'log.csv'))]
    if missing:
        parser.error(f'no log.csv in {", ".join(missing)}')
    draw(args.out_dirs, args.png)
    print(f'wrote {args.png}')
