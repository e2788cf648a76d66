"""
Expressions in words and in digits, twenty three plus four times seven=23+4*7: input.txt, train.bin,
val.bin and meta.pkl.

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

from data.write_lines import letters, write_lines

ONES = 'zero one two three four five six seven eight nine ten eleven twelve thirteen'.split()
ONES += 'fourteen fifteen sixteen seventeen eighteen nineteen'.split()
TENS = '- - twenty thirty forty fifty sixty seventy eighty ninety'.split()
OPERATORS = {'+': ' plus ', '-': ' minus ', '*': ' times ', '/': ' divided by '}


def in_words(number):
    """0 to 9999 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        unit, words = 10, TENS[number // 10]
    elif number < 1000:
        unit, words = 100, f'{ONES[number // 100]} hundred'
    else:
        unit, words = 1000, f'{ONES[number // 1000]} thousand'
    rest = number % unit
    return f'{words} {in_words(rest)}' if rest else words


def numbers(rng, n):
    """
    n numbers in words and in digits. They have one to four digits, as many of each; one in five has
    one or two decimals; one in ten is negative.
    """
    whole = rng.integers(10 ** rng.integers(1, 5, n))
    places = np.where(rng.random(n) < 0.2, rng.integers(1, 3, n), 0)[:, None]
    decimals = rng.integers(10, size=(n, 2))
    minus = rng.random((n, 1)) < 0.1
    words = [letters(['minus ']) * minus, WHOLE_WORDS[whole], letters([' point']) * (places > 0)]
    digits = [letters(['-']) * minus, WHOLE_DIGITS[whole], letters(['.']) * (places > 0)]
    digit_words = letters([f' {word}' for word in ONES[:10]])
    for place in range(2):
        there = places > place
        words.append(digit_words[decimals[:, place]] * there)
        digits.append(letters('0123456789')[decimals[:, place]] * there)
    return np.hstack(words), np.hstack(digits)


def joined_numbers(rng, n):
    """
    n numbers in PopGPT's words (twentyseven, negativefourteen) and in digits. Half are at most 20,
    four in ten are from 21 to 100, the others at most 999; three in twenty are negative.
    """
    size, low, high = rng.random(n), np.array([1, 21, 100]), np.array([21, 101, 1000])
    group = (size > 0.5).astype(int) + (size > 0.9)
    whole = rng.integers(low[group], high[group])
    whole[(whole == 100) & (rng.random(n) < 0.5)] = 1000  # 'hundred' alone
    minus = rng.random((n, 1)) < 0.15
    words = [letters(['negative']) * minus, JOINED_WORDS[whole]]
    return np.hstack(words), np.hstack([letters(['-']) * minus, JOINED_DIGITS[whole]])


def make(rng, n, numbers=numbers, most=2):
    """n expressions of one to `most` operations in words and in digits."""
    operations = rng.integers(1, most + 1, size=(n, 1))
    words, digits = ([column] for column in numbers(rng, n))
    for i in range(most):
        there, operator = operations > i, rng.integers(4, size=n)
        number_words, number_digits = numbers(rng, n)
        words += [letters(OPERATORS.values())[operator] * there, number_words * there]
        digits += [letters(OPERATORS)[operator] * there, number_digits * there]
    return np.hstack(words), np.hstack(digits)


def make_both(rng, n):
    """n expressions, one in ten in PopGPT's words and of up to three operations."""
    joined = rng.random((n, 1)) < 0.1
    words, digits = make(rng, n)
    joined_words, joined_digits = make(rng, n, joined_numbers, most=3)
    words = np.hstack([words * ~joined, joined_words * joined])
    return words, np.hstack([digits * ~joined, joined_digits * joined])


def in_digits(text):
    """The digits of a number in words, with spaces or joined. Raises KeyError if it is none."""
    whole, point, decimals = re.sub('^(minus |negative)', '', text).partition(' point ')
    digits = VALUES[whole.replace(' ', '')]
    if point:
        digits += '.' + ''.join(VALUES[word] for word in decimals.split())
    return digits if text.startswith(whole) else f'-{digits}'


def answer(question):
    """The expression in digits; None if it has other words."""
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
    operations = 0
    for i in operators:
        # not the minus of a number, which comes first or after an operator
        if i > 0 and i - 1 not in operators and words[i - 1] != 'by':
            operations += 1
    return [('operations', str(operations)), ('decimals', 'some' if 'point' in words else 'none')]


WHOLE_WORDS = letters([in_words(i) for i in range(10000)])
WHOLE_DIGITS = letters([str(i) for i in range(10000)])
VALUES = {in_words(i).replace(' ', ''): str(i) for i in range(10000)} | {'hundred': '100'}
JOINED_WORDS = letters([in_words(i).replace(' ', '') for i in range(1000)] + ['hundred'])
JOINED_DIGITS = letters([str(i) for i in range(1000)] + ['100'])

if __name__ == '__main__':
    write_lines(HERE, make_both, num_examples, seed)
