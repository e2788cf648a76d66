"""Files that are written whole or not at all."""

import os
import re
import secrets


def write_whole(path, write):
    """
    Call write(file) on a temporary file and move it to `path`: there whole, or not at all, power cuts included. What a link
    points to is written; what is no regular file, such as /dev/null or a pipe, is written to directly.
    """
    if path.startswith('/dev/') or os.path.exists(path) and not os.path.isfile(path):
        with open(path, 'wb') as f:
            return write(f)
    path = os.path.realpath(path) if os.path.islink(path) else path
    partial = partial_name(path)
    try:
        with open(partial, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        if (
            os.name == 'posix'
        ):  # the new name lasts once its folder is on disk; Windows does not open folders
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as e:
        if e.filename == partial:
            e.filename = path  # the name that the user knows
        raise
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def partial_name(path):
    """A name for a temporary file beside `path`, for this writer alone."""
    return f'{path}.{os.getpid()}-{secrets.token_hex(4)}.partial'


def remove_partials(folder):
    """Remove temporary files of writers that were killed. No writer may be at work in `folder`."""
    for name in os.listdir(folder):
        if re.search(r'\.\d+-[0-9a-f]{8}\.partial$', name):
            os.remove(os.path.join(folder, name))
