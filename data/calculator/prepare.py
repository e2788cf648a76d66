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
operators = '++--*/'  # each equally often, so + and - are twice as frequent as * and /
if __name__ == '__main__':
    config, _ = configure(globals())

import numpy as np

from data.write_lines import write_lines
from support.errors import UserError

ONE = 10**4  # numbers are integers in units of the fourth decimal place


def numbers(rng, n):
    """
    n numbers. The part before the point is drawn below 10, 100, ... 10**max_digits, each bound
    equally often. Half have 0 to max_places decimals, the others none; one in eight is negative.
    """
    whole = rng.integers(10 ** rng.integers(1, max_digits + 1, n))
    places = np.where(rng.random(n) < 0.5, 0, rng.integers(0, max_places + 1, n))
    decimals = rng.integers(10**places) * 10 ** (4 - places)
    return (whole * ONE + decimals) * rng.choice([1, 1, 1, 1, 1, 1, 1, -1], n)


def combine(left, op, right):
    """left op right, elementwise. Fractions are pairs of object arrays, so they stay exact."""
    (a, b), (c, d) = left, right
    tops = [a * d + b * c, a * d - b * c, a * c]
    top = np.select([op == '+', op == '-', op == '*'], tops, default=a * d)
    return top, np.where(op == '/', b * c, b * d)


def evaluate(a, first, b, second, c):
    """a first b second c with the usual precedence, as a fraction; without second, a first b."""
    x, y, z = ((v.astype(object), np.full(len(v), ONE, dtype=object)) for v in (a, b, c))
    z = np.where(second == '', 0, z[0]), z[1]
    second = np.where(second == '', '+', second)
    second_binds = np.isin(first, ['+', '-']) & np.isin(second, ['*', '/'])
    right_first = combine(x, first, combine(y, second, z))
    left_first = combine(combine(x, first, y), second, z)
    top = np.where(second_binds, right_first[0], left_first[0])
    return top, np.where(second_binds, right_first[1], left_first[1])


def rounded(top, bottom):
    """top / bottom in units of the fourth decimal place, halves to the even one, as int64."""
    top, bottom = np.where(bottom < 0, -top, top) * ONE, abs(bottom)
    down, rest = top // bottom, top % bottom
    is_half = 2 * rest == bottom
    up = (2 * rest > bottom) | (is_half & (down % 2 == 1))
    return (down + up).astype(np.int64)


def written(values, width=11):
    """
    Numbers in units of the fourth decimal place as rows of bytes (n, width + 6), without leading
    and trailing zeros.
    """
    powers = 10 ** np.arange(width + 3, -1, -1)
    sizes = abs(values)[:, None]
    digits = (sizes // powers % 10 + ord('0')).astype(np.uint8)  # (n, width + 4)
    before, after = digits[:, :width], digits[:, width:]
    before[:, :-1][sizes < powers[: width - 1]] = 0
    after[sizes % (powers[width:] * 10) == 0] = 0
    minus = np.where(values < 0, ord('-'), 0).astype(np.uint8)
    point = np.where(after[:, 0] > 0, ord('.'), 0).astype(np.uint8)
    return np.hstack([minus[:, None], before, point[:, None], after])


def make(rng, n):
    """
    At most n expressions and their values, rows of bytes. Skips expressions that divide by zero and
    values beyond 1e10.
    """
    a, b, c = (numbers(rng, n) for _ in range(3))
    first, second = (rng.choice(list(operators), n) for _ in range(2))
    second = np.where(rng.integers(1, max_operations + 1, n) == 2, second, '')
    top, bottom = evaluate(a, first, b, second, c)
    keep = bottom != 0  # no division by zero
    bottom[~keep] = 1
    keep &= abs(top) <= 10**10 * abs(bottom)
    values = rounded(np.where(keep, top, 0), bottom)
    signs = [op.astype('S1').view(np.uint8)[:, None] for op in (first, second)]
    last = written(c, 6)
    last[second == ''] = 0
    questions = np.hstack([written(a, 6), signs[0], written(b, 6), signs[1], last])
    return questions[keep], written(values)[keep]


def kinds(question):
    """[(column, kind)] under which eval.py counts this question."""
    parts = re.findall(r'(-?\d+(?:\.\d+)?)([-+*/]?)', question)
    used = sorted(op for _, op in parts if op)
    places = max(len(number.partition('.')[2]) for number, _ in parts)
    sums = 'sums and differences' if set(used) <= {'+', '-'} else 'with * or /'
    count = 'one operation' if len(parts) == 2 else 'two operations'
    decimals = 'at most 2 decimals' if places <= 2 else '3 or 4 decimals'
    return [
        ('operations', str(len(parts) - 1)),
        ('operators', ' '.join(used)),
        ('decimals', str(places)),
        ('mix', f'{sums}, {count}, {decimals}'),
    ]


def answer(question):
    """The value of an expression of any length, as in the lines; None if it has none."""
    number = r'\d+(?:\.\d+)?'
    if not re.fullmatch(f'-?{number}([-+*/]-?{number})*', question):  # eval() gets nothing else
        return None
    try:
        value = round(eval(re.sub(number, r'Fraction("\g<0>")', question)) * ONE)
    except ZeroDivisionError:
        return None
    if abs(value) > 10**10 * ONE:
        return None
    text = written(np.array([value]))
    return text[text > 0].tobytes().decode()


if __name__ == '__main__':
    for name, least, most in (('max_operations', 1, 2), ('max_digits', 1, 6), ('max_places', 0, 4)):
        if not least <= config[name] <= most:
            raise UserError(f'{name}={config[name]} must be from {least} to {most}')
    if not operators or set(operators) - set('+-*/'):
        raise UserError(f'operators={operators!r} must be some of + - * /')
    write_lines(HERE, make, num_examples, seed)
