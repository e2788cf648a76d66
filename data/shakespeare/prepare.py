"""
Tiny Shakespeare in GPT-2's BPE, for fine-tuning GPT-2: input.txt, train.bin and val.bin.

    python data/shakespeare/prepare.py
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

if __name__ == '__main__':
    configure(globals())

from data.shakespeare_char.prepare import shakespeare_text
from data.write import write_dataset

if __name__ == '__main__':
    write_dataset(HERE, shakespeare_text(os.path.join(HERE, 'input.txt')))
