"""Files and folders that are written whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
import socket

from configurator import fail
from support.errors import FileError, UserError


def write_whole(path, write):
    """
    Call write(file) on a temporary file, then move that file to `path`.

    Even after a power cut `path` holds either the whole new file or what was there before.
    A link is followed. /dev/null, a pipe and the like are written to directly.
    """
    if path.startswith('/dev/') or (os.path.exists(path) and not os.path.isfile(path)):
        with open(path, 'wb') as f:
            return write(f)
    if os.path.islink(path):
        path = os.path.realpath(path)
    partial = partial_name(path)
    try:
        with open(partial, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        sync_folder(os.path.dirname(path) or '.')
    except OSError as e:
        if e.filename == partial:
            e.filename = path  # the name that the user knows
        raise
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def sync_folder(folder):
    """Write a folder's list of names to disk. Windows does not open folders and needs no sync."""
    if os.name != 'posix':
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def partial_name(path):
    """A name for a temporary file beside `path` that no other writer uses."""
    return f'{path}.{os.getpid()}-{secrets.token_hex(4)}.partial'


def remove_partials(folder):
    """Remove the temporary files of killed writers. No writer may be active in `folder`."""
    for name in os.listdir(folder):
        if re.search(r'\.\d+-[0-9a-f]{8}\.partial$', name):
            os.remove(os.path.join(folder, name))


@contextlib.contextmanager
def new_folder(path):
    """
    A temporary folder to write to, moved to `path` at the end of the block: whole or not at all.

    Raises FileError if the folder cannot be created. Exits with code 1 and one line if a file in it
    cannot be written.
    """
    from safetensors import SafetensorError

    partial = partial_name(os.path.abspath(path))  # abspath drops a slash at the end
    try:
        os.mkdir(partial)
    except OSError as e:
        raise FileError(f'{path} cannot be created: {e.strerror}') from e
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as e:
        cause = e
        while cause.__context__ and not getattr(cause, 'strerror', None):
            cause = cause.__context__  # torch wraps the error of the file system
        fail(f'{path} cannot be written: {getattr(cause, "strerror", None) or cause}', 1)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def lock(folder):
    """
    Open and lock run.lock in `folder`, until this process ends in any way, also over NFS. Returns
    the file, None if the system has no locks. Raises UserError if another process holds it.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    file = open(os.path.join(folder, 'run.lock'), 'a+', encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        raise UserError(
            f'out_dir={folder!r} is that of a run under way ({file.read().strip()}); '
            'give this one its own --out_dir'
        ) from e
    except OSError:  # the file system has none
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    return file
