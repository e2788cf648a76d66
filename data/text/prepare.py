"""
Your own text, to a folder of data/: train.bin, val.bin and meta.pkl.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=~/notes --tokenizer=train --vocab_size=4096 --dataset=notes
    python data/text/prepare.py --input='dumps/*.jsonl.gz' --column=body --tokenizer=cl100k_base
    python data/text/prepare.py --input=faq.csv --prompt=question --column=answer
    python data/text/prepare.py --hub_name=roneneldan/TinyStories

Uses all cores and little memory. Interrupt it at will: run again, it goes on where it was.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from itertools import chain, islice
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
input: str | list = ''  # a file, folder, glob or several (a,b): text, .json(l) .csv .tsv .parquet
hub_name = ''  # a dataset of the Hugging Face hub instead
name = ''  # which of its parts
column = (
    'text'  # of tables and the hub: what holds the text, or a conversation; else their messages
)
prompt = ''  # of these: what holds a prompt that comes before it, on a line of its own, and is read but not learned
endoftext_splits = True  # a document ends at <|endoftext|> in a text; False: it is text like other
# how they become tokens
tokenizer = 'gpt2'  # 'char', 'byte', 'train' (one made for this text), a name of tiktoken's or the Hugging Face hub's, a tokenizer.json, a run's out_dir
vocab_size = 4096  # of a tokenizer that is trained
# where they go
dataset = 'text'  # the folder in data/
val_share = 0.05  # held out: whole documents where there are 10 or more, else the end of the text
if __name__ == '__main__':
    config, given = configure(globals())

# -----------------------------------------------------------------------------
from data.tokenizer import from_meta, make_meta, with_dtype
from data.write import Piece, write_documents

TEXT = (
    '.txt',
    '.md',
    '.py',
    '.rst',
    '.tex',
    '.html',
    '.c',
    '.h',
    '.cpp',
    '.js',
    '.ts',
    '.java',
    '.go',
    '.rs',
    '.sh',
    '.xml',
    '.yaml',
    '.yml',
    '.toml',
)
TABLES = ('.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet')
PIECE = 2**18  # characters of a document handled at a time
FEW, MANY = 10, 100  # documents
EOT = '<|endoftext|>'
MARK = re.compile(re.escape(EOT) + r'\n?')  # in a text; the end of its line is no text either
BREAK = re.compile(r'.* (?<=[^\W\d_] )(?=[^\W\d_])', re.DOTALL)  # to the last space between letters
ANSWERS = ('assistant', 'gpt', 'model')  # roles in conversations whose words are learned
marks = Counter()  # of <|endoftext|> in what was read: those that 'split' it, those that are 'text'


class Part(NamedTuple):
    text: str
    ends: bool  # does its document end with it?
    at: int  # bytes of the file read so far
    counts: bool = True  # is it to be learned, or only to be read, as a prompt is?
    stops: bool = (
        False  # does <|endoftext|> follow though the document goes on, as after an answer?
    )


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
                inside = [
                    os.path.join(folder, file)
                    for folder, folders, files in os.walk(path)
                    for file in files
                    if kind(file) in TEXT + TABLES
                    and not hidden(os.path.relpath(os.path.join(folder, file), path))
                ]
            else:
                inside = (
                    [path]
                    if os.path.exists(path)
                    else [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
                )
            if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
                raise ValueError(
                    f'{path} is no regular file, and it is to be read twice; write it to one first'
                )
            if not inside:
                raise FileNotFoundError(f'{path}: no such file, and no text in such a folder')
            found += sorted(inside)
    return list(dict.fromkeys(found))


def read(path, column, prompt='', splits=True):
    """
    The documents of a file in Parts. Where there is a column for prompts a document has two, prompt
    and text; a conversation has two for each answer. With `splits` <|endoftext|> in a text ends a
    document. What is not text in UTF-8, and a table without the column, is a ValueError.
    """
    with open(path, 'rb') as raw:
        file = gzip.open(raw) if path.endswith('.gz') else raw
        try:
            rows = rows_of(file, path, raw, column, prompt)
            if rows is None:
                yield from read_text(file, path, raw, splits)
            else:
                for row, where, at in rows:
                    yield from parts_of(row, column, prompt, splits, where, at)
        except UnicodeDecodeError as e:
            raise ValueError(f'{path} is not UTF-8 text: {e.reason}') from e
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f'{path} is no whole gzip file: {e}') from e


def rows_of(file, path, raw, column, prompt):
    """The rows of a table: (dict, where it is, bytes of the file read so far); None of a text."""
    if kind(path) == '.parquet':
        return read_parquet(path, raw, column, prompt)
    if kind(path) in ('.jsonl', '.ndjson'):
        return read_jsonl(file, path, raw)
    if kind(path) in ('.csv', '.tsv'):
        return read_csv(file, path, raw)
    return read_json(file, path, raw, column, prompt) if kind(path) == '.json' else None


def read_jsonl(file, path, raw):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f'{path}:{number} is not JSON: {e}') from e
            yield as_row(row), f'{path}:{number}', raw.tell()


def as_row(row):
    """What stands in place of a row, so that an error can tell."""
    return row if isinstance(row, dict) else {f'a {type(row).__name__}': None}


def read_json(file, path, raw, column, prompt):
    """The rows of a .json, a list, objects a line each, or one; None of others, as settings."""
    content, whole, error = file.read(), None, ''
    file.seek(0)
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as e:
        try:
            lines = isinstance(json.loads(content.lstrip().split(b'\n', 1)[0]), dict)
        except (ValueError, RecursionError):
            lines = False
        if lines:
            return read_jsonl(file, path, raw)
        error = f'{path} is not JSON: {e}'
    if isinstance(whole, list):
        return ((as_row(row), f'{path}: row {i}', raw.tell()) for i, row in enumerate(whole, 1))
    if isinstance(whole, dict) and ({column, 'messages'} & whole.keys()):
        return iter([(whole, path, raw.tell())])
    if column != 'text' or prompt or error and content.lstrip()[:1] == b'[':
        raise ValueError(error or f'{path} is no table: it holds no list of objects')
    return None


def read_csv(file, path, raw):
    csv.field_size_limit(2**31 - 1)  # a long text is no error
    text = io.TextIOWrapper(file, encoding='utf-8-sig', newline='')
    header = text.readline()
    between = '\t'
    if kind(path) == '.csv':
        between = max(',;\t', key=header.count)  # Excel writes what its country does
    reader = csv.reader(chain([header], text), delimiter=between, strict=True)
    try:
        names = next(reader, [])
        for values in reader:
            where = f'{path}:{reader.line_num}'
            if values and len(values) != len(names):
                raise ValueError(
                    f'{where} has {len(values)} fields, its header {len(names)}; '
                    f'a text with {between!r} in it stands in quotes'
                )
            if values:
                yield dict(zip(names, values)), where, raw.tell()
    except csv.Error as e:
        raise ValueError(f'{path}:{reader.line_num} is not as a {kind(path)} should be: {e}') from e


def read_parquet(path, raw, column, prompt):
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(raw)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path} is no Parquet file: {e}') from e
    size, done, rows = os.path.getsize(path), 0, max(1, table.metadata.num_rows)
    names = table.schema_arrow.names
    wanted = {column, prompt} & {*names} or {'messages'}
    names = [name for name in names if name in wanted] or names
    try:
        for batch in table.iter_batches(batch_size=1000, columns=names):
            for row in batch.to_pylist():
                done += 1
                yield row, f'{path}: row {done}', size * done // rows
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path} is damaged after row {done}: {e}') from e


def whole_characters(text):
    """JSON can hold half a character; it becomes a replacement."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def parts_of(row, column, prompt, splits, where, at):
    """The parts of a row of a table: its text, or prompt and text, or those of a conversation."""
    chat = 'messages' if column == 'text' and column not in row else column
    if not prompt and isinstance(row.get(chat), list):
        yield from conversation(row[chat], splits, where, at)
        return
    for name in filter(None, (prompt, column)):
        if not isinstance(row.get(name), str):
            has = f'it has {", ".join(row) or "nothing"}'
            if name in row:
                has = f'{name!r} is {type(row[name]).__name__}'
            flag = 'prompt' if name == prompt else 'column'
            raise ValueError(f'{where} has no text {name!r}; {has}; try --{flag}=...')
    text = whole_characters(row[column])
    if prompt:
        yield from answered(whole_characters(row[prompt]), text, splits, at)
    else:
        yield from (Part(document, True, at) for document in documents_in(text, splits))


def conversation(messages, splits, where, at):
    """The parts of a row of chat: before each answer what was said since the last, a line each."""
    said, parts = [], []
    for number, message in enumerate(messages, 1):
        message = as_row(message)
        role = message.get('role', message.get('from'))
        words = message.get('content', message.get('value'))
        if not isinstance(role, str) or not isinstance(words, str):
            raise ValueError(
                f'{where}: message {number} needs a role and content, both text; '
                f'it has {", ".join(message)}'
            )
        if role in ANSWERS:
            parts += answered('\n'.join(said), whole_characters(words), splits, at)
            said = []
        else:
            said.append(whole_characters(words))
    if not parts:
        raise ValueError(
            f'{where} has no answer to learn, a message whose role is {" or ".join(ANSWERS)}'
        )
    yield from (part._replace(ends=False, stops=part.ends) for part in parts[:-1])
    yield parts[-1]


def answered(prompt, answer, splits, at):
    """A prompt and its answer, which ends anyway: <|endoftext|> there goes, elsewhere is text."""
    if splits and answer.rstrip().endswith(EOT):
        answer = answer.rstrip().removesuffix(EOT)
    marks['text'] += prompt.count(EOT) + answer.count(EOT)
    yield Part(prompt, False, at, counts=False)
    yield Part('\n' + answer, True, at)


def documents_in(text, splits):
    """The documents in a text: one, or those that <|endoftext|> parts, blank ones left out."""
    found = text.count(EOT)
    marks['split' if splits else 'text'] += found
    return [part for part in MARK.split(text) if part.strip()] if found and splits else [text]


def read_text(file, path, raw, splits):
    """
    The documents of a text in pieces. They end before a space between two letters, where the tokens
    of all BPEs in use end too. What was searched for one is not searched again.
    """
    text = io.TextIOWrapper(file, encoding='utf-8-sig')
    rest, searched = '', 0
    begun, marked = False, False  # is rest the end of a document? was there a mark?

    def part(piece, ends):
        marks['text'] += piece.count(EOT)
        return Part(piece, ends, raw.tell())

    while more := text.read(PIECE):
        if '\0' in more:
            raise ValueError(f'{path} is binary, not text: it has a zero byte')
        rest += more
        if splits and EOT in rest:
            rest += text.read(1) if rest.endswith(EOT) else ''  # maybe the end of its line
            marks['split'] += rest.count(EOT)
            *documents, rest = MARK.split(rest)
            for document in documents:
                if begun or document.strip():
                    yield part(document, True)
                begun = False
            searched, marked = 0, True
        found = BREAK.match(rest, searched)
        at = found.end() - 1 if found else 0
        if not found and len(rest) > 16 * PIECE:  # without spaces it is cut anywhere but in a mark
            at = len(rest) - len(EOT)
        if at:
            yield part(rest[:at], False)
            rest, begun = rest[at:], True
        searched = max(0, len(rest) - 2)
    if rest.strip() or begun or rest and not marked:
        yield part(rest, True)


def read_all(files, *how):
    """Parts of all documents of all files, `at` counted from the last part."""
    for path in files:
        before = 0
        for part in read(path, *how):
            yield part._replace(at=part.at - before)
            before = part.at


def checksum(text):
    """Of how a document begins; no CRC: those of texts that differ in a few digits are near."""
    start = text[:10_000].encode('utf-8', 'replace')
    return int.from_bytes(hashlib.blake2b(start, digest_size=4).digest(), 'little')


def survey(parts, everything):
    """
    Look through the parts: ((characters, checksum) of each of the first MANY documents, the set of
    all characters, '<|endoftext|>' among them if there is more than one document). Unless
    `everything` matters, MANY documents are enough.
    """
    sizes, characters, current, begins = [], set(), 0, True
    for part in parts:
        if begins:
            first = checksum(part.text)
        current += len(part.text)
        begins = part.ends
        if everything:
            characters.update(part.text)
        if part.ends and len(sizes) < MANY:
            sizes.append((current, first))
        if part.ends:
            current = 0
        if len(sizes) >= MANY and not everything:
            break
    return sizes, characters | ({EOT} if len(sizes) > 1 else set())


def choose(sizes, val_share):
    """
    The checksums of the documents to hold out, of fewer than MANY: that share of them, in order,
    without those that go far beyond that share of the characters. At least one and not all; copies,
    which have one checksum, together.
    """
    lengths = Counter()
    for length, first in sizes:
        lengths[first] += length
    if len(lengths) < 2:
        raise ValueError(
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
    The Pieces to write. Of FEW documents or more, and of those with `prompts`, whole ones are held
    out: of MANY each by its checksum, so always the same ones, and copies together. Of fewer the
    end is held out, that of all taken together.
    """
    if prompts or len(sizes) >= FEW:
        chosen = choose(sizes, val_share) if len(sizes) < MANY else None
        begins = True
        for part in parts:
            if begins:
                first = checksum(part.text)
                held_out = first in chosen if chosen else first < val_share * 2**32
                where = 'val' if held_out else 'train'
            yield Piece(part.text, where, part.ends or part.stops, part.at, part.counts)
            begins = part.ends
        return
    left = int(sum(length for length, _ in sizes) * (1 - val_share))  # characters to train on
    for text, ends, size, *_ in parts:
        cut = min(left, len(text))
        left -= cut
        ends = ends and len(sizes) > 1  # one document needs no end
        if cut:
            yield Piece(text[:cut], 'train', ends and cut == len(text), size)
        if cut < len(text):
            yield Piece(text[cut:], 'val', ends, 0 if cut else size)


if __name__ == '__main__':
    from data.hub import load_documents, unbroken

    if bool(input) == bool(hub_name):
        raise ValueError('say what to read: --input=FILE, a folder or a glob, or --hub_name=NAME')
    if not column:
        raise ValueError('column must name what holds the text')
    if not 0 < val_share < 1:
        raise ValueError(f'val_share={val_share} must be between 0 and 1')
    if tokenizer == 'train' and not 257 <= vocab_size <= 1_000_000:
        raise ValueError(
            f'vocab_size={vocab_size} must be from 257 (the bytes and <|endoftext|>) to 1,000,000'
        )
    if 'vocab_size' in given and tokenizer != 'train':
        raise ValueError(
            f'vocab_size is that of --tokenizer=train; tokenizer={tokenizer!r} has its own'
        )
    if not dataset or os.path.basename(dataset) != dataset or dataset in ('.', '..'):
        raise ValueError(f'dataset={dataset!r} must be the name of a folder in data/')
    if input:
        files = find_files(input)
        total, unit = sum(map(os.path.getsize, files)), 'B'
        tables = [path for path in files if kind(path) in TABLES]
        if prompt and tables != files:
            raise ValueError(
                f'prompt={prompt!r} is a column, and {min(set(files) - set(tables))} is no table'
            )
        how = column, prompt, endoftext_splits
        read_parts = lambda: read_all(files, *how)
        first_parts = (part for path in tables for part in islice(read(path, *how), 1))
    else:
        documents = load_documents(
            hub_name, column, streaming=True, **({'name': name} if name else {})
        )
        total, unit = None, 'doc'
        parts_in = lambda row: parts_of(row, column, prompt, endoftext_splits, hub_name, 1)
        read_parts = lambda: (
            part._replace(at=int(part.ends))
            for row in unbroken(documents, hub_name)
            for part in parts_in(row)
        )
        first_parts = islice(read_parts(), 1)
    print(
        f'reading {f"{len(files):,} file(s), {total / 1e6:,.1f} MB" if input else hub_name} ...',
        flush=True,
    )
    prompts = not all(part.counts for part in first_parts)
    sizes, characters = survey(read_parts(), everything=tokenizer == 'char')
    length = sum(length for length, _ in sizes)
    if length < 100:
        raise ValueError(f'{input or hub_name} holds {length} characters, too few to train on')

    def pieces():
        marks.clear()
        return split(read_parts(), sizes, val_share, prompts)

    if os.path.exists(os.path.join(tokenizer, 'ckpt.pt')) or tokenizer.endswith('.pt'):
        from support.checkpoint import load

        meta = load(tokenizer).get('meta')
        if not meta:
            raise ValueError(f'{tokenizer} comes without its tokenizer')
        meta = with_dtype(meta)
    else:
        if tokenizer == 'train':
            print(f'learning a BPE of {vocab_size:,} tokens ...', flush=True)
        meta = make_meta(
            tokenizer,
            vocab_size,
            (piece.text for piece in pieces() if piece.split == 'train'),
            characters,
        )
    if prompts and from_meta(meta).eot is None:
        raise ValueError(
            f'tokenizer={tokenizer!r} has no <|endoftext|>, so answers to prompts would have no end'
        )
    folder = os.path.join(os.path.dirname(HERE), dataset)
    state = (
        [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
        if input
        else hub_name
    )
    source = str(
        {**config, 'state': zlib.crc32(repr((state, sorted(meta.items(), key=str))).encode())}
    )  # another text or tokenizer starts anew
    few = f'val_share={val_share} holds nothing out; raise it'
    if prompts:
        few += ', or all prompts begin alike'
    much = f'val_share={val_share} leaves nothing to train on; lower it'
    write_documents(
        folder,
        lambda n: islice(pieces(), n, None),
        source,
        meta,
        total,
        unit,
        few,
        much,
        masked=prompts,
    )
    if marks['split']:
        print(
            f'documents end at {marks["split"]:,} {EOT} in the text; '
            '--endoftext_splits=False reads them as text'
        )
    if marks['text']:
        print(f'{marks["text"]:,} {EOT} are text here; in a prompt of sample.py one is the token')
    print(
        f'data/{dataset}/meta.pkl: {meta["vocab_size"]:,} token ids, {meta["dtype"]}; '
        f'next: python train.py config/train_text.py --dataset={shlex.quote(dataset)}'
    )
