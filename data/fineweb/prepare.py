"""
FineWeb-Edu's sample of 10 billion tokens in GPT-2's BPE: train.bin (about 20 GB) and val.bin.

    python data/fineweb/prepare.py                                   # from the Hugging Face hub
    python data/fineweb/prepare.py --hub_name=HuggingFaceFW/fineweb  # the sample of all of FineWeb
    python data/fineweb/prepare.py --data_files='crawl/*.parquet'    # from local files

Uses all cores and little memory. If it is interrupted, the same command resumes.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

# -----------------------------------------------------------------------------
# where the documents come from
hub_name = 'HuggingFaceFW/fineweb-edu'  # a dataset of the Hugging Face hub
name = 'sample-10BT'  # its configuration; 'sample-100BT' is ten times larger
data_files = ''  # local .parquet files to read instead, a glob
column = 'text'  # the column with the text of the documents
streaming = False  # True: read over the network, without a cache on disk
# where they go
output_dir = HERE  # gets train.bin and val.bin
val_every = 1000  # one document in this many is held out
# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config, _ = configure(globals())
    from data.hub import prepare

    prepare(**config)
