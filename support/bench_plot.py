"""bench.py --mode=plot: several runs in one picture."""

import os

from support.errors import UserError
from support.plot import draw
from support.runlog import read_log


def run(folders, png, labels='', title=''):
    """
    Draw the runs in these folders into one picture. folders, labels: separated by commas; without
    labels the folders' names are used. Raises UserError for what cannot be drawn.
    """
    folders = [folder for folder in folders.split(',') if folder]
    labels = labels.split(',') if labels else folders
    if not folders:
        raise UserError('write the folders of the runs to draw: --runs=out-a,out-b')
    if len(set(labels)) != len(folders):
        raise UserError(
            f'{len(folders)} runs need {len(folders)} different labels, not {",".join(labels)}'
        )
    logs = [os.path.join(folder, 'log.csv') for folder in folders]
    missing = [folder for folder, log in zip(folders, logs) if not os.path.exists(log)]
    if missing:
        raise UserError(f'no log.csv in {", ".join(missing)}')
    runs = {label: read_log(log) for label, log in zip(labels, logs)}
    try:
        draw(runs, png, title)
    except (ValueError, OSError) as e:
        raise UserError(f'{png}: {getattr(e, "strerror", None) or e}') from e
