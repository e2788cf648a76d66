"""
Tokenizers: text to token ids and back. The meta of a dataset, a dict of plain data in its meta.pkl,
describes its tokenizer and travels in checkpoints. Without meta.pkl the tokens are GPT-2's BPE.
"""

import json
import os
import pickle
import re

import numpy as np

from data.bpe import gpt2_encoding, tiktoken_encoding
from support.errors import UserError

EOT = '<|endoftext|>'
GPT2 = {'tokenizer': 'gpt2', 'vocab_size': 50257}  # the meta of a dataset without meta.pkl
DATA = os.path.dirname(os.path.abspath(__file__))


def dataset_dir(name):
    """The folder of a dataset in data/; relative if the current folder is the project's."""
    if os.path.dirname(DATA) == os.path.abspath(os.curdir):
        return os.path.join('data', name)
    return os.path.join(DATA, name)


# -----------------------------------------------------------------------------
# tokenizers
def from_meta(meta):
    """
    The tokenizer that a meta describes. All kinds have

    encode(text): a list of ids, for prompts; <|endoftext|> in the text becomes its id
    to_array(text): an array of ids, for documents; faster, and <|endoftext|> stays text
    decode(ids): text
    byte_counts(): a list with the number of UTF-8 bytes of each id; 0 for special tokens
    vocab_size: the number of ids
    eot: the id of <|endoftext|>, which ends documents, or None
    """
    kind = meta.get('tokenizer')
    if kind == 'gpt2':
        return TiktokenTokenizer(gpt2_encoding())
    if kind == 'tiktoken':
        return TiktokenTokenizer(tiktoken_encoding(meta['name']))
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'json':
        return JsonTokenizer(meta)
    return CharTokenizer(meta)


class TiktokenTokenizer:
    """GPT-2's BPE, or another encoding of tiktoken's."""

    def __init__(self, bpe):
        self.bpe, self.vocab_size, self.eot = bpe, bpe.n_vocab, bpe.eot_token
        # not range(vocab_size): cl100k_base and others skip ids
        self.ids = {*bpe._mergeable_ranks.values(), *bpe._special_tokens.values()}

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={EOT}, disallowed_special=())

    def to_array(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i in self.ids])

    def byte_counts(self):
        counts = [0] * self.vocab_size
        for token, i in self.bpe._mergeable_ranks.items():
            counts[i] = len(token)
        return counts


class ByteTokenizer:
    """One id a byte of UTF-8, and one for <|endoftext|>."""

    vocab_size, eot = 257, 256

    def encode(self, text):
        return encode_with_eot(text, EOT, self.eot, str.encode)

    def to_array(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids):
        parts = [EOT.encode() if i == self.eot else bytes([i]) for i in ids]
        return b''.join(parts).decode('utf-8', 'replace')

    def byte_counts(self):
        return [1] * 256 + [0]


class JsonTokenizer:
    """A tokenizer.json, the format of the package tokenizers and of the Hugging Face hub."""

    def __init__(self, meta):
        import tokenizers

        try:
            self.bpe = tokenizers.Tokenizer.from_str(meta['json'])
            self.document_bpe = tokenizers.Tokenizer.from_str(meta['json'])
        except Exception as e:  # tokenizers raises a bare Exception
            raise UserError(f'the tokenizer in meta.pkl is damaged ({e})') from e
        self.document_bpe.encode_special_tokens = True  # special tokens in documents are text
        self.json, self.vocab_size, self.eot = meta['json'], meta['vocab_size'], meta.get('eot')

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def to_array(self, text):
        ids = self.document_bpe.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)

    def byte_counts(self):
        decoder = json.loads(self.json)['decoder'] or {}
        byte_level = 'ByteLevel' in str(decoder)
        word_piece = decoder.get('type') == 'WordPiece'
        added = self.bpe.get_added_tokens_decoder()
        counts = []
        for i in range(self.vocab_size):
            token = self.bpe.id_to_token(i)
            if token is None or i in added and added[i].special:
                counts.append(0)
            elif byte_level:  # each character stands for a byte
                counts.append(len(token))
            elif word_piece:
                counts.append(word_piece_bytes(token, decoder['prefix']))
            else:
                counts.append(sentence_piece_bytes(token))
        return counts


def word_piece_bytes(token, prefix):
    """The number of bytes of a WordPiece token: without the prefix, a space comes before it."""
    if token.startswith(prefix):
        return len(token.removeprefix(prefix).encode())
    return len(token.encode()) + 1


def sentence_piece_bytes(token):
    """The number of bytes of a SentencePiece token: a byte such as <0x0A>, or text."""
    if re.fullmatch('<0x[0-9A-F]{2}>', token):
        return 1
    return len(token.replace('\u2581', ' ').encode())


class CharTokenizer:
    """One id a character, and maybe one for <|endoftext|>."""

    def __init__(self, meta):
        self.stoi, self.itos = meta['stoi'], meta['itos']
        self.vocab_size, self.eot = meta['vocab_size'], meta.get('eot')
        self.table = np.full(0x110000, -1, dtype=np.int32)  # the id of each code point
        for char, i in self.stoi.items():
            if i != self.eot:
                self.table[ord(char)] = i

    def encode(self, text):
        return encode_with_eot(text, self.itos.get(self.eot), self.eot, self.to_list)

    def to_list(self, text):
        return self.to_array(text).tolist()

    def to_array(self, text):
        code_points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)
        ids = self.table[code_points]
        if len(ids) and ids.min() < 0:
            missing = ', '.join(map(repr, sorted(set(text) - set(self.stoi))[:5]))
            known = ''.join(sorted(set(self.stoi) - {self.itos.get(self.eot)}))
            raise UserError(f'the vocabulary lacks {missing}; it has {known!r}')
        return ids

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)

    def byte_counts(self):
        counts = [len(self.itos[i].encode('utf-8', 'replace')) for i in range(self.vocab_size)]
        if self.eot in self.itos:
            counts[self.eot] = 0
        return counts


def encode_with_eot(text, mark, eot, encode):
    """Encode a text in which each `mark` becomes the id `eot`. A mark of None: there is no eot."""
    if not mark:
        return encode(text)
    first, *others = text.split(mark)
    ids = list(encode(first))
    for part in others:
        ids += [eot, *encode(part)]
    return ids


def continuation(tokenizer, before, new):
    """
    The text that the ids `new` add after the ids `before`.

    Decoded by themselves they may lose their first space (SentencePiece, WordPiece).
    """
    before = before[-8:]
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]


def byte_counts(meta):
    """The number of UTF-8 bytes of each token id, a list; 0 for <|endoftext|> and the like."""
    return from_meta(meta).byte_counts()


# -----------------------------------------------------------------------------
# metas
def char_meta(text):
    """The meta of a vocabulary of all characters in `text`, in the order of their code points."""
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    return {'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}


def model_vocab_size(meta):
    """A model's vocab_size for this tokenizer; for BPEs a multiple of 64, which is faster."""
    if 'stoi' in meta:
        return meta['vocab_size']
    return -(-meta['vocab_size'] // 64) * 64


def same_tokenizer(meta, other):
    """Whether two metas describe the same tokenizer."""
    return {**meta, 'dtype': None} == {**other, 'dtype': None}


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; raises if a pickle names a class or function."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it names {module}.{name}; a meta file holds plain data only')


def load_meta(path):
    """The dict in a meta.pkl. Raises UserError if it is damaged, malformed, or names code."""
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f'{path} refused: {e or type(e).__name__}') from e
    return check_meta(meta, path)


def dataset_meta(folder):
    """The meta of the dataset in a folder: its meta.pkl, or GPT-2's BPE."""
    path = os.path.join(folder, 'meta.pkl')
    return load_meta(path) if os.path.exists(path) else GPT2


def check_meta(meta, where):
    """`meta` itself. Raises UserError, with `where` it came from, if it is no tokenizer's."""
    if not is_meta(meta):
        raise UserError(
            f'{where} refused: it needs vocab_size, stoi and itos that agree, or the name of a '
            'tokenizer; prepare the dataset again'
        )
    return meta


def is_meta(meta):
    """Whether a value of any type describes a tokenizer."""
    if not isinstance(meta, dict):
        return False
    if type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
        return False
    if type(meta.get('eot')) not in (int, type(None)):
        return False
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        return False
    needed = {'gpt2': [], 'byte': [], 'tiktoken': ['name'], 'json': ['json']}
    kind = meta.get('tokenizer')
    if isinstance(kind, str) and kind in needed:
        return all(isinstance(meta.get(name), str) for name in needed[kind])
    return is_char_meta(meta)


def is_char_meta(meta):
    """Whether stoi and itos are each other's inverse, over single characters and <|endoftext|>."""
    stoi, itos = meta.get('stoi'), meta.get('itos')
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        return False
    if not len(stoi) == len(itos) == meta['vocab_size']:
        return False
    for char, i in stoi.items():
        if not isinstance(char, str) or type(i) is not int or not 0 <= i < len(itos):
            return False
        if itos.get(i) != char or len(char) != 1 and i != meta.get('eot'):
            return False
    return True
