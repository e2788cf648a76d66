"""The picture of one or more runs: loss over training time and over iterations."""

import io
import os

from support.errors import UserError
from support.files import write_whole


def draw(runs, png, title=''):
    """
    Draw runs, {label: rows of log.csv}, into the picture file `png`. Raises UserError if
    matplotlib is missing or does not know this kind of picture, OSError if it cannot be written.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise UserError('it needs matplotlib: pip install matplotlib') from e
    matplotlib.use('Agg')  # needs no screen
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    # fixed margins, since a layout engine takes twice as long
    top = 0.9 if title else 0.97
    figure.subplots_adjust(left=0.06, right=0.99, top=top, bottom=0.12, wspace=0.03)
    for number, (label, rows) in enumerate(runs.items()):
        draw_run(left, 'seconds', label, rows, color=f'C{number}')
        draw_run(right, 'iter', label, rows, color=f'C{number}')
    left.set(xlabel='seconds of training', ylabel='loss (nats per token)')
    right.set(xlabel='iterations')
    figure.suptitle(title)
    right.legend()
    picture, kind = io.BytesIO(), os.path.splitext(png)[1][1:]
    figure.savefig(picture, dpi=110, format=kind or 'png')
    plt.close(figure)
    write_whole(png, lambda f: f.write(picture.getvalue()))


def draw_run(axis, x, label, rows, color):
    """The losses of one run over column `x`; those of single batches are faint."""
    style = {'color': color}
    axis.plot(*columns(rows, x, 'loss'), **style, alpha=0.25, linewidth=0.8)
    axis.plot(*columns(rows, x, 'train_loss'), **style, linestyle='--', label=f'{label}: training')
    axis.plot(*columns(rows, x, 'val_loss'), **style, marker='.', label=f'{label}: validation')
    axis.grid(alpha=0.3)


def columns(rows, x, y):
    """Two columns of the rows that have y."""
    rows = [row for row in rows if y in row]
    return [row[x] for row in rows], [row[y] for row in rows]
