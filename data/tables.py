"""
Rows of .jsonl, .json, .csv, .tsv and Parquet files, for data/read.py. A row comes as (dict, where,
at): `where` names it in errors, and `at` is the number of bytes of its file read so far.
"""

import csv
import io
import json
import os
from itertools import chain

from support.errors import UserError

TABLES = ('.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet')


def suffix(path):
    """The suffix of a file, without that of its compression."""
    return os.path.splitext(path.removesuffix('.gz'))[1].lower()


def read_table(path, file, raw, column, prompt):
    """
    The rows of a table, or None if the file is a text.

    file: the open file, decompressed; raw: the same, compressed
    column, prompt: the columns that are needed; prompt may be ''
    """
    kind = suffix(path)
    if kind == '.parquet':
        return read_parquet(path, raw, column, prompt)
    if kind in ('.jsonl', '.ndjson'):
        return read_jsonl(path, file, raw)
    if kind in ('.csv', '.tsv'):
        return read_csv(path, file, raw)
    if kind == '.json':
        return read_json(path, file, raw, column, prompt)
    return None


def as_dict(value):
    """A row of JSON; if it is not an object, a dict whose name describes it in errors."""
    return value if isinstance(value, dict) else {f'a {type(value).__name__}': None}


def read_jsonl(path, file, raw):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f'{path}:{number} is not JSON: {e}') from e
            yield as_dict(value), f'{path}:{number}', raw.tell()


def read_json(path, file, raw, column, prompt):
    """
    The rows of a .json file: a list of objects, an object a line, or one object. None if it is
    something else, such as a file of settings, and no column was asked for.
    """
    content = file.read()
    file.seek(0)
    wants_table = column != 'text' or prompt
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        if is_object(content.lstrip().split(b'\n', 1)[0]):
            return read_jsonl(path, file, raw)
        if wants_table or content.lstrip().startswith(b'['):
            raise UserError(f'{path} is not JSON: {e}') from e
        return None
    if isinstance(value, list):
        return read_list(path, value, raw)
    if isinstance(value, dict) and (column in value or 'messages' in value):
        return iter([(value, path, raw.tell())])
    if wants_table:
        raise UserError(f'{path} is not a table: it needs a list of objects')
    return None


def is_object(line):
    """Whether a line, in bytes, is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_list(path, values, raw):
    for number, value in enumerate(values, 1):
        yield as_dict(value), f'{path}: row {number}', raw.tell()


def read_csv(path, file, raw):
    csv.field_size_limit(2**31 - 1)  # the default limit is too low for texts
    text = io.TextIOWrapper(file, encoding='utf-8-sig', newline='')
    header = text.readline()
    delimiter = '\t'
    if suffix(path) == '.csv':  # Excel writes the delimiter that is usual in its country
        delimiter = max(',;\t', key=header.count)
    reader = csv.reader(chain([header], text), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for values in reader:
            where = f'{path}:{reader.line_num}'
            if values and len(values) != len(names):
                raise UserError(
                    f'{where} has {len(values)} fields, its header {len(names)}; '
                    f'a text with {delimiter!r} in it needs quotes'
                )
            if values:
                yield dict(zip(names, values)), where, raw.tell()
    except csv.Error as e:
        raise UserError(f'{path}:{reader.line_num} is not valid {suffix(path)}: {e}') from e


def read_parquet(path, raw, column, prompt):
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(raw)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f'{path} is not a Parquet file: {e}') from e
    size, total = os.path.getsize(path), max(1, table.metadata.num_rows)
    names = table.schema_arrow.names
    needed = {column, prompt} & {*names} or {'messages'}
    done = 0
    try:
        # all columns if the needed ones are missing: the error names them
        columns = [name for name in names if name in needed] or names
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                done += 1
                yield row, f'{path}: row {done}', size * done // total
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f'{path} is damaged after row {done}: {e}') from e
