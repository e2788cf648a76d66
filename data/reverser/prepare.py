"""
Strings and their reversals, hello world=dlrow olleh: input.txt, train.bin, val.bin and meta.pkl.

    python data/reverser/prepare.py
"""

import os
import string
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

num_examples = 2000000  # lines, train and val together
seed = 1337  # the same seed gives the same files
if __name__ == '__main__':
    configure(globals())

import numpy as np

from data.write_lines import write_lines

LOWER, LETTERS = string.ascii_lowercase, string.ascii_letters
BOTH = LETTERS + string.digits
ALPHABETS = LOWER, LETTERS, BOTH, LOWER, BOTH  # of the kinds; the last two have spaces


def make(rng, n):
    """n strings of 3 to 25 characters and their reversals, (n, 25); fewer of the last kind."""
    kind, length, place = rng.integers(9, size=n) // 2, rng.integers(3, 26, n), np.arange(25)
    text = np.zeros((n, 25), dtype=np.uint8)
    for k, alphabet in enumerate(ALPHABETS):
        characters = np.frombuffer(alphabet.encode(), np.uint8)
        text[kind == k] = rng.choice(characters, ((kind == k).sum(), 25))
    inner = (place > 0) & (place < length[:, None] - 1)
    text[(rng.random((n, 25)) < 0.15) & inner & (kind >= 3)[:, None]] = ord(' ')
    text[place >= length[:, None]] = 0
    back = np.take_along_axis(text, np.maximum(length[:, None] - 1 - place, 0), axis=1)
    back[place >= length[:, None]] = 0
    return text, back


def kind_of(question):
    has_digits = any(map(str.isdigit, question))
    lower = question.islower() and not has_digits
    if ' ' in question:
        return 'with spaces' if lower else 'letters, digits and spaces'
    if has_digits:
        return 'letters and digits'
    return 'lower case' if lower else 'mixed case'


def kinds(question):
    """[(column, kind)] under which eval.py counts this question."""
    return [('characters', f'{len(question):2d}'), ('kind', kind_of(question))]


def answer(question):
    """The reversal."""
    return question[::-1]


if __name__ == '__main__':
    write_lines(HERE, make, num_examples, seed)
