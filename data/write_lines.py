"""Write datasets of lines (data/lines.py), with train and val split by question."""

import os
import zlib

import numpy as np

from data.lines import ASCII, LONGEST
from data.write import SPLITS, clear, remove, short, write_meta
from support.errors import UserError
from support.files import write_whole

DRAWN = 50_000  # lines made at a time
VAL_SHARE = 0.05  # of the questions


def letters(words):
    """Words as rows of bytes (len(words), longest), padded with 0; index it to pick words."""
    rows = np.array([word.encode() for word in words], dtype='S')
    return rows.view(np.uint8).reshape(len(words), -1)


def write_lines(folder, make, num_examples, seed):
    """
    Write num_examples lines of question, = and answer: input.txt (first the lines of train),
    train.bin, val.bin and meta.pkl. The same arguments give the same files.

    make: function(rng, n) -> (questions, answers), at most n rows of ASCII bytes (uint8), 0 is none
    """
    if seed < 0:
        raise UserError(f'seed={seed} must not be negative')
    if num_examples < 1000:
        raise UserError(
            f'num_examples={num_examples} must be at least 1000, so that some can be held out'
        )
    if num_examples > 10**9:
        raise UserError(f'num_examples={num_examples} must be at most 1,000,000,000')
    paths = {split: os.path.join(folder, f'{split}.txt.partial') for split in SPLITS}
    try:
        with open(paths['train'], 'wb') as train, open(paths['val'], 'wb') as val:
            for rows, held_out in draw(make, num_examples, seed):
                train.write(text_of(rows[~held_out]))
                val.write(text_of(rows[held_out]))
        texts = {split: np.fromfile(path, dtype=np.uint8) for split, path in paths.items()}
    finally:
        remove(paths.values())
    clear(folder)
    write_meta(folder, ASCII)
    for split in SPLITS:
        write_split(os.path.join(folder, f'{split}.bin'), texts[split])

    def write_texts(f):
        for split in SPLITS:
            texts[split].tofile(f)

    write_whole(os.path.join(folder, 'input.txt'), write_texts)


def draw(make, num_examples, seed):
    """
    Yield num_examples lines in batches: rows of bytes (n, W), and which of them are val (n,).

    Lines longer than LONGEST are replaced by others. The checksum of a question decides its split,
    so train and val share no question.
    """
    from tqdm import tqdm

    rng, left = np.random.default_rng(seed), num_examples
    with tqdm(total=left, unit='line', unit_scale=True, desc='writing', disable=None) as bar:
        while left:
            questions, answers = make(rng, DRAWN)
            marks = np.full((len(questions), 1), ord('='), dtype=np.uint8)
            newlines = np.full((len(questions), 1), ord('\n'), dtype=np.uint8)
            rows = np.hstack([questions, marks, answers, newlines])
            lengths = (rows > 0).sum(axis=1) - 1  # without the newline
            asked = text_of(np.hstack([questions, newlines])).splitlines()
            checksums = np.array([zlib.crc32(question) for question in asked])
            held_out = checksums < VAL_SHARE * 2**32
            keep = np.flatnonzero(lengths <= LONGEST)[:left]
            yield rows[keep], held_out[keep]
            left -= len(keep)
            bar.update(len(keep))


def text_of(rows):
    """Rows of bytes one after the other, without their zeros."""
    return rows[rows > 0].tobytes()


def write_split(path, text):
    """Write a .bin file of a text, an array of ASCII bytes."""
    ids = np.zeros(256, dtype=np.uint16)
    for char, i in ASCII['stoi'].items():
        ids[ord(char)] = i
    write_whole(path, ids[text].tofile)
    lines = np.count_nonzero(text == ord('\n'))
    print(f'{short(path)}: {lines:,} lines, {len(text):,} tokens')
