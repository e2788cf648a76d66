"""
Tasks on lines: datasets whose lines are a question, a mark and an answer, such as 12+3=15. Which
targets count, where windows may begin, and how questions are read back.
"""

import os
from typing import NamedTuple

import numpy as np

from data.tokenizer import char_meta, dataset_meta, from_meta
from support.errors import UserError

# one vocabulary for all tasks, so that a model can be trained on one after another
ASCII = char_meta('\n' + ''.join(map(chr, range(32, 127))))
LONGEST = 64  # characters of a line


class Lines(NamedTuple):
    newline: np.ndarray  # (vocab_size,) of bool: tokens that end a line
    mark: np.ndarray | None  # (vocab_size,) of bool: targets count after this token; None: all do
    per_line: bool  # after the mark of their own line; False: after the first in the window
    align: bool  # windows begin where lines do


def read_lines(meta, vocab_size, mask_before_token, mask_per_line, align_to_lines):
    """
    The Lines for train.py's settings of these names, or None if they are off.

    meta: of the dataset; vocab_size: of the model
    Raises UserError if mask_before_token is not one token, or the vocabulary lacks a newline.
    """
    if not mask_before_token and not align_to_lines:
        return None
    tokenizer, ids = from_meta(meta), np.arange(vocab_size)
    newlines = [i for i in range(tokenizer.vocab_size) if '\n' in tokenizer.decode([i])]
    if not newlines and (align_to_lines or mask_per_line):
        raise UserError(
            'the vocabulary has no newline, so there are no lines; '
            'train with --align_to_lines=False --mask_per_line=False'
        )
    mark = None
    if mask_before_token:
        mark_id = single_token(tokenizer, mask_before_token)
        if mask_per_line and mark_id in newlines:
            raise UserError(
                f'mask_before_token={mask_before_token!r} ends lines, so it cannot stand within '
                'one; train with --mask_per_line=False'
            )
        mark = ids == mark_id
    return Lines(np.isin(ids, newlines), mark, mask_per_line, align_to_lines)


def single_token(tokenizer, text):
    """The id of a text that is one token; else a UserError about mask_before_token."""
    try:
        ids = tokenizer.encode(text)
    except ValueError as e:
        raise UserError(f'mask_before_token={text!r}: {e}') from e
    if len(ids) != 1:
        raise UserError(
            f'mask_before_token={text!r} is {len(ids)} tokens in this vocabulary, it must be one'
        )
    return ids[0]


def mask_targets(windows, lines):
    """
    Which targets of windows (B, T + 1) of token ids count: (B, T) of bool.

    They count after the first mark of their line, the newline included. If a line began before the
    window, only a mark within the window counts. With per_line=False targets count after the first
    mark of the window.
    """
    inputs = windows[:, :-1]
    positions = np.arange(inputs.shape[1])
    # (B, T): the position of the last mark so far, or -1
    last_mark = np.maximum.accumulate(np.where(lines.mark[inputs], positions, -1), axis=1)
    if not lines.per_line:
        return last_mark >= 0
    last_newline = np.maximum.accumulate(np.where(lines.newline[inputs], positions, -1), axis=1)
    return last_mark > last_newline


def find_starts(tokens, lines, block_size, chunk=1 << 24):
    """
    Where windows of block_size + 1 tokens may begin (N,): at lines of 1 to block_size tokens, the
    newline not counted. Raises UserError if there are none.

    tokens: a memmap of ids; `chunk` of them are read at a time
    """
    found = []
    for i in range(0, len(tokens), chunk):
        found.append(np.flatnonzero(lines.newline[tokens[i : i + chunk]]) + i)
    ends = np.concatenate(found)
    if not len(ends):
        raise UserError(
            'the dataset has no newlines, so no lines to align to; '
            'train with --align_to_lines=False'
        )
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts
    fits = (lengths > 0) & (lengths <= block_size) & (starts < len(tokens) - block_size)
    if not fits.any():
        not_empty = lengths[lengths > 0]
        shortest = not_empty.min() if len(not_empty) else 0
        raise UserError(
            f'no line fits in block_size={block_size} (the shortest has {shortest} tokens) with '
            'as many tokens after its start; raise --block_size'
        )
    return starts[fits]


def read_questions(path, lines, most):
    """
    At most `most` lines of a .bin file, evenly spaced: [(question with its mark, answer with its
    newline)], lists of token ids. Lines without a mark are skipped.
    """
    tokens = np.fromfile(path, dtype=dataset_meta(os.path.dirname(path)).get('dtype', 'uint16'))
    ends = np.flatnonzero(lines.newline[tokens])
    starts = np.append(0, ends[:-1] + 1)
    count = min(most, len(ends))
    found = []
    for i in np.arange(count) * len(ends) // max(1, count):
        line = tokens[starts[i] : ends[i] + 1].astype(int)
        marks = np.flatnonzero(lines.mark[line])
        if len(marks):
            answer_at = marks[0] + 1
            found.append((line[:answer_at].tolist(), line[answer_at:].tolist()))
    return found
