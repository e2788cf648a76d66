"""
Expressions and their values, 2+4-8*10=-74: input.txt, train.bin, val.bin and meta.pkl.

    python data/calculator/prepare.py
    python data/calculator/prepare.py --max_operations=1 --max_places=2
"""

import os
import re
import sys
from fractions import Fraction  # noqa: F401, eval() in answer() uses it

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

num_examples = 2000000  # lines, train and val together
seed = 1337  # the same seed gives the same files
max_operations = 2  # operations in an expression at most, 1 or 2
max_digits = 3  # digits before the point at most, 1 to 6
max_places = 4  # digits after it at most, 0 to 4; three in five numbers are integers
operators = '++--*/'  # each as often as it stands here: sums are what a small model can learn
reverse_answer = (
    False  # True: answers from their last digit to their first, as one computes them on paper
)
if __name__ == '__main__':
    config, _ = configure(globals())

import numpy as np

from data.lines import write_lines

ONE = 10**4  # numbers are integers in units of the fourth decimal place


def numbers(rng, n):
    """n numbers: as many below 10 as below 100 and below 1000; half get no decimals, half 0 to 4; one in eight negative."""
    whole = rng.integers(10 ** rng.integers(1, max_digits + 1, n))
    places = np.where(rng.random(n) < 0.5, 0, rng.integers(0, max_places + 1, n))
    decimals = rng.integers(10**places) * 10 ** (4 - places)
    return (whole * ONE + decimals) * rng.choice([1, 1, 1, 1, 1, 1, 1, -1], n)


def combine(left, op, right):
    """left op right, elementwise and exact: fractions as pairs of arrays of Python's integers, op of '+-*/'."""
    (a, b), (c, d) = left, right
    top, bottom = a * d + b * c, b * d
    for sign, values in (
        ('-', (a * d - b * c, b * d)),
        ('*', (a * c, b * d)),
        ('/', (a * d, b * c)),
    ):
        top, bottom = np.where(op == sign, values[0], top), np.where(op == sign, values[1], bottom)
    return top, bottom


def rounded(top, bottom):
    """top / bottom in units of the fourth decimal place, halves to the even one, as int64."""
    top, bottom = np.where(bottom < 0, -top, top) * ONE, abs(bottom)
    down, rest = top // bottom, top % bottom
    return (down + ((2 * rest > bottom) | ((2 * rest == bottom) & (down % 2 == 1)))).astype(
        np.int64
    )


def written(values, width=11):
    """Numbers in units of the fourth decimal place as rows of bytes (n, width + 6), without zeros that say nothing."""
    powers = 10 ** np.arange(width + 3, -1, -1)
    digits = (abs(values)[:, None] // powers % 10 + ord('0')).astype(np.uint8)  # (n, width + 4)
    before, after = digits[:, :width], digits[:, width:]
    before[:, :-1] *= abs(values)[:, None] >= powers[: width - 1]
    after *= abs(values)[:, None] % (powers[width:] * 10) > 0
    minus, point = (values < 0) * np.uint8(ord('-')), (after[:, 0] > 0) * np.uint8(ord('.'))
    return np.hstack([minus[:, None], before, point[:, None], after])


def make(rng, n):
    """At most n expressions and their values; what divides by zero or goes beyond 1e10 is left out."""
    a, b, c = (numbers(rng, n) for _ in range(3))
    first, second = (rng.choice(list(operators), n) for _ in range(2))
    second = np.where(rng.integers(1, max_operations + 1, n) == 2, second, '')
    binds = np.isin(first, ['+', '-']) & np.isin(
        second, ['*', '/']
    )  # the second operation comes first
    x, y, z = ((v.astype(object), np.full(n, ONE, dtype=object)) for v in (a, b, c))
    fill = np.where(second == '', '+', second)
    z = np.where(second == '', 0, z[0]), z[1]
    late, early = combine(x, first, combine(y, fill, z)), combine(combine(x, first, y), fill, z)
    top, bottom = (np.where(binds, l, e) for l, e in zip(late, early))
    divides = ((first == '/') & (b == 0)) | ((second == '/') & (c == 0))
    keep = ~divides & (bottom != 0)
    bottom[~keep] = 1
    keep &= abs(top) <= 10**10 * abs(bottom)
    values = rounded(np.where(keep, top, 0), bottom)
    signs = [
        np.where(
            op == '', 0, np.frombuffer(np.where(op == '', '+', op).astype('S1').tobytes(), np.uint8)
        ).astype(np.uint8)[:, None]
        for op in (first, second)
    ]
    last = written(c, 6) * (second != '')[:, None]
    return np.hstack([written(a, 6), signs[0], written(b, 6), signs[1], last])[keep], written(
        values
    )[keep][:, :: -1 if reverse_answer else 1]


def kinds(question):
    """[(column, kind)] under which eval.py counts this question."""
    parts = re.findall(r'(-?\d+(?:\.\d+)?)([-+*/]?)', question)
    operators = ' '.join(sorted(op for _, op in parts if op))
    places = max(len(number.partition('.')[2]) for number, _ in parts)
    sums = 'sums and differences' if set(operators) <= set('+- ') else 'with * or /'
    mix = f'{sums}, {"one operation" if len(parts) == 2 else "two operations"}, {"at most 2" if places <= 2 else "3 or 4"} decimals'
    return [
        ('operations', str(len(parts) - 1)),
        ('operators', operators),
        ('decimals', str(places)),
        ('mix', mix),
    ]


def answer(question):
    """The value of an expression of any length, written as in the lines; None where it has none."""
    number = r'\d+(?:\.\d+)?'
    if not re.fullmatch(f'-?{number}([-+*/]-?{number})*', question):  # eval() gets no other
        return None
    try:
        value = round(eval(re.sub(number, r'Fraction("\g<0>")', question)) * ONE)
    except ZeroDivisionError:
        return None
    text = written(np.array([value])) if abs(value) <= 10**10 * ONE else np.zeros((1, 0), np.uint8)
    return text[text > 0].tobytes().decode() or None


if __name__ == '__main__':
    for name, least, most in (('max_operations', 1, 2), ('max_digits', 1, 6), ('max_places', 0, 4)):
        if not least <= config[name] <= most:
            raise ValueError(f'{name}={config[name]} must be from {least} to {most}')
    if not operators or set(operators) - set('+-*/'):
        raise ValueError(f'operators={operators!r} must be some of + - * /')
    write_lines(HERE, make, num_examples, seed)
