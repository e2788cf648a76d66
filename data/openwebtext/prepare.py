"""
OpenWebText in GPT-2's BPE: train.bin (about 17 GB, 9.0 billion tokens) and val.bin.

    python data/openwebtext/prepare.py                                 # from the Hugging Face hub
    python data/openwebtext/prepare.py --data_files='crawl/*.parquet'  # from local files

Uses all cores and little memory. If it is interrupted, the same command resumes.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
hub_name = 'Skylion007/openwebtext'  # a dataset of the Hugging Face hub
revision = 'refs/convert/parquet'  # the hub's own Parquet copy: dataset scripts no longer run
data_files = ''  # local .parquet files to read instead, a glob
column = 'text'  # the column with the text of the documents
streaming = False  # True: read over the network, without 40 GB of cache on disk
# where they go
output_dir = HERE  # gets train.bin and val.bin
val_every = 2000  # one document in this many is held out
# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config, _ = configure(globals())
    from data.hub import prepare

    prepare(**config)
