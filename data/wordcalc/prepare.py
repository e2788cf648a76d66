"""
Expressions in words and in digits, twenty three plus four times seven=23+4*7: input.txt, train.bin, val.bin, meta.pkl.

    python data/wordcalc/prepare.py
"""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

num_examples = 2000000  # lines, train and val together
seed = 1337  # the same seed gives the same files
if __name__ == '__main__':
    configure(globals())

import numpy as np

from data.lines import letters, write_lines

ONES = (
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen'
).split()
TENS = '- - twenty thirty forty fifty sixty seventy eighty ninety'.split()
OPERATORS = {'+': ' plus ', '-': ' minus ', '*': ' times ', '/': ' divided by '}


def in_words(number):
    """0 to 9999 as one says it."""
    if number < 20:
        return ONES[number]
    for unit, name in ((1000, 'thousand'), (100, 'hundred')):
        if number >= unit:
            return f'{ONES[number // unit]} {name}' + (
                f' {in_words(number % unit)}' if number % unit else ''
            )
    return TENS[number // 10] + (f' {ONES[number % 10]}' if number % 10 else '')


def numbers(rng, n):
    """n numbers in words and in digits: of one to four digits, one in five with one or two decimals, one in ten negative."""
    whole = rng.integers(10 ** rng.integers(1, 5, n))
    places = np.where(rng.random(n) < 0.2, rng.integers(1, 3, n), 0)[:, None]
    decimals = rng.integers(10, size=(n, 2))
    minus = rng.random((n, 1)) < 0.1
    words = [letters(['minus ']) * minus, WHOLE_WORDS[whole], letters([' point']) * (places > 0)]
    digits = [letters(['-']) * minus, WHOLE_DIGITS[whole], letters(['.']) * (places > 0)]
    for place in range(2):
        there = places > place
        words.append(letters([f' {word}' for word in ONES[:10]])[decimals[:, place]] * there)
        digits.append(letters('0123456789')[decimals[:, place]] * there)
    return np.hstack(words), np.hstack(digits)


def joined_numbers(rng, n):
    """
    n numbers in PopGPT's words and in digits, twentyseven and negativefourteen: half up to 20, four
    in ten up to 100, the others up to 999; three in twenty negative.
    """
    size, high = rng.random(n), np.array([21, 101, 1000])
    group = (size > 0.5).astype(int) + (size > 0.9)
    whole = rng.integers(np.array([1, 21, 100])[group], high[group])
    whole[(whole == 100) & (rng.random(n) < 0.5)] = 1000  # 'hundred' alone
    minus = rng.random((n, 1)) < 0.15
    words = [letters(['negative']) * minus, JOINED_WORDS[whole]]
    return np.hstack(words), np.hstack([letters(['-']) * minus, JOINED_DIGITS[whole]])


def make(rng, n, numbers=numbers, most=2):
    """n expressions of one to `most` operations in words and in digits."""
    operations = rng.integers(1, most + 1, size=(n, 1))
    columns = [numbers(rng, n)]
    for i in range(most):
        there, operator = operations > i, rng.integers(4, size=n)
        columns.append(
            tuple(letters(table)[operator] * there for table in (OPERATORS.values(), OPERATORS))
        )
        columns.append(tuple(part * there for part in numbers(rng, n)))
    return tuple(np.hstack(parts) for parts in zip(*columns))


def make_both(rng, n):
    """n expressions, one in ten in PopGPT's words and of up to three operations."""
    joined = rng.random((n, 1)) < 0.1
    plain, popgpt = make(rng, n), make(rng, n, joined_numbers, most=3)
    return tuple(np.hstack([a * ~joined, b * joined]) for a, b in zip(plain, popgpt))


def in_digits(text):
    """The digits of a number in words, with spaces or joined. KeyError where it is none."""
    whole, point, decimals = re.sub('^(minus |negative)', '', text).partition(' point ')
    digits = VALUES[whole.replace(' ', '')]
    if point:
        digits += '.' + ''.join(VALUES[word] for word in decimals.split())
    return digits if text.startswith(whole) else f'-{digits}'


def answer(question):
    """The expression in digits, None where it has other words."""
    parts = re.split(f'({"|".join(OPERATORS.values())})', question)
    signs = {word: sign for sign, word in OPERATORS.items()}
    try:
        return ''.join(signs.get(part) or in_digits(part) for part in parts)
    except KeyError:
        return None


def kinds(question):
    """[(column, kind)] under which eval.py counts this question."""
    words = question.split()
    operators = [i for i, word in enumerate(words) if word in ('plus', 'minus', 'times', 'divided')]
    between = [
        i for i in operators if i > 0 and i - 1 not in operators and words[i - 1] != 'by'
    ]  # not a number's own minus
    return [('operations', str(len(between))), ('decimals', 'some' if 'point' in words else 'none')]


WHOLE_WORDS, WHOLE_DIGITS = (
    letters([in_words(i) for i in range(10000)]),
    letters([str(i) for i in range(10000)]),
)
VALUES = {in_words(i).replace(' ', ''): str(i) for i in range(10000)} | {'hundred': '100'}
JOINED_WORDS = letters([in_words(i).replace(' ', '') for i in range(1000)] + ['hundred'])
JOINED_DIGITS = letters([str(i) for i in range(1000)] + ['100'])

if __name__ == '__main__':
    write_lines(HERE, make_both, num_examples, seed)
