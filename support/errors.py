"""Errors: a mistake of the user is printed in one line, a bug keeps its traceback."""

import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class UserError(ValueError):
    """Wrong settings or input. The message says what came and what is needed."""


class FileError(OSError):
    """A file or a download that is missing or fails. The message says what to do."""


def fail(message, code=2):
    """Print an error in one line and exit with this code."""
    message = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    rank = f'[rank {os.environ["RANK"]}] ' if 'RANK' in os.environ else ''
    print(f'{rank}error: {message}', file=sys.stderr, flush=True)
    report_to_torchrun(message)
    raise SystemExit(code)


def report_to_torchrun(message):
    """Write the message into torchrun's error file, from which it prints the root cause."""
    if 'TORCHELASTIC_ERROR_FILE' not in os.environ:
        return
    report = {'message': message, 'extraInfo': {'timestamp': str(int(time.time()))}}
    with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as f:
        json.dump({'message': report}, f)


def prepare_output():
    """Make sure that print() never fails, whatever standard output and error are."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        if hasattr(getattr(sys, name), 'reconfigure'):  # a Windows console lacks many characters
            getattr(sys, name).reconfigure(errors='replace')


def one_line_errors(kind, error, trace):
    """
    sys.excepthook: print errors that concern the user in one line.

    Exit code 2: a UserError or FileError, another file that cannot be opened, a missing package.
    Exit code 1: logits that are not finite, a full disk, too little memory. All other exceptions
    are bugs and keep their traceback.
    """
    while trace and trace.tb_next:
        trace = trace.tb_next  # of the innermost call
    text = ' '.join(str(error).split())
    if issubclass(kind, (UserError, FileError)):
        fail(text)
    if trace and is_ours(trace):
        if issubclass(kind, OSError) and error.filename:
            fail(f'{error.filename}: {error.strerror}')
        if issubclass(kind, OSError) and not issubclass(kind, BrokenPipeError):
            # numpy reports a full disk without a reason
            fail(error.strerror or f'could not be written, is the disk full? {error}', 1)
        if issubclass(kind, ModuleNotFoundError):
            script = os.path.basename(trace.tb_frame.f_code.co_filename)
            fail(
                f'{script}:{trace.tb_lineno} needs the package {error.name}, which '
                f'{sys.executable} does not have; activate the environment '
                '(. .venv/bin/activate) or install into this one (pip install -e .)'
            )
        if issubclass(kind, FloatingPointError):
            fail(text, 1)
    if is_out_of_memory(kind, error):
        fail('out of memory; a smaller --batch_size or --block_size takes less', 1)
    if issubclass(kind, BrokenPipeError):  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1)
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted', file=sys.stderr, flush=True)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)
    report_to_torchrun(f'{kind.__name__}: {error}')


def is_ours(trace):
    """Whether this traceback entry is in a file of this project."""
    path = os.path.abspath(trace.tb_frame.f_code.co_filename)
    return path.startswith(ROOT + os.sep) and 'site-packages' not in path


def is_out_of_memory(kind, error):
    if issubclass(kind, MemoryError) or kind.__name__ == 'OutOfMemoryError':
        return True
    messages = ("can't allocate memory", 'Storage size calculation overflowed')  # torch's
    return any(message in str(error) for message in messages)
