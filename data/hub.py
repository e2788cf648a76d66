"""Documents from a dataset of the Hugging Face hub, or from local Parquet files, to train.bin and val.bin."""

import glob
import os

from .write import Piece, write_documents


def load_documents(hub_name, column, streaming, data_files='', **where):
    """
    The `datasets` dataset of a name of the hub, or of local Parquet files (a glob).

    where: more for load_dataset (name, revision)
    Raises OSError where it cannot be reached, ValueError where it has no such column.
    """
    import logging

    from datasets import load_dataset

    logging.getLogger('huggingface_hub').setLevel(
        logging.ERROR
    )  # what it retries is not the user's to read
    try:
        if data_files:
            documents = load_dataset(
                'parquet', data_files=data_files, split='train', streaming=streaming
            )
        else:
            documents = load_dataset(hub_name, split='train', streaming=streaming, **where)
    except Exception as e:  # datasets and the hub raise many kinds
        raise OSError(f'{data_files or hub_name} cannot be loaded: {e}') from e
    if column not in (documents.column_names or [column]):
        raise ValueError(
            f'no column {column!r} in {data_files or hub_name}; it has {", ".join(documents.column_names)}'
        )
    return documents


def unbroken(items, source):
    """The items of a dataset one after the other; an OSError where the network, or the data, breaks off."""
    try:
        yield from items
    except Exception as e:  # of many kinds
        raise OSError(
            f'{source} broke off ({" ".join(str(e).split()) or type(e).__name__}); repeat the command'
        ) from e


def prepare(hub_name, data_files, column, streaming, output_dir, val_every, **where):
    """
    Write a dataset in GPT-2's BPE, one document in `val_every` held out. Interrupted and repeated, it goes on where it was.

    hub_name: a dataset of the hub; data_files: local files to read instead, a glob; column: what holds the text
    streaming: read over the network as it goes, without a cache on disk; where: more for load_dataset (name, revision)
    """
    if val_every < 2:
        raise ValueError(f'val_every={val_every} must be at least 2')
    documents = load_documents(hub_name, column, streaming, data_files, **where)
    files = [
        f'{path} {os.path.getsize(path)} {os.stat(path).st_mtime_ns}'
        for path in sorted(glob.glob(data_files, recursive=True))
    ]  # others start anew

    def pieces_after(n):
        for batch in unbroken(documents.skip(n).iter(batch_size=1000), data_files or hub_name):
            for text in batch[column]:
                if not isinstance(text, str):
                    raise ValueError(
                        f'{data_files or hub_name}: document {n + 1} has no text in column {column!r} but {type(text).__name__}'
                    )
                yield Piece(text, 'val' if n % val_every == val_every - 1 else 'train', ends=True)
                n += 1

    write_documents(
        output_dir,
        pieces_after,
        source=':'.join([data_files or hub_name, *where.values(), column, str(val_every), *files]),
        total=None if streaming else len(documents),
        few=f'too few documents to hold out one in {val_every}; lower --val_every',
    )
