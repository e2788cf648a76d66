"""Documents from a Parquet dataset of the Hugging Face hub, or from local Parquet files, to train.bin and val.bin."""

from .tokenizer import write_documents


def prepare(hub_name, data_files, column, streaming, output_dir, val_every, **where):
    """
    Write a dataset in GPT-2's BPE, one document in `val_every` held out. Interrupted and repeated, it goes on where it was.

    hub_name: a dataset of the hub; data_files: local files to read instead, a glob; column: what holds the text
    streaming: read over the network as it goes, without a cache on disk; where: more for load_dataset (name, revision)
    Raises OSError where the documents cannot be reached, ValueError where they have no such column.
    """
    from datasets import load_dataset
    try:
        if data_files:
            documents = load_dataset('parquet', data_files=data_files, split='train', streaming=streaming)
        else:
            documents = load_dataset(hub_name, split='train', streaming=streaming, **where)
    except Exception as e: # datasets and the hub raise many kinds
        raise OSError(f'{data_files or hub_name} cannot be loaded: {e}') from e
    if column not in (documents.column_names or [column]):
        raise ValueError(f'no column {column!r} in {data_files or hub_name}; it has {", ".join(documents.column_names)}')
    write_documents(
        output_dir,
        lambda done: (batch[column] for batch in documents.skip(done).iter(batch_size=1000)),
        total=None if streaming else len(documents),
        source=':'.join([data_files or hub_name, *where.values(), column, str(val_every)]),
        val_every=val_every,
    )
