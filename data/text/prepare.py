"""
Your own text, to a folder of data/: train.bin, val.bin and meta.pkl.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=~/notes --tokenizer=train --vocab_size=4096 --dataset=notes
    python data/text/prepare.py --input='dumps/*.jsonl.gz' --column=body --tokenizer=cl100k_base
    python data/text/prepare.py --input=faq.csv --prompt=question --column=answer
    python data/text/prepare.py --hub_name=roneneldan/TinyStories

Uses all cores and little memory. If it is interrupted, the same command resumes.
"""

import hashlib
import os
import shlex
import sys
import zlib
from collections import Counter
from itertools import islice

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
input: str | list = ''  # a file, folder, glob or several (a,b): text, .json(l) .csv .tsv .parquet
hub_name = ''  # or a dataset of the Hugging Face hub
name = ''  # the configuration of that dataset
column = 'text'  # of a table or the hub: the text, or a conversation; without it, messages
prompt = ''  # a column that comes before it, on a line of its own; it is read but not learned
endoftext_splits = True  # <|endoftext|> in a text ends a document; False: it is text
# how they become tokens
tokenizer = 'gpt2'  # char, byte, train, a tokenizer.json, an out_dir, a name of tiktoken or the hub
vocab_size = 4096  # of --tokenizer=train, which learns a BPE from the text
# where they go
dataset = 'text'  # the folder in data/
val_share = 0.05  # held out: whole documents if there are 10 or more, else the end of the text
if __name__ == '__main__':
    config, given = configure(globals())

# -----------------------------------------------------------------------------
from data.hub import load_documents, unbroken
from data.make_tokenizer import make_meta, with_dtype
from data.read import Reader, find_files
from data.tables import TABLES, suffix
from data.tokenizer import EOT, from_meta
from data.write import Piece, write_documents
from support.errors import UserError

FEW, MANY = 10, 100  # documents


# -----------------------------------------------------------------------------
# train and val
def checksum(text):
    """
    A number below 2**32 for the beginning of a document. Not a CRC: those of texts that differ in
    a few digits are close to each other.
    """
    start = text[:10_000].encode('utf-8', 'replace')
    return int.from_bytes(hashlib.blake2b(start, digest_size=4).digest(), 'little')


def survey(parts, all_characters):
    """
    The (characters, checksum) of each of the first MANY documents, and the set of all characters,
    with <|endoftext|> if there is more than one document. Without `all_characters` it stops after
    MANY documents.
    """
    sizes, characters = [], set()
    size, first = 0, None
    for part in parts:
        if first is None:
            first = checksum(part.text)
        size += len(part.text)
        if all_characters:
            characters.update(part.text)
        if part.ends:
            if len(sizes) < MANY:
                sizes.append((size, first))
            size, first = 0, None
        if len(sizes) == MANY and not all_characters:
            break
    if len(sizes) > 1:
        characters.add(EOT)
    return sizes, characters


def choose(sizes, val_share):
    """
    The checksums of the documents to hold out, if there are fewer than MANY: val_share of them, at
    least one and not all. Skips documents that are much longer than that share of the characters.
    Copies have one checksum, so they stay together.
    """
    lengths = Counter()
    for length, first in sizes:
        lengths[first] += length
    if len(lengths) < 2:
        raise UserError(
            'there must be two documents that begin differently, one to learn and one to hold out'
        )
    most = min(max(1, round(val_share * len(lengths))), len(lengths) - 1)
    chosen, room = set(), val_share * lengths.total()
    for first in sorted(lengths):
        if len(chosen) < most and 0 < lengths[first] <= 2 * room:
            chosen.add(first)
            room -= lengths[first]
    return chosen or {min(lengths, key=lengths.get)}


def split(parts, sizes, val_share, prompts):
    """
    The Pieces to write. With FEW documents or more, or with prompts, val has whole documents; with
    fewer, the end of all of them together.
    """
    if not prompts and len(sizes) < FEW:
        return split_at_end(parts, sizes, val_share)
    if len(sizes) < MANY:
        chosen = choose(sizes, val_share)
        return split_by_checksum(parts, lambda first: first in chosen)
    # the same documents are held out when others are added
    return split_by_checksum(parts, lambda first: first < val_share * 2**32)


def split_by_checksum(parts, is_val):
    begins = True
    for part in parts:
        if begins:
            where = 'val' if is_val(checksum(part.text)) else 'train'
        yield Piece(part.text, where, part.ends or part.stops, part.at, part.counts)
        begins = part.ends


def split_at_end(parts, sizes, val_share):
    left = int(sum(size for size, _ in sizes) * (1 - val_share))  # characters of train
    for part in parts:
        cut = min(left, len(part.text))
        left -= cut
        is_whole = cut == len(part.text)
        ends = part.ends and len(sizes) > 1  # one document needs no end
        if cut:
            yield Piece(part.text[:cut], 'train', ends and is_whole, part.at)
        if not is_whole:
            yield Piece(part.text[cut:], 'val', ends, 0 if cut else part.at)


# -----------------------------------------------------------------------------
# the command
def check_settings():
    if bool(input) == bool(hub_name):
        raise UserError('say what to read: --input=FILE, a folder or a glob, or --hub_name=NAME')
    if not column:
        raise UserError('column must name what holds the text')
    if not 0 < val_share < 1:
        raise UserError(f'val_share={val_share} must be between 0 and 1')
    if tokenizer == 'train' and not 257 <= vocab_size <= 1_000_000:
        raise UserError(
            f'vocab_size={vocab_size} must be from 257 (the bytes and {EOT}) to 1,000,000'
        )
    if 'vocab_size' in given and tokenizer != 'train':
        raise UserError(
            f'vocab_size is that of --tokenizer=train; tokenizer={tokenizer!r} has its own'
        )
    if not dataset or os.path.basename(dataset) != dataset or dataset in ('.', '..'):
        raise UserError(f'dataset={dataset!r} must be the name of a folder in data/')


def check_prompt(files):
    texts = [path for path in files if suffix(path) not in TABLES]
    if prompt and texts:
        raise UserError(f'prompt={prompt!r} is a column, and {min(texts)} is not a table')


def begins_with_prompt(parts):
    """Whether the first part, if there is one, is a prompt."""
    return any(not part.counts for part in islice(parts, 1))


def hub_parts(documents):
    for row in unbroken(documents, hub_name):
        for part in reader.read_row(row, hub_name, at=1):
            yield part._replace(at=int(part.ends))


def tokenizer_meta(pieces, characters):
    """The meta of --tokenizer; `pieces` and `characters` are there to learn it from."""
    if tokenizer.endswith('.pt') or os.path.exists(os.path.join(tokenizer, 'ckpt.pt')):
        from support.checkpoint import load

        meta = load(tokenizer).get('meta')
        if not meta:
            raise UserError(f'{tokenizer} comes without its tokenizer')
        return with_dtype(meta)
    if tokenizer == 'train':
        print(f'learning a BPE of {vocab_size:,} tokens ...', flush=True)
    texts = (piece.text for piece in pieces if piece.split == 'train')
    return make_meta(tokenizer, vocab_size, texts, characters)


if __name__ == '__main__':
    check_settings()
    reader = Reader(column, prompt, endoftext_splits)
    if input:
        files = find_files(input)
        check_prompt(files)
        total, unit = sum(map(os.path.getsize, files)), 'B'
        state = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
        print(f'reading {len(files):,} file(s), {total / 1e6:,.1f} MB ...', flush=True)
        tables = [path for path in files if suffix(path) in TABLES]
        prompts = any(begins_with_prompt(reader.read(path)) for path in tables)
    else:
        where = {'name': name} if name else {}
        documents = load_documents(hub_name, column, streaming=True, **where)
        total, unit, state = None, 'doc', hub_name
        print(f'reading {hub_name} ...', flush=True)
        prompts = begins_with_prompt(hub_parts(documents))

    def parts():
        return reader.read_all(files) if input else hub_parts(documents)

    sizes, characters = survey(parts(), all_characters=tokenizer == 'char')
    length = sum(size for size, _ in sizes)
    if length < 100:
        raise UserError(f'{input or hub_name} holds {length} characters, too few to train on')

    def pieces():
        reader.marks.clear()
        return split(parts(), sizes, val_share, prompts)

    meta = tokenizer_meta(pieces(), characters)
    if prompts and from_meta(meta).eot is None:
        raise UserError(
            f'tokenizer={tokenizer!r} has no {EOT}, so answers to prompts would have no end'
        )
    # a change to the settings, the files or the tokenizer starts anew
    versions = zlib.crc32(repr((state, sorted(meta.items(), key=str))).encode())
    few = f'val_share={val_share} holds nothing out; raise it'
    if prompts:
        few += ', or all prompts begin alike'
    write_documents(
        os.path.join(os.path.dirname(HERE), dataset),
        lambda n: islice(pieces(), n, None),
        source=str({**config, 'state': versions}),
        meta=meta,
        total=total,
        unit=unit,
        few=few,
        much=f'val_share={val_share} leaves nothing to train on; lower it',
        masked=prompts,
    )
    splits, texts = reader.marks['split'], reader.marks['text']
    if splits:
        print(
            f'documents end at {splits:,} {EOT} in the text; '
            '--endoftext_splits=False reads them as text'
        )
    if texts:
        print(f'{texts:,} {EOT} are text here; in a prompt of sample.py one is the token')
    print(
        f'data/{dataset}/meta.pkl: {meta["vocab_size"]:,} token ids, {meta["dtype"]}; '
        f'next: python train.py config/train_text.py --dataset={shlex.quote(dataset)}'
    )
