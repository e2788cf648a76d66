"""
Text to train.bin and val.bin: token ids without a header, uint16 or what meta.pkl records.
"""

import json
import os
import pickle
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data.tokenizer import GPT2, from_meta, short
from support.files import write_whole


def to_uint16(ids):
    """A list or array of token ids as a uint16 array; an id that does not fit raises a ValueError."""
    return to_dtype(ids, 'uint16')


def to_dtype(ids, dtype):
    """A list or array of token ids as an array of uint16 or uint32; an id that does not fit raises a ValueError."""
    ids, most = np.asarray(ids), np.iinfo(dtype).max
    if len(ids) and (ids.min() < 0 or ids.max() > most):
        worst = ids.max() if ids.max() > most else ids.min()
        raise ValueError(f'token id {worst} does not fit {dtype} (0 to {most})')
    return ids.astype(dtype)


def clear(folder, partial=False):
    """Remove the dataset in a folder, so that nothing of it stands beside what belongs to another; partial: begun masks too."""
    for name in (
        'train.bin',
        'val.bin',
        'train.mask',
        'val.mask',
        'meta.pkl',
        *(('train.mask.partial', 'val.mask.partial') if partial else ()),
    ):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))


def write_dataset(folder, text, meta=None, val_share=0.1):
    """
    Write train.bin and val.bin for one text, the last `val_share` of its characters held out, and
    meta.pkl when a character vocabulary is given (without one the tokens are GPT-2's BPE).
    """
    print(f'{short(folder)}/input.txt: {len(text):,} characters')
    tokenizer = from_meta(meta or GPT2)
    cut = int(len(text) * (1 - val_share))
    ids = {
        'train': to_uint16(tokenizer.to_array(text[:cut])),
        'val': to_uint16(tokenizer.to_array(text[cut:])),
    }
    clear(folder, partial=True)
    if meta:  # first, so that no .bin is ever there without the vocabulary it was written with
        write_whole(os.path.join(folder, 'meta.pkl'), lambda f: pickle.dump(meta, f))
        print(f'{short(folder)}/meta.pkl: {meta["vocab_size"]} symbols: {"".join(meta["stoi"])!r}')
    for split in ids:
        write_whole(os.path.join(folder, f'{split}.bin'), ids[split].tofile)
        print(f'{short(folder)}/{split}.bin: {len(ids[split]):,} tokens')


class Piece(NamedTuple):
    text: str
    split: str  # 'train' or 'val'
    ends: bool  # does <|endoftext|> follow?
    size: int = 1  # by how much the progress bar grows
    counts: bool = True  # is it to be learned, or only to be read, as a prompt is?


def write_documents(
    folder,
    pieces_after,
    source,
    meta=None,
    total=None,
    unit='doc',
    few='too few documents to hold any out',
    much='no document is left to train on',
    masked=False,
):
    """
    Write train.bin and val.bin from documents that come in pieces, with <|endoftext|> after each,
    on all cores, some megabytes in memory at a time. Where an earlier call was interrupted, this
    one goes on. One that fails leaves nothing.

    pieces_after: function(n) -> iterator over Pieces, from the nth on
    source: what the documents are, and how they are tokenized; progress made on another source is thrown away
    meta: of the tokenizer, written to meta.pkl; None: GPT-2's BPE, whose datasets have none
    total: of the progress bar, in units of Piece.size, or None
    few, much: the errors when nothing would be held out, and when everything would
    masked: also write train.mask and val.mask, a byte a token: 1 for those of Pieces that count
    """
    from tqdm import tqdm

    tokenizer, dtype = from_meta(meta or GPT2), (meta or GPT2).get('dtype', 'uint16')
    paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    masks = {split: os.path.join(folder, f'{split}.mask') for split in paths} if masked else {}
    width, journal = np.dtype(dtype).itemsize, os.path.join(folder, 'progress.json')
    progress = {'source': source, 'pieces': 0, 'size': 0, 'train': 0, 'val': 0}
    if os.path.exists(journal):
        try:
            with open(journal, encoding='utf-8') as f:
                saved = json.load(f)
            there = all(
                os.path.getsize(path + '.partial') >= n * saved[split]
                for n, kind in ((width, paths), (1, masks))
                for split, path in kind.items()
            )
            progress = (
                saved
                if there and saved.keys() == progress.keys() and saved['source'] == source
                else progress
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # a journal that is damaged, or without its files, is none
    files, noted, made = {}, time.monotonic(), not os.path.isdir(folder)

    def encode(pieces):
        """The ids of each split for consecutive pieces, made in a thread; the tokenizers let others run meanwhile."""
        ids, counts = (
            {split: [np.zeros(0, kind)] for split in paths} for kind in (dtype, np.uint8)
        )
        for piece in pieces:
            ends = [tokenizer.eot] if piece.ends and tokenizer.eot is not None else []
            for part in (tokenizer.to_array(piece.text), ends):
                ids[piece.split].append(to_dtype(part, dtype))
                counts[piece.split].append(np.full(len(part), piece.counts, np.uint8))
        return {
            split: (np.concatenate(ids[split]), np.concatenate(counts[split])) for split in paths
        }

    def note():
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())  # a journal must not know of what a power cut takes
        write_whole(journal, lambda f: f.write(json.dumps(progress).encode()))

    def write(pieces, encoded):
        if not masked and not all(piece.counts for piece in pieces):
            raise ValueError('prompts come after documents without any; prepare them apart')
        now = {
            **progress,
            'pieces': progress['pieces'] + len(pieces),
            'size': progress['size'] + sum(piece.size for piece in pieces),
        }
        for split, (ids, counts) in encoded.result().items():
            ids.tofile(files[paths[split]])
            if masked:
                counts.tofile(files[masks[split]])
            now[split] += len(ids)
        progress.update(now)  # all at once: an interruption comes before or after
        bar.update(sum(piece.size for piece in pieces))

    cores, done = os.cpu_count(), False
    try:
        os.makedirs(folder, exist_ok=True)
        for n, kind in ((width, paths), (1, masks)):
            for split, path in kind.items():
                files[path] = open(path + '.partial', 'ab')
                files[path].truncate(n * progress[split])
        bar = tqdm(
            total=total,
            initial=progress['size'],
            unit=unit,
            unit_scale=True,
            desc='tokenizing',
            disable=None,
        )
        with bar, ThreadPoolExecutor(cores) as pool:
            waiting, batch, length = deque(), [], 0
            for piece in pieces_after(progress['pieces']):
                batch.append(piece)
                length += len(piece.text)
                if length >= 2**18 or len(batch) >= 1000:
                    waiting.append((batch, pool.submit(encode, batch)))
                    batch, length = [], 0
                if len(waiting) > 2 * cores:
                    write(*waiting.popleft())
                if time.monotonic() > noted + 5:
                    note()
                    noted = time.monotonic()
            waiting.append((batch, pool.submit(encode, batch)))
            while waiting:
                write(*waiting.popleft())
        if not progress['train'] or not progress['val']:
            raise ValueError(much if progress['val'] else few)
        done = True
    except ValueError:  # the input is wrong: nothing to go on from
        progress['pieces'] = 0
        raise
    finally:  # after an interruption the next call goes on from here
        if not done and progress['pieces']:
            note()
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
            f.close()
        if not done and not progress['pieces']:
            for path in (journal, *(path + '.partial' for path in files)):
                if os.path.exists(path):
                    os.remove(path)
            if made and os.path.isdir(folder):
                os.rmdir(folder)
    clear(folder, partial=not masked)
    if meta:
        write_whole(os.path.join(folder, 'meta.pkl'), lambda f: pickle.dump(meta, f))
    for split in paths:
        for path in (
            masks.get(split),
            paths[split],
        ):  # a mask first: without one all tokens would count
            if path:
                os.replace(path + '.partial', path)
        print(f'{short(paths[split])}: {progress[split]:,} tokens')
    if os.path.exists(journal):
        os.remove(journal)
