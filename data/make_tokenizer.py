"""Make the meta of a tokenizer from what a user asks for: a kind, a name, or a file."""

import json
import os
import sys

from data.bpe import tiktoken_encoding
from data.tokenizer import EOT, GPT2, char_meta
from support.errors import UserError

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # OpenAI's weights on the hub


def make_meta(tokenizer, vocab_size=None, texts=(), characters=None):
    """
    The meta of a tokenizer, dtype of .bin files included.

    tokenizer: 'char' (over the set `characters`), 'byte', 'gpt2', a name that tiktoken has,
        a tokenizer.json, a folder or name of the Hugging Face hub, or 'train': a byte-level BPE of
        `vocab_size` ids learned from `texts` (an iterable)
    Raises UserError if it is none of these.
    """
    if tokenizer == 'char':
        return with_dtype(char_meta_with_eot(characters))
    if tokenizer == 'byte':
        return with_dtype({'tokenizer': 'byte', 'vocab_size': 257})
    if tokenizer == 'gpt2':
        return with_dtype(GPT2)
    if tokenizer == 'train':
        return with_dtype(train_bpe(vocab_size, texts))
    return with_dtype(named_meta(tokenizer))


def with_dtype(meta):
    """A copy of a meta that also has the dtype of its ids in .bin files."""
    return {**meta, 'dtype': 'uint16' if meta['vocab_size'] <= 65536 else 'uint32'}


def char_meta_with_eot(characters):
    """The meta of a set of characters; <|endoftext|>, if it is in the set, has the last id."""
    meta = char_meta(''.join(characters - {EOT}))
    if EOT in characters:
        meta['eot'] = meta['vocab_size']
        meta['stoi'][EOT] = meta['eot']
        meta['itos'][meta['eot']] = EOT
        meta['vocab_size'] += 1
    return meta


def train_bpe(vocab_size, texts):
    """The meta of a byte-level BPE learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    size = bpe.get_vocab_size()
    return {'tokenizer': 'json', 'json': bpe.to_str(), 'vocab_size': size, 'eot': 0}


def named_meta(name):
    """The meta of a tokenizer of tiktoken's or of the Hugging Face hub."""
    import tiktoken

    if name in tiktoken.list_encoding_names():
        vocab_size = tiktoken_encoding(name).n_vocab
        return {'tokenizer': 'tiktoken', 'name': name, 'vocab_size': vocab_size}
    meta = hub_meta(name)
    if meta.get('tokenizer') == 'json' and meta['eot'] is None:
        raise UserError(f'tokenizer={name!r} has no token to end documents with, such as {EOT}')
    return meta


def hub_meta(name):
    """
    The meta of a tokenizer.json, or of a folder or name that AutoTokenizer of transformers knows.

    For a tokenizer of single characters it is as char_meta() makes it, for GPT-2's BPE it is GPT2.
    Its eot may be None. Raises UserError if there is no such tokenizer.
    """
    if name in GPT2_SIZES:
        return dict(GPT2)
    bpe, eos_token = load_hub_tokenizer(name)
    bpe.no_truncation()
    bpe.no_padding()
    size = max(bpe.get_vocab().values()) + 1
    eot = find_eot(bpe, eos_token)
    text = bpe.to_str()
    model = json.loads(text)['model']
    if is_characters(model, eot):
        stoi = model['vocab']
        itos = {i: char for char, i in stoi.items()}
        meta = {'vocab_size': size, 'stoi': stoi, 'itos': itos}
        return meta if eot is None else {**meta, 'eot': eot}
    if is_gpt2(bpe, size):
        return dict(GPT2)
    return {'tokenizer': 'json', 'json': text, 'vocab_size': size, 'eot': eot}


def load_hub_tokenizer(name):
    """(tokenizers.Tokenizer, its eos_token or None) of a tokenizer.json, a folder or a name."""
    import tokenizers

    try:
        if os.path.isfile(name):
            return tokenizers.Tokenizer.from_file(name), None
        import logging

        from transformers import AutoTokenizer

        logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
        if not os.path.isdir(name) and sys.stderr.isatty():
            print(f'asking the Hugging Face hub for {name} ...', file=sys.stderr, flush=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        return tokenizer.backend_tokenizer, tokenizer.eos_token
    except Exception as e:  # transformers and the hub raise many types
        reason = str(e).strip() or type(e).__name__
        raise UserError(
            f"tokenizer={name!r} is none of 'char', 'byte', 'gpt2', 'train', tiktoken's names, "
            'a tokenizer.json, or a tokenizer of the Hugging Face hub within reach '
            f'({reason.splitlines()[0]})'
        ) from e


def find_eot(bpe, eos_token):
    """The id of the token that ends documents: eos_token, or one of the usual names; or None."""
    for token in (eos_token, EOT, '<|end_of_text|>', '</s>', '<eos>'):
        if token and bpe.token_to_id(token) is not None:
            return bpe.token_to_id(token)
    return None


def is_characters(model, eot):
    """Whether the model of a tokenizer.json is a list of single characters, eot aside."""
    if model['type'] != 'WordLevel':
        return False
    return all(len(token) == 1 or i == eot for token, i in model['vocab'].items())


def is_gpt2(bpe, vocab_size):
    """Whether a tokenizer is GPT-2's, by its size and some of its ids."""
    known = {'Hello': 15496, '\u0120world': 995, '\u0120SolidGoldMagikarp': 43453, EOT: 50256}
    if vocab_size != 50257:
        return False
    return all(bpe.token_to_id(token) == i for token, i in known.items())
