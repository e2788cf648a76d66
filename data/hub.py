"""Documents of the Hugging Face hub, or of local Parquet files, to train.bin and val.bin."""

import glob
import os

from data.write import Piece, write_documents
from support.errors import FileError, UserError


def load_documents(hub_name, column, streaming, data_files='', **where):
    """
    A dataset of the hub, or of local Parquet files, from the package datasets.

    data_files: a glob of local files; where: more arguments for load_dataset (name, revision)
    Raises FileError if it cannot be loaded, UserError if it lacks the column.
    """
    import logging

    from datasets import load_dataset

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # no lines about its retries
    source = data_files or hub_name
    if data_files:
        hub_name, where = 'parquet', {'data_files': data_files}
    try:
        documents = load_dataset(hub_name, split='train', streaming=streaming, **where)
    except Exception as e:  # datasets and the hub raise many types
        raise FileError(f'{source} cannot be loaded: {e}') from e
    columns = documents.column_names  # None: not known before the first row
    if columns and column not in columns:
        raise UserError(f'no column {column!r} in {source}; it has {", ".join(columns)}')
    return documents


def unbroken(items, source):
    """Yield the items of a dataset. Raises FileError if the network or the data breaks off."""
    try:
        yield from items
    except Exception as e:  # datasets and the hub raise many types
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise FileError(f'{source} broke off ({reason}); repeat the command') from e


def prepare(hub_name, data_files, column, streaming, output_dir, val_every, **where):
    """
    Tokenize a dataset with GPT-2's BPE; one document in `val_every` is val. If it is interrupted,
    the next call resumes.

    data_files: a glob of local Parquet files, read instead of the hub's dataset
    streaming: read over the network, without a cache on disk
    where: more arguments for load_dataset (name, revision)
    """
    if val_every < 2:
        raise UserError(f'val_every={val_every} must be at least 2')
    documents = load_documents(hub_name, column, streaming, data_files, **where)
    source = data_files or hub_name

    def pieces_after(n):
        for batch in unbroken(documents.skip(n).iter(batch_size=1000), source):
            for text in batch[column]:
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise UserError(
                        f'{source}: document {n + 1} has no text in column {column!r} but {kind}'
                    )
                split = 'val' if n % val_every == val_every - 1 else 'train'
                yield Piece(text, split, ends=True)
                n += 1

    write_documents(
        output_dir,
        pieces_after,
        ':'.join([source, *where.values(), column, str(val_every), *versions(data_files)]),
        total=None if streaming else len(documents),
        few=f'too few documents to hold out one in {val_every}; lower --val_every',
    )


def versions(data_files):
    """The path, size and time of each local file, so that changed files are read anew."""
    found = []
    for path in sorted(glob.glob(data_files, recursive=True)):
        found.append(f'{path} {os.path.getsize(path)} {os.stat(path).st_mtime_ns}')
    return found
