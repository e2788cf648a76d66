"""
Your own text, to a folder of data/: train.bin, val.bin and meta.pkl.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=~/notes --tokenizer=train --vocab_size=4096 --dataset=notes
    python data/text/prepare.py --input='dumps/*.jsonl.gz' --column=body --tokenizer=cl100k_base
    python data/text/prepare.py --hub_name=roneneldan/TinyStories

Uses all cores and little memory. Interrupt it at will: run again, it goes on where it was.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from itertools import islice

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
input: str | list = '' # a file, a folder, a glob, several with commas between or as a list; .txt .md .py and the like, .jsonl, these also .gz; .parquet
hub_name = '' # a dataset of the Hugging Face hub instead
name = '' # which of its parts
column = 'text' # of .jsonl, .parquet and the hub: what holds the text
prompt = '' # of these: what holds a prompt that comes before it, on a line of its own, and is read but not learned
# how they become tokens
tokenizer = 'gpt2' # 'char', 'byte', 'train' (one made for this text), a name of tiktoken's or the Hugging Face hub's, a tokenizer.json, a run's out_dir
vocab_size = 4096 # of a tokenizer that is trained
# where they go
dataset = 'text' # the folder in data/
val_share = 0.05 # held out: whole documents where there are 100 or more, else the end of each
if __name__ == '__main__':
    config, given = configure(globals())

# -----------------------------------------------------------------------------
from data.tokenizer import from_meta, make_meta, with_dtype
from data.write import Piece, write_documents

TEXT = ('.txt', '.md', '.py', '.rst', '.tex', '.html', '.c', '.h', '.cpp', '.js', '.ts', '.java', '.go', '.rs', '.sh',
        '.json', '.csv', '.xml', '.yaml', '.yml', '.toml')
TABLES = ('.jsonl', '.parquet')
PIECE = 2**18 # characters of a document handled at a time
FEW = 100 # documents


def kind(path):
    """The suffix of a file, that of its compression aside."""
    return os.path.splitext(path.removesuffix('.gz'))[1].lower()


def hidden(path):
    """Is a file, or a folder it lies in, such as .git?"""
    return any(part.startswith('.') for part in path.split(os.sep) if part != '.')


def find_files(inputs):
    """The files that `inputs`, a text or a list, stand for, in order; of folders those of a known suffix."""
    found = []
    for word in [inputs] if isinstance(inputs, str) else inputs:
        for path in [word] if os.path.exists(os.path.expanduser(word)) else word.split(','):
            path = os.path.expanduser(path.strip())
            if os.path.isdir(path):
                inside = [os.path.join(folder, file) for folder, folders, files in os.walk(path) for file in files
                          if kind(file) in TEXT + TABLES and not hidden(os.path.relpath(os.path.join(folder, file), path))]
            else:
                inside = [path] if os.path.exists(path) else [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
            if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
                raise ValueError(f'{path} is no regular file, and it is to be read twice; write it to one first')
            if not inside:
                raise FileNotFoundError(f'{path}: no such file, and no text in such a folder')
            found += sorted(inside)
    return list(dict.fromkeys(found))


def read(path, column, prompt=''):
    """
    The documents of a file in pieces: (text, whether its document ends, bytes of the file read so far). Where there is a
    column for prompts a document has two, prompt and text. What is not text in UTF-8, and a table without the column, is a ValueError.
    """
    with open(path, 'rb') as raw:
        if kind(path) == '.parquet':
            yield from read_parquet(path, raw, column, prompt)
            return
        file = gzip.open(raw) if path.endswith('.gz') else raw
        try:
            if kind(path) == '.jsonl':
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = json_row(line, f'{path}:{number}')
                        yield from pieces_of(row, column, prompt, f'{path}:{number}', raw.tell())
            else:
                yield from read_text(file, path, raw)
        except UnicodeDecodeError as e:
            raise ValueError(f'{path} is not UTF-8 text: {e.reason}') from e
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f'{path} is no whole gzip file: {e}') from e


def json_row(line, where):
    """A line of jsonl as a dict."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{where} is not JSON: {e}') from e
    return row if isinstance(row, dict) else {f'a {type(row).__name__}': None}


def pieces_of(row, column, prompt, where, at):
    """The pieces of a row of a table: its text, or prompt and text."""
    for name in filter(None, (prompt, column)):
        if not isinstance(row.get(name), str):
            has = f'{name!r} is {type(row[name]).__name__}' if name in row else f'it has {", ".join(row) or "nothing"}'
            raise ValueError(f'{where} has no text {name!r}; {has}; try --{"prompt" if name == prompt else "column"}=...')
    whole = lambda text: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') # JSON can hold half a character
    if prompt:
        yield whole(row[prompt]), False, at
    yield ('\n' if prompt else '') + whole(row[column]), True, at


def read_parquet(path, raw, column, prompt):
    import pyarrow
    import pyarrow.parquet as parquet
    try:
        table = parquet.ParquetFile(raw)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path} is no Parquet file: {e}') from e
    size, done, rows = os.path.getsize(path), 0, max(1, table.metadata.num_rows)
    names = [name for name in table.schema_arrow.names if name in (column, prompt)] or table.schema_arrow.names
    try:
        for batch in table.iter_batches(batch_size=1000, columns=names):
            for row in batch.to_pylist():
                done += 1
                yield from pieces_of(row, column, prompt, f'{path}: row {done}', size * done // rows)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path} is damaged after row {done}: {e}') from e


def read_text(file, path, raw):
    """A document in pieces. They end before a space between two letters, where the tokens of all BPEs in use end too."""
    text, rest = io.TextIOWrapper(file, encoding='utf-8-sig'), ''
    while more := text.read(PIECE):
        if '\0' in more:
            raise ValueError(f'{path} is binary, not text: it has a zero byte')
        rest += more
        at = rest.rfind(' ', 1, -1)
        while at > 0 and not (rest[at - 1].isalpha() and rest[at + 1].isalpha()):
            at = rest.rfind(' ', 1, at)
        at = len(rest) - 1 if at < 0 and len(rest) > 16 * PIECE else max(0, at) # a text without spaces is cut anywhere
        if at:
            yield rest[:at], False, raw.tell()
            rest = rest[at:]
    if rest:
        yield rest, True, raw.tell()


def read_all(files, column, prompt):
    """Pieces of all documents of all files: (text, whether its document ends, bytes read since the last one)."""
    for path in files:
        before = 0
        for text, ends, at in read(path, column, prompt):
            yield text, ends, at - before
            before = at


def survey(pieces, everything):
    """
    Look through the pieces: (characters of each of the first FEW documents, the set of all characters, '<|endoftext|>' among
    them if there is more than one document). Unless `everything` matters, as many as FEW documents are enough.
    """
    lengths, characters, current = [], set(), 0
    for text, ends, _ in pieces:
        current += len(text)
        if everything:
            characters.update(text)
        if ends:
            lengths.append(current)
            current = 0
            if len(lengths) >= FEW and not everything:
                break
    return lengths, characters | ({'<|endoftext|>'} if len(lengths) > 1 else set())


def split(pieces, lengths, val_share, prompts):
    """
    The Pieces to write. Of FEW documents or more each is held out, or not, by a checksum of how it begins, so always the same
    ones, and copies together; of fewer the end of each is held out. With `prompts` the first of two pieces is one, and documents stay whole.
    """
    number = at = 0
    begins = True
    for text, ends, size in pieces:
        if len(lengths) >= FEW or prompts:
            if begins: # not by a CRC: those of texts that differ in a few digits lie together
                checksum = hashlib.blake2b(text[:10_000].encode('utf-8', 'replace'), digest_size=4).digest()
                where = 'val' if int.from_bytes(checksum, 'little') < val_share * 2**32 else 'train'
            yield Piece(text, where, ends, size, counts=ends or not prompts)
        else:
            cut = min(max(0, int(lengths[number] * (1 - val_share)) - at), len(text)) # of this piece
            if cut:
                yield Piece(text[:cut], 'train', len(lengths) > 1 and at + cut == int(lengths[number] * (1 - val_share)), size)
            if cut < len(text):
                yield Piece(text[cut:], 'val', ends and len(lengths) > 1, 0 if cut else size)
        begins = ends
        number, at = (number + 1, 0) if ends else (number, at + len(text))


if __name__ == '__main__':
    from data.hub import load_documents, unbroken
    if bool(input) == bool(hub_name):
        raise ValueError('say what to read: --input=FILE, a folder or a glob, or --hub_name=NAME')
    if not column:
        raise ValueError('column must name what holds the text')
    if not 0 < val_share < 1:
        raise ValueError(f'val_share={val_share} must be between 0 and 1')
    if tokenizer == 'train' and not 257 <= vocab_size <= 1_000_000:
        raise ValueError(f'vocab_size={vocab_size} must be from 257 (the bytes and <|endoftext|>) to 1,000,000')
    if 'vocab_size' in given and tokenizer != 'train':
        raise ValueError(f'vocab_size is that of --tokenizer=train; tokenizer={tokenizer!r} has its own')
    if not dataset or os.path.basename(dataset) != dataset or dataset in ('.', '..'):
        raise ValueError(f'dataset={dataset!r} must be the name of a folder in data/')
    if input:
        files = find_files(input)
        total, unit = sum(map(os.path.getsize, files)), 'B'
        if prompt and not all(kind(path) in TABLES for path in files):
            raise ValueError(f'prompt={prompt!r} is a column, and {next(path for path in files if kind(path) not in TABLES)} is no table')
        read_pieces = lambda: read_all(files, column, prompt)
    else:
        documents = load_documents(hub_name, column, streaming=True, **({'name': name} if name else {}))
        total, unit = None, 'doc'
        read_pieces = lambda: (piece for row in unbroken(documents, hub_name) for piece in pieces_of(row, column, prompt, hub_name, 1))
    print(f'reading {f"{len(files):,} file(s), {total / 1e6:,.1f} MB" if input else hub_name} ...', flush=True)
    lengths, characters = survey(read_pieces(), everything=tokenizer == 'char')
    if sum(lengths) < 100:
        raise ValueError(f'{input or hub_name} holds {sum(lengths)} characters, too few to train on')
    pieces = lambda: split(read_pieces(), lengths, val_share, bool(prompt))
    if os.path.exists(os.path.join(tokenizer, 'ckpt.pt')) or tokenizer.endswith('.pt'):
        from checkpoint import load
        meta = load(tokenizer).get('meta')
        if not meta:
            raise ValueError(f'{tokenizer} comes without its tokenizer')
        meta = with_dtype(meta)
    else:
        if tokenizer == 'train':
            print(f'learning a BPE of {vocab_size:,} tokens ...', flush=True)
        meta = make_meta(tokenizer, vocab_size, (piece.text for piece in pieces() if piece.split == 'train'), characters)
    if prompt and from_meta(meta).eot is None:
        raise ValueError(f'tokenizer={tokenizer!r} has no <|endoftext|>, so answers to prompts would have no end')
    folder = os.path.join(os.path.dirname(HERE), dataset)
    state = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files] if input else hub_name
    source = str({**config, 'state': zlib.crc32(repr((state, sorted(meta.items(), key=str))).encode())}) # another text or tokenizer starts anew
    os.makedirs(folder, exist_ok=True)
    write_documents(folder, lambda n: islice(pieces(), n, None), source, meta, total, unit,
                    few='too little text to hold any out; raise --val_share' + ', or all prompts begin alike' * bool(prompt), masked=bool(prompt))
    print(f'data/{dataset}/meta.pkl: {meta["vocab_size"]:,} token ids, {meta["dtype"]}; '
          f'next: python train.py config/train_text.py --dataset={dataset}')
