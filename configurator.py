"""
Knobs. A script states its settings as plain globals, each with a trailing comment, then calls

    config, given = configure(globals())

and from that line on the globals hold what the command line asked for:

    python train.py config/train_gpt2.py config/cpu.py --batch_size=4 --out_dir=out-try

Config files (plain Python) and --name=value flags apply from left to right. The value is
everything after the first '='. `--help` prints every knob with its comment, by section.
"""

import ast
import difflib
import json
import linecache
import math
import os
import sys
import time
import tokenize
import traceback
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))  # where config/ and data/ are
WORDS = {  # other projects' words, and the knob that each stands for where a script has it
    'data_dir': 'dataset',
    'resume_from': 'init_from',
    'weights_only': 'init_from',
    'wandb_enabled': 'wandb_log',
    'enabled': 'wandb_log',
    'project': 'wandb_project',
    'run_name': 'wandb_run_name',
    'lr': 'learning_rate',
    'max_steps': 'max_iters',
    'grad_accum': 'gradient_accumulation_steps',
    'prompt': 'start',
}


class Knob(NamedTuple):
    name: str
    types: tuple[str, ...]  # what it may hold: 'int', 'float', 'bool', 'str', 'list', 'None'
    default: str  # as written in the script
    comment: str  # the comment that trails it
    section: str  # the comment line above its group


def fail(message, code=2):
    """Say what is wrong in one line and leave with this exit code."""
    message = ''.join(
        c if c.isprintable() else repr(c)[1:-1] for c in message
    )  # whatever text was quoted in it
    rank = f"[rank {os.environ['RANK']}] " if 'RANK' in os.environ else ''
    print(f'{rank}error: {message}', file=sys.stderr, flush=True)
    tell_torchrun(message)
    raise SystemExit(code)


def tell_torchrun(message):
    """Under torchrun: what to show as the root cause when it sums up (the form of its own error files)."""
    if 'TORCHELASTIC_ERROR_FILE' in os.environ:
        with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as f:
            json.dump(
                {
                    'message': {
                        'message': message,
                        'extraInfo': {'timestamp': str(int(time.time()))},
                    }
                },
                f,
            )


def configure(ns, model=None, also=(), own=(), of_files=None, paths=()):
    """
    Overwrite the knobs in `ns`, the calling script's globals(), from sys.argv.

    A knob is a global assigned above the call; its type is its default's, or its annotation's
    (`stop: str | None = None`). The fields of the dataclass that `model` names ('model.py:GPTConfig')
    are knobs too, where the script does not state its own. `also` names scripts, or such dataclasses,
    whose knobs may stand in a config file and are passed over, so that sample.py can read a training recipe;
    of such a recipe the knobs in `own` are passed over too, which mean something else there. The dict `of_files` is filled with
    what files set, whatever flags say. In `paths`, names of settings, a ~ at the beginning is the home folder.

    Returns (config, given): all knobs as a dict, and those that a file or flag set, {name: where}, as '--name=value' or 'file:line'.
    Every mistake of the user's ends in one line and exit code 2, here and (through
    sys.excepthook) in the rest of the script.
    """
    sys.excepthook = one_line_errors
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed; it ends no run
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        if hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(
                errors='replace'
            )  # what a Windows console or a file in its encoding cannot show
    knobs = read_knobs(ns['__file__'], ns)
    for name, knob in read_knobs(os.path.join(HERE, model)).items() if model else ():
        if name not in knobs:
            knobs[name], ns[name] = knob, default_of(knob, {})
            if ns[name] is None and 'None' not in knob.types:
                fail(
                    f'{name} in {model.partition(":")[0]}: its default {knob.default} must be a plain value'
                )
    passed_over = {}
    for script in also:
        for name, knob in read_knobs(os.path.join(HERE, script)).items():
            if name not in knobs:
                passed_over[name] = default_of(knob, passed_over)
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help(ns, knobs)
        raise SystemExit(0)
    given, of_files = {}, {} if of_files is None else of_files
    for arg in sys.argv[1:]:
        if arg.startswith('-'):
            settings = read_flag(arg, knobs)
        else:
            scope = {
                **passed_over,
                **{name: ns[name] for name in knobs},
            }  # a file may compute from what was set before it
            settings = run_file(arg, scope, knobs, passed_over, own)
            passed_over = {name: scope[name] for name in passed_over}
        for name, (value, where) in settings.items():
            ns[name] = fit(knobs[name], value, where)
            if name in paths and ns[name]:
                ns[name] = os.path.expanduser(ns[name])
            given.pop(name, None)  # so that `given` is in the order of what was set last
            given[name] = where
            if not arg.startswith('-'):
                of_files[name] = ns[name]
    return {name: ns[name] for name in knobs}, given


def check(config, names, least=None, above=None, below=None, most=None, choices=None):
    """
    Raise a ValueError if one of the settings `names` (a string, separated by spaces) is out of range. None passes.

    least, most: bounds that are allowed; above, below: bounds that are not; choices: all that is allowed
    An int is at most 2**31 - 1, what libraries count with, unless `most` is given.
    """
    for name in names.split():
        value = config[name]
        largest = 2**31 - 1 if most is None and type(value) is int else most
        if value is None:
            continue
        if choices is not None and value not in choices:
            raise ValueError(f'{name}={value!r} is none of {", ".join(map(repr, choices))}')
        if least == 0 and value < 0:
            raise ValueError(f'{name}={value} must not be negative')
        if least is not None and value < least:
            raise ValueError(f'{name}={value} must be at least {least}')
        if above is not None and value <= above:
            raise ValueError(f'{name}={value} must be more than {above}')
        if below is not None and value >= below:
            raise ValueError(f'{name}={value} must be less than {below}')
        if largest is not None and value > largest:
            raise ValueError(f'{name}={value} must be at most {largest}')


def writable(config, *names):
    """Refuse paths of files to write, unless empty, whose folder is not there; before minutes are spent on what goes into them."""
    for name in names:
        if config[name] and (
            os.path.isdir(config[name]) or not os.path.isdir(os.path.dirname(config[name]) or '.')
        ):
            raise ValueError(f'{name}={config[name]!r} must be a file in a folder that is there')


def read_knobs(path, ns=None):
    """
    The knobs of a script, {name: Knob}, read from its text: assignments to lower-case names above its
    call of configure(). A comment on a line of its own heads the section that follows. 'file.py:Name'
    reads the fields of that dataclass.
    """
    path, _, cls = path.rpartition(':') if ':' in os.path.basename(path) else (path, '', '')
    with tokenize.open(path) as f:
        source = f.read()
    with open(path, 'rb') as f:
        comments = {
            t.start[0]: t for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT
        }
    headings = {
        row: t.string.strip('# -')
        for row, t in comments.items()
        if not t.line[: t.start[1]].strip()
    }
    knobs, nodes = {}, ast.parse(source).body
    if cls:
        nodes = next(
            node for node in nodes if isinstance(node, ast.ClassDef) and node.name == cls
        ).body
        headings = {0: f'{cls} in {os.path.basename(path)}'}
    for node in nodes:
        if any(
            isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'configure'
            for n in ast.walk(node)
        ):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            kinds = (
                (type(ns[name]).__name__.replace('NoneType', 'None').replace('tuple', 'list'),)
                if ns
                else ()
            )
        elif isinstance(node, ast.AnnAssign):
            name = node.target.id
            kinds = tuple(kind.strip() for kind in ast.unparse(node.annotation).split('|'))
        else:
            continue
        if name != name.lower():
            continue  # a constant
        comment = (
            comments[node.end_lineno].string.lstrip('# ') if node.end_lineno in comments else ''
        )
        section = next(
            (
                headings[row]
                for row in sorted(headings, reverse=True)
                if row < node.lineno and headings[row]
            ),
            '',
        )
        knobs[name] = Knob(name, kinds, ast.unparse(node.value), comment, section)
    return knobs


def default_of(knob, before):
    """The value of a knob's default, which may reckon with knobs `before` it (5 * 8, max_iters); None where more is needed to tell."""
    try:
        return eval(knob.default, {}, before)
    except Exception:
        return None


def read_flag(arg, knobs):
    """'--name=text' as {name: (value, where)}."""
    name, equals, text = arg.lstrip('-').partition('=')
    if name in ('config', 'override') and name not in knobs:
        fail(
            f'unknown flag {arg}; config files and knobs stand by themselves: '
            'config/NAME.py --name=VALUE'
        )
    if name not in knobs:
        fail(
            f'unknown flag {arg.partition("=")[0]}{did_you_mean(name.replace("-", "_"), knobs, "--")}; --help lists all'
        )
    if not arg.startswith('--') or not equals:
        fail(f'{arg}: write --{name}=VALUE, for instance --{name}={knobs[name].default}')
    knob, word = knobs[name], text.strip()
    if knob.types in (('str',), ('str', 'list')):  # lists are for config files
        return {name: (text, arg)}
    if word.lower() in ('true', 'false'):
        value = word.lower() == 'true'
    else:
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
    # where text is allowed too, only what is plainly another of the knob's types is not text
    if 'str' in knob.types and (
        isinstance(value, str) or type(value).__name__.replace('NoneType', 'None') not in knob.types
    ):
        value = text
    return {name: (value, arg)}


def run_file(path, scope, knobs, passed_over, own=()):
    """Execute a config file over the current knob values: {name: (value, where)} for what it, or a file that it executes or imports, assigned."""
    if not os.path.isfile(path) and os.path.isfile(os.path.join(HERE, path)):
        path = os.path.join(HERE, path)
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or 'config'
        files = (
            [os.path.join(folder, name) for name in os.listdir(folder)]
            if os.path.isdir(folder)
            else []
        )
        fail(
            f'config file {path} not found{f"; a flag is written --{path}" if "=" in path else did_you_mean(path, files)}'
        )
    scope.update(__file__=path, __name__='config')
    before = dict(scope)
    try:
        with tokenize.open(path) as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, 'exec'), scope)
    except SyntaxError as e:
        fail(f'{path}:{e.lineno}: {e.msg}' if e.lineno else f'{path}: {e.msg or e}')
    except (Exception, SystemExit) as e:  # exit() too
        lines = [
            row
            for frame, row in traceback.walk_tb(e.__traceback__)
            if frame.f_code.co_filename == path
        ]
        fail(f'{path}:{lines[-1] if lines else "?"}: {type(e).__name__}: {e}')
    lines = {}  # where each name was assigned last
    for node in sorted((n for n in ast.walk(tree) if hasattr(n, 'lineno')), key=lambda n: n.lineno):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in scope:
            lines[node.id] = node.lineno
        elif (
            isinstance(node, ast.ImportFrom)
            or isinstance(node, ast.Call)
            and getattr(node.func, 'id', '') == 'exec'
        ):
            plain = {
                name
                for name, value in scope.items()
                if isinstance(value, (bool, int, float, str, list, tuple, type(None)))
                and value is not before.get(name, before)
            }  # new or changed, and not assigned here
            lines = {**{name: node.lineno for name in plain & {*knobs, *passed_over}}, **lines}
            if isinstance(
                node, ast.Call
            ):  # what a file that was executed misspelled; its own imports may be among the rest
                lines.update(
                    {
                        name: node.lineno
                        for name in plain - {*lines}
                        if not name.startswith('_') and did_you_mean(name, knobs)
                    }
                )
    settings = {}
    for name, line in lines.items():
        if name in knobs:
            settings[name] = (scope[name], f'{path}:{line}')
        elif not name.startswith('_') and name not in passed_over:
            fail(
                f'{path}:{line}: unknown knob {name!r}{did_you_mean(name, knobs)} (a helper of your own starts with _)'
            )
    foreign = any(name in passed_over for name in lines)
    return {name: value for name, value in settings.items() if not (foreign and name in own)}


def fit(knob, value, where):
    """`value` as one of the knob's types: an int fits a float knob, 2e3 an int knob, 0 and 1 a bool knob."""
    kind = type(value).__name__.replace('NoneType', 'None').replace('tuple', 'list')
    if kind == 'float' and not math.isfinite(value) or kind == 'int' and abs(value) >= 2**63:
        fail(f'{where}: {knob.name} takes a finite number below 2**63, not {value}')
    if kind in knob.types:
        return list(value) if kind == 'list' else value
    if kind == 'int' and 'float' in knob.types and abs(value) < 1e300:
        return float(value)
    if kind == 'float' and 'int' in knob.types and value.is_integer():
        return int(value)
    if kind == 'int' and 'bool' in knob.types and value in (0, 1):
        return bool(value)
    hint = (
        f'; annotate it in the script, for instance {knob.name}: int | None = None'
        if knob.types == ('None',)
        else ''
    )
    fail(
        f'{where}: {knob.name} takes {" or ".join(knob.types)}, not {value!r} (default {knob.default}){hint}'
    )


def did_you_mean(word, choices, prefix=''):
    """A hint at one of `choices`: what a word or section.name of others means, or the nearest."""
    name = word.rpartition('.')[2]
    meant = [choice for choice in (name, WORDS.get(name)) if choice in choices]
    near = meant or difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f', did you mean {prefix}{near[0]}?' if near else ''


def print_help(ns, knobs):
    print((ns.get('__doc__') or '').strip())
    section = None
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            print(f'\n{section}')
        print(f'  {"--" + knob.name + "=" + knob.default:<42} {knob.comment}'.rstrip())


def one_line_errors(kind, error, trace):
    """
    sys.excepthook: an error that our own code raised on purpose, a file that cannot be opened, and a package that is missing
    are a message to the user, one line and exit code 2; so is too little memory, exit code 1. Everything else is a bug and keeps
    its traceback.
    """
    last = trace
    while last and last.tb_next:
        last = last.tb_next
    path = os.path.abspath(last.tb_frame.f_code.co_filename) if last else ''
    ours = path.startswith(HERE + os.sep) and 'site-packages' not in path
    if (
        issubclass(kind, (ValueError, OSError))
        and ours
        and linecache.getline(path, last.tb_lineno).lstrip().startswith('raise ')
    ):
        fail(' '.join(str(error).split()))
    if issubclass(kind, OSError) and ours and error.filename:
        fail(f'{error.filename}: {error.strerror}')
    if (
        issubclass(kind, OSError) and ours and not issubclass(kind, BrokenPipeError)
    ):  # such as a full disk, which numpy tells without an errno
        fail(f'{error.strerror or f"could not be written, is the disk full? {error}"}', 1)
    if issubclass(kind, ModuleNotFoundError) and ours:
        fail(
            f'{os.path.basename(path)}:{last.tb_lineno} needs the package {error.name}, which {sys.executable} does not have; activate the '
            'environment (. .venv/bin/activate) or install into this one (pip install -e .)'
        )
    if issubclass(kind, FloatingPointError) and ours:
        fail(' '.join(str(error).split()), 1)
    too_much = ("can't allocate memory", 'Storage size calculation overflowed')  # torch's own words
    if (
        issubclass(kind, MemoryError)
        or kind.__name__ == 'OutOfMemoryError'
        or any(words in str(error) for words in too_much)
    ):
        fail('out of memory; a smaller --batch_size or --block_size takes less', 1)
    if issubclass(kind, BrokenPipeError):  # nobody reads on, as after | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1)
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted', file=sys.stderr, flush=True)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)
    tell_torchrun(f'{kind.__name__}: {error}')
