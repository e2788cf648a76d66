"""
Tasks on lines: datasets whose every line is a question, a mark and an answer, such as 12+3=15. Which targets
count, where batches may begin, and how such datasets are written, split by question, and read back.
"""

import os
import pickle
import zlib
from typing import NamedTuple

import numpy as np

from data.tokenizer import char_meta, dataset_meta, from_meta, short
from data.write import clear
from support.files import write_whole

ASCII = char_meta(
    '\n' + ''.join(map(chr, range(32, 127)))
)  # one vocabulary for all tasks, so that a model can go from one to the next
LONGEST = 64  # characters of a line


class Lines(NamedTuple):
    newline: np.ndarray  # (vocab_size,) of bool: does the token end a line?
    mark: (
        np.ndarray | None
    )  # (vocab_size,) of bool: the token after which targets count; None: all count
    per_line: bool  # of every line, or of a window as a whole?
    align: bool  # do windows begin where lines do?


def read_lines(meta, vocab_size, mask_before_token, mask_per_line, align_to_lines):
    """
    The Lines that train.py's knobs of these names ask for, or None when they ask for nothing.

    meta: of the dataset's tokenizer; vocab_size: ids the model knows
    Raises ValueError where mask_before_token is not one token, or there is no newline among the tokens.
    """
    if not mask_before_token and not align_to_lines:
        return None
    table = lambda ids: np.isin(np.arange(vocab_size), ids)
    tokenizer = from_meta(meta)
    newline = [i for i in range(tokenizer.vocab_size) if '\n' in tokenizer.decode([i])]
    if not newline and (align_to_lines or mask_per_line):
        raise ValueError(
            'the vocabulary has no newline, so there are no lines; train with --align_to_lines=False --mask_per_line=False'
        )
    mark = None
    if mask_before_token:
        try:
            ids = tokenizer.encode(mask_before_token)
        except ValueError as e:
            raise ValueError(f'mask_before_token={mask_before_token!r}: {e}') from e
        if len(ids) != 1:
            raise ValueError(
                f'mask_before_token={mask_before_token!r} is {len(ids)} tokens in this vocabulary, it must be one'
            )
        if mask_per_line and ids[0] in newline:
            raise ValueError(
                f'mask_before_token={mask_before_token!r} ends lines, so it cannot stand within one; train with --mask_per_line=False'
            )
        mark = table(ids)
    return Lines(table(newline), mark, mask_per_line, align_to_lines)


def mask_targets(windows, lines):
    """
    Which targets of windows (B, T + 1) of token ids count: (B, T) of bool. Those after the first mark of their
    line, its newline included; a line that began before the window has no mark unless it is within the window.
    With per_line=False those after the window's first mark.
    """
    seen = windows[:, :-1]  # a target counts by what came before it
    at = np.arange(seen.shape[1])
    last_mark = np.maximum.accumulate(
        np.where(lines.mark[seen], at, -1), axis=1
    )  # (B, T), -1 where there is none yet
    if not lines.per_line:
        return last_mark >= 0
    return last_mark > np.maximum.accumulate(np.where(lines.newline[seen], at, -1), axis=1)


def find_starts(tokens, lines, block_size, chunk=1 << 24):
    """
    Where windows of block_size + 1 tokens may begin (N,): at starts of lines of at most block_size tokens, the
    newline not counted. `tokens` (a memmap of ids) is read chunk by chunk. Raises ValueError if there is none.
    """
    ends = np.concatenate(
        [
            np.flatnonzero(lines.newline[tokens[i : i + chunk]]) + i
            for i in range(0, len(tokens), chunk)
        ]
    )
    if not len(ends):
        raise ValueError(
            'the dataset has no newlines, so no lines to align to; train with --align_to_lines=False'
        )
    starts = np.append(0, ends[:-1] + 1)
    longest = ends - starts
    starts = starts[(longest > 0) & (longest <= block_size) & (starts < len(tokens) - block_size)]
    if not len(starts):
        raise ValueError(
            f'no line fits in block_size={block_size} (the shortest has {longest[longest > 0].min() if longest.any() else 0} tokens) '
            'with as many tokens after its start; raise --block_size'
        )
    return starts


def letters(words):
    """Words as rows of bytes (len(words), longest), 0 where there is nothing, to be picked from by index."""
    return (
        np.array([word.encode() for word in words], dtype='S')
        .view(np.uint8)
        .reshape(len(words), -1)
    )


def write_lines(folder, make, num_examples, seed, mark='=', val_share=0.05):
    """
    Write num_examples lines `question mark answer`: input.txt (first those of train), train.bin, val.bin and meta.pkl.

    make: function(rng, n) -> (questions, answers), at most n rows of ASCII bytes, uint8, 0 where there is nothing
    The checksum of a question decides which split it is in, so they share none. Deterministic; lines longer than
    LONGEST are left out and made up for.
    """
    from tqdm import tqdm

    if seed < 0:
        raise ValueError(f'seed={seed} must not be negative')
    if num_examples < 1000:
        raise ValueError(
            f'num_examples={num_examples} must be at least 1000, so that there are some to hold out'
        )
    if num_examples > 10**9:
        raise ValueError(f'num_examples={num_examples} must be at most 1,000,000,000')
    rng = np.random.default_rng(seed)
    ids = np.zeros(256, dtype=np.uint16)
    for char, i in ASCII['stoi'].items():
        ids[ord(char)] = i
    paths = {split: os.path.join(folder, f'{split}.txt.partial') for split in ('train', 'val')}
    counts, written = {'train': 0, 'val': 0}, 0
    try:
        bar = tqdm(total=num_examples, unit='line', unit_scale=True, desc='writing', disable=None)
        with open(paths['train'], 'wb') as train, open(paths['val'], 'wb') as val, bar:
            while written < num_examples:
                questions, answers = make(rng, 50_000)
                column = lambda char: np.full((len(questions), 1), ord(char), dtype=np.uint8)
                text = np.hstack([questions, column(mark), answers, column('\n')])  # (n, W)
                keep = np.flatnonzero((text > 0).sum(1) - 1 <= LONGEST)[: num_examples - written]
                text, asked = text[keep], np.hstack([questions, column('\n')])[keep]
                checksums = [
                    zlib.crc32(question) for question in asked[asked > 0].tobytes().splitlines()
                ]
                held_out = np.array(checksums) < val_share * 2**32
                for f, split, rows in (
                    (train, 'train', text[~held_out]),
                    (val, 'val', text[held_out]),
                ):
                    f.write(rows[rows > 0].tobytes())
                    counts[split] += len(rows)
                written += len(keep)
                bar.update(len(keep))
        clear(folder, partial=True)
        write_whole(
            os.path.join(folder, 'meta.pkl'), lambda f: pickle.dump(ASCII, f)
        )  # first, as in data/tokenizer.py
        texts = {split: np.fromfile(path, dtype=np.uint8) for split, path in paths.items()}
        for split, text in texts.items():
            write_whole(os.path.join(folder, f'{split}.bin'), ids[text].tofile)
            print(f'{short(folder)}/{split}.bin: {counts[split]:,} lines, {len(text):,} tokens')
        write_whole(
            os.path.join(folder, 'input.txt'), lambda f: [text.tofile(f) for text in texts.values()]
        )
    finally:
        for path in paths.values():
            if os.path.exists(path):
                os.remove(path)


def read_questions(path, lines, most):
    """
    Up to `most` lines of a .bin file, spread evenly over it: [(question with its mark, answer)], as lists of
    token ids; lines without a mark are left out.
    """
    tokens = np.fromfile(path, dtype=dataset_meta(os.path.dirname(path)).get('dtype', 'uint16'))
    ends = np.flatnonzero(lines.newline[tokens])
    starts = np.append(0, ends[:-1] + 1)
    found = []
    count = min(most, len(ends))
    for i in np.arange(count) * len(ends) // max(1, count):
        line = tokens[starts[i] : ends[i] + 1].astype(int)
        at = np.flatnonzero(lines.mark[line])
        if len(at):
            found.append(
                (line[: at[0] + 1].tolist(), line[at[0] + 1 :].tolist())
            )  # the newline ends the answer
    return found
