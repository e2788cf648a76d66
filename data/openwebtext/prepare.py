"""
OpenWebText in GPT-2's BPE: train.bin (about 17 GB, 9.0 billion tokens) and val.bin.

    python data/openwebtext/prepare.py                                # from the Hugging Face hub
    python data/openwebtext/prepare.py --data_files='crawl/*.parquet' # the same code on local files

Uses all cores and little memory. Interrupt it at will: run again, it goes on where it was.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
hub_name = 'Skylion007/openwebtext' # a dataset of the Hugging Face hub
revision = 'refs/convert/parquet' # the hub's own Parquet copy: dataset scripts no longer run
data_files = '' # local .parquet files to read instead, a glob
column = 'text' # the column that holds the documents
streaming = False # True reads from the hub as it goes, without the 40 GB cache on disk
# where they go
output_dir = HERE # gets train.bin and val.bin
val_every = 2000 # one document in so many is held out: 0.05%
# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    from datasets import load_dataset

    from data.tokenizer import write_documents

    try:
        if data_files:
            documents = load_dataset('parquet', data_files=data_files, split='train', streaming=streaming)
        else:
            documents = load_dataset(hub_name, revision=revision, split='train', streaming=streaming)
    except Exception as e: # datasets and the hub raise many kinds
        raise OSError(f'{data_files or hub_name} cannot be loaded: {e}') from e
    if column not in (documents.column_names or [column]):
        raise ValueError(f'no column {column!r} in {data_files or hub_name}; it has {", ".join(documents.column_names)}')
    write_documents(
        output_dir,
        lambda done: (batch[column] for batch in documents.skip(done).iter(batch_size=1000)),
        total=None if streaming else len(documents),
        source=f'{data_files or hub_name}:{column}:{val_every}',
        val_every=val_every,
    )
