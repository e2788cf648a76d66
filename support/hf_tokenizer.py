"""Tokenizers as files in the format of the package tokenizers, which transformers loads."""

import base64
import json
import os
import tempfile

from data.bpe import gpt2_encoding, tiktoken_encoding
from data.tokenizer import from_meta


def tokenizer_files(meta, block_size):
    """The tokenizer of a meta as {file name: text}."""
    kind = meta.get('tokenizer')
    if kind == 'json':
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(meta['json'])
    elif kind == 'byte':
        tokenizer = byte_tokenizer()
    elif kind == 'gpt2':
        tokenizer = bpe_tokenizer(gpt2_encoding())
    elif kind == 'tiktoken':
        tokenizer = bpe_tokenizer(tiktoken_encoding(meta['name']))
    else:
        tokenizer = char_tokenizer(meta['stoi'])
    whole = json.loads(tokenizer.to_str())
    ours, vocabulary = from_meta(meta), whole['model']['vocab']
    if isinstance(vocabulary, dict):  # some readers count the tokens, and cl100k_base skips ids
        for i in sorted(set(range(ours.vocab_size)) - set(tokenizer.get_vocab().values())):
            vocabulary[f'<|unused {i}|>'] = i
    eot = None if ours.eot is None else tokenizer.id_to_token(ours.eot)
    unknown = whole['model'].get('unk_token')
    if unknown is None or tokenizer.token_to_id(unknown) is None:
        unknown = eot  # as for GPT-2; no text needs it, but CTranslate2 asks for one
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',  # transformers 4 has no TokenizersBackend
        'bos_token': eot,
        'eos_token': eot,
        'unk_token': unknown,
        'model_max_length': block_size,
        'clean_up_tokenization_spaces': False,
    }
    return {
        'tokenizer.json': json.dumps(whole, ensure_ascii=False),
        'tokenizer_config.json': json.dumps(config, ensure_ascii=False, indent=2),
    }


def byte_tokenizer():
    """Each byte of UTF-8 is a token, and <|endoftext|> is number 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary['<|endoftext|>'] = 256
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bpe_tokenizer(encoding):
    """The BPE of a tiktoken.Encoding."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # special tokens stand in the file too: so they keep their ids where others before them are free
    special = {token.encode(): i for token, i in encoding._special_tokens.items()}
    ranks = {**encoding._mergeable_ranks, **special}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'ranks')
        with open(path, 'wb') as f:
            for token, i in ranks.items():
                f.write(base64.b64encode(token) + b' %d\n' % i)
        return TikTokenConverter(
            vocab_file=path,
            pattern=encoding._pat_str,
            extra_special_tokens=list(encoding._special_tokens),
        ).converted()


def char_tokenizer(stoi):
    """Each character is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(stoi))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('[\\s\\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
