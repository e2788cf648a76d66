"""
Expressions in words and in digits, twenty three plus four times seven=23+4*7: input.txt, train.bin, val.bin, meta.pkl.

    python data/wordcalc/prepare.py
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

num_examples = 2000000 # lines, train and val together
seed = 1337 # the same seed gives the same files
if __name__ == '__main__':
    configure(globals())

import numpy as np

from data.lines import letters, write_lines

ONES = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
        'eighteen nineteen').split()
TENS = '- - twenty thirty forty fifty sixty seventy eighty ninety'.split()
OPERATORS = {'+': ' plus ', '-': ' minus ', '*': ' times ', '/': ' divided by '}


def in_words(number):
    """0 to 9999 as one says it."""
    if number < 20:
        return ONES[number]
    for unit, name in ((1000, 'thousand'), (100, 'hundred')):
        if number >= unit:
            return f'{ONES[number // unit]} {name}' + (f' {in_words(number % unit)}' if number % unit else '')
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


def make(rng, n):
    """n expressions of one or two operations in words and in digits."""
    two = rng.integers(2, size=(n, 1)) == 1
    columns = [numbers(rng, n)]
    for there in (True, two):
        operator = rng.integers(4, size=n)
        columns.append(tuple(letters(table)[operator] * there for table in (OPERATORS.values(), OPERATORS)))
        columns.append(tuple(part * there for part in numbers(rng, n)))
    return tuple(np.hstack(parts) for parts in zip(*columns))


def kinds(question):
    """[(column, kind)] under which eval.py counts this question."""
    words = question.split()
    operators = [i for i, word in enumerate(words) if word in ('plus', 'minus', 'times', 'divided')]
    between = [i for i in operators if i > 0 and i - 1 not in operators and words[i - 1] != 'by'] # not a number's own minus
    return [('operations', str(len(between))), ('decimals', 'some' if 'point' in words else 'none')]


WHOLE_WORDS, WHOLE_DIGITS = letters([in_words(i) for i in range(10000)]), letters([str(i) for i in range(10000)])

if __name__ == '__main__':
    write_lines(HERE, make, num_examples, seed)
