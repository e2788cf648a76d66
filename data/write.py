"""
Write train.bin and val.bin: token ids without a header, uint16 or the dtype in meta.pkl.
"""

import json
import os
import pickle
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data.tokenizer import GPT2, from_meta
from support.errors import UserError
from support.files import write_whole

SPLITS = ('train', 'val')


def short(path):
    """`path` relative to the current folder; unchanged if it is on another drive of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path


def to_uint16(ids):
    """A list or array of token ids as a uint16 array. Raises UserError if an id does not fit."""
    return to_dtype(ids, 'uint16')


def to_dtype(ids, dtype):
    """Token ids as an array of uint16 or uint32. Raises UserError if an id does not fit."""
    ids, largest = np.asarray(ids), np.iinfo(dtype).max
    for i in (ids.max(initial=0), ids.min(initial=0)):
        if not 0 <= i <= largest:
            raise UserError(f'token id {i} does not fit {dtype} (0 to {largest})')
    return ids.astype(dtype)


def remove(paths):
    """Remove the files that exist."""
    for path in paths:
        if os.path.exists(path):
            os.remove(path)


def clear(folder, keep_partial_masks=False):
    """Remove the dataset in a folder, so that no file of it stays beside those of a new one."""
    names = ['train.bin', 'val.bin', 'train.mask', 'val.mask', 'meta.pkl']
    if not keep_partial_masks:
        names += ['train.mask.partial', 'val.mask.partial']
    remove(os.path.join(folder, name) for name in names)


def write_meta(folder, meta):
    """Write meta.pkl. It comes before the .bin files, so that they never lack their vocabulary."""
    write_whole(os.path.join(folder, 'meta.pkl'), lambda f: pickle.dump(meta, f))


# -----------------------------------------------------------------------------
# one text
def write_dataset(folder, text, meta=None, val_share=0.1):
    """
    Write train.bin and val.bin for one text; the last `val_share` of its characters is val.

    meta: of a character vocabulary, written to meta.pkl; None: the tokens are GPT-2's BPE
    """
    print(f'{short(folder)}/input.txt: {len(text):,} characters')
    tokenizer = from_meta(meta or GPT2)
    cut = int(len(text) * (1 - val_share))
    texts = {'train': text[:cut], 'val': text[cut:]}
    ids = {split: to_uint16(tokenizer.to_array(texts[split])) for split in SPLITS}
    clear(folder)
    if meta:
        write_meta(folder, meta)
        print(f'{short(folder)}/meta.pkl: {meta["vocab_size"]} symbols: {"".join(meta["stoi"])!r}')
    for split in SPLITS:
        write_whole(os.path.join(folder, f'{split}.bin'), ids[split].tofile)
        print(f'{short(folder)}/{split}.bin: {len(ids[split]):,} tokens')


# -----------------------------------------------------------------------------
# many documents
class Piece(NamedTuple):
    text: str  # a document, or a part of one
    split: str  # 'train' or 'val'
    ends: bool  # <|endoftext|> follows
    size: int = 1  # what the progress bar counts
    counts: bool = True  # its tokens are targets; False for a prompt


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
    Tokenize documents on all cores and write train.bin and val.bin, with a few MB in memory.

    If it is interrupted, the next call resumes. If it fails, it leaves nothing.

    pieces_after: function(n) -> iterator over Pieces, from number n on
    source: describes the documents and the tokenizer; a call with another source starts anew
    meta: of the tokenizer, written to meta.pkl; None: GPT-2's BPE, without meta.pkl
    total, unit: of the progress bar, in units of Piece.size
    few, much: the errors if val, or else train, would be empty
    masked: also write train.mask and val.mask, a byte a token: 1 where Piece.counts
    """
    from tqdm import tqdm

    tokenizer = from_meta(meta or GPT2)
    dtype = (meta or GPT2).get('dtype', 'uint16')
    output, cores = Output(folder, source, dtype, masked), os.cpu_count()
    try:
        output.open()
        look = dict(unit=unit, unit_scale=True, desc='tokenizing', disable=None)
        bar = tqdm(total=total, initial=output.progress['size'], **look)
        with bar, ThreadPoolExecutor(cores) as pool:
            pieces = pieces_after(output.progress['pieces'])
            for batch, encoded in encode_ahead(pieces, pool, 2 * cores, tokenizer, dtype):
                output.write(batch, encoded)
                bar.update(sum(piece.size for piece in batch))
        if not output.progress['val']:
            raise UserError(few)
        if not output.progress['train']:
            raise UserError(much)
        output.close()
    except ValueError:  # the input is wrong, so there is nothing to resume
        output.discard()
        raise
    except BaseException:
        output.keep()
        raise
    output.finish(meta)


def encode_ahead(pieces, pool, ahead, tokenizer, dtype):
    """
    Yield batches of pieces with their encode(), computed in threads for at most `ahead` batches
    in advance. Tokenizers release the GIL.
    """
    waiting = deque()
    for batch in batches(pieces):
        waiting.append((batch, pool.submit(encode, batch, tokenizer, dtype)))
        if len(waiting) > ahead:
            batch, future = waiting.popleft()
            yield batch, future.result()
    for batch, future in waiting:
        yield batch, future.result()


def batches(pieces):
    """Lists of pieces, of about 256,000 characters or 1000 pieces each."""
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= 2**18 or len(batch) >= 1000:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode(pieces, tokenizer, dtype):
    """{split: (ids, mask)} of consecutive pieces, two arrays of the same length each."""
    ids = {split: [np.zeros(0, dtype)] for split in SPLITS}
    masks = {split: [np.zeros(0, np.uint8)] for split in SPLITS}
    for piece in pieces:
        new = to_dtype(tokenizer.to_array(piece.text), dtype)
        if piece.ends and tokenizer.eot is not None:
            new = np.append(new, to_dtype([tokenizer.eot], dtype))
        ids[piece.split].append(new)
        masks[piece.split].append(np.full(len(new), piece.counts, np.uint8))
    return {split: (np.concatenate(ids[split]), np.concatenate(masks[split])) for split in SPLITS}


class Output:
    """
    The files of a dataset until it is whole: train.bin.partial and so on, and progress.json, which
    counts the pieces read and the tokens written.
    """

    def __init__(self, folder, source, dtype, masked):
        self.folder, self.masked = folder, masked
        self.journal = os.path.join(folder, 'progress.json')
        self.made_folder = not os.path.isdir(folder)
        self.widths = {}  # bytes a token of each file
        for split in SPLITS:
            if masked:  # before the .bin: without a mask all its tokens would be targets
                self.widths[f'{split}.mask'] = 1
            self.widths[f'{split}.bin'] = np.dtype(dtype).itemsize
        self.files = {}  # open files by name
        self.progress = self.load_progress(source)
        self.saved_at = time.monotonic()

    def partial(self, name):
        return os.path.join(self.folder, f'{name}.partial')

    def position(self, name, progress):
        """The number of bytes of a file that `progress` counts."""
        split = name.partition('.')[0]
        return progress[split] * self.widths[name]

    def load_progress(self, source):
        """The progress of an interrupted call on the same source; zeros if there is none."""
        new = {'source': source, 'pieces': 0, 'size': 0, 'train': 0, 'val': 0}
        try:
            with open(self.journal, encoding='utf-8') as f:
                saved = json.load(f)
            if saved.keys() != new.keys() or saved['source'] != source:
                return new
            for name in self.widths:
                if os.path.getsize(self.partial(name)) < self.position(name, saved):
                    return new
            return saved
        except (OSError, ValueError, TypeError, AttributeError):  # missing, damaged, or alone
            return new

    def open(self):
        os.makedirs(self.folder, exist_ok=True)
        for name in self.widths:
            self.files[name] = open(self.partial(name), 'ab')
            self.files[name].truncate(self.position(name, self.progress))

    def write(self, pieces, encoded):
        """Append what encode() returned for these pieces."""
        if not self.masked and not all(piece.counts for piece in pieces):
            raise UserError(
                'documents with a prompt come after documents without; prepare them separately'
            )
        progress = dict(self.progress)
        progress['pieces'] += len(pieces)
        progress['size'] += sum(piece.size for piece in pieces)
        for split in SPLITS:
            ids, mask = encoded[split]
            ids.tofile(self.files[f'{split}.bin'])
            if self.masked:
                mask.tofile(self.files[f'{split}.mask'])
            progress[split] += len(ids)
        self.progress = progress  # in one step, so that an interruption comes before or after it
        if time.monotonic() > self.saved_at + 5:
            self.save()

    def save(self):
        """Write progress.json, after what it counts is on disk."""
        self.sync()
        write_whole(self.journal, lambda f: f.write(json.dumps(self.progress).encode()))
        self.saved_at = time.monotonic()

    def sync(self):
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())

    def close(self):
        self.sync()
        for f in self.files.values():
            f.close()
        self.files = {}

    def keep(self):
        """After an interruption: keep what the next call can resume from."""
        if not self.progress['pieces']:
            return self.discard()
        self.save()
        self.close()

    def discard(self):
        """Remove the files, and the folder if it is new."""
        self.close()
        remove([self.journal, *map(self.partial, self.widths)])
        if self.made_folder and os.path.isdir(self.folder):
            os.rmdir(self.folder)

    def finish(self, meta):
        """Put the files in the place of the dataset that was there before."""
        clear(self.folder, keep_partial_masks=self.masked)
        if meta:
            write_meta(self.folder, meta)
        for name in self.widths:
            os.replace(self.partial(name), os.path.join(self.folder, name))
        for split in SPLITS:
            path = short(os.path.join(self.folder, f'{split}.bin'))
            print(f'{path}: {self.progress[split]:,} tokens')
        remove([self.journal])
