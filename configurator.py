"""
Settings. A script states its settings as plain globals, each with a comment, and then calls

    config, given = configure(globals())

which overwrites these globals with what the command line says:

    python train.py config/train_gpt2.py config/cpu.py --batch_size=4 --out_dir=out-try

Config files (plain Python) and --name=value flags apply from left to right. The value is
everything after the first '='. `--help` prints every setting with its comment, by section.
"""

import ast
import difflib
import math
import os
import sys
import tokenize
import traceback
from typing import NamedTuple

from support.errors import UserError, fail, one_line_errors, prepare_output

HERE = os.path.dirname(os.path.abspath(__file__))  # the folder with config/ and data/
PLAIN = (bool, int, float, str, list, tuple, type(None))  # types of values that a setting may have
WORDS = {  # other projects' names for our settings
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


class Setting(NamedTuple):
    name: str
    types: tuple[str, ...]  # the types it takes: 'int', 'float', 'bool', 'str', 'list', 'None'
    default: str  # as written in the script
    comment: str  # the comment that trails it
    section: str  # the comment line above its group


def configure(ns, model=None, recipes_of=(), ignore_from_recipes=(), from_files=None, paths=()):
    """
    Overwrite the settings in `ns`, the calling script's globals(), from sys.argv. A setting is a
    global assigned above the call, of its default's type or as annotated (`stop: str | None`).

    model: a dataclass such as 'model.py:GPTConfig', whose fields become settings too
    recipes_of: scripts and dataclasses whose settings a config file may set without effect, so
        that sample.py can read a training recipe
    ignore_from_recipes: settings that keep their values in such a recipe: they differ in meaning
    from_files: a dict that receives the values from config files, even if a flag overrides them
    paths: settings in which a leading ~ means the home folder

    Returns (config, given): all settings, {name: value}, and where each was set last unless it
    has its default, {name: '--name=value' or 'file:line'}, in that order. A user's mistake prints
    one line and exits with code 2, here and, by sys.excepthook, in the rest of the script.
    """
    sys.excepthook = one_line_errors
    prepare_output()
    settings = read_settings(ns['__file__'], ns)
    if model:
        for name, setting in read_settings(os.path.join(HERE, model)).items():
            if name not in settings:
                settings[name], ns[name] = setting, default_of(setting, {}, model)
    others = {}  # values of the settings of other scripts
    for script in recipes_of:
        for name, setting in read_settings(os.path.join(HERE, script)).items():
            if name not in settings:
                others[name] = default_of(setting, others)
    if '-h' in sys.argv or '--help' in sys.argv:
        print_help(ns, settings)
        raise SystemExit(0)
    given = {}
    for arg in sys.argv[1:]:
        if arg.startswith('-'):
            new = read_flag(arg, settings)
        else:
            scope = {**others, **{name: ns[name] for name in settings}}
            new = run_file(arg, scope, settings, others, ignore_from_recipes)
            others = {name: scope.get(name) for name in others}
        for name, (value, place) in new.items():
            value = fit(settings[name], value, place)
            ns[name] = os.path.expanduser(value) if name in paths and value else value
            given.pop(name, None)  # the one set last comes last
            given[name] = place
            if from_files is not None and not arg.startswith('-'):
                from_files[name] = ns[name]
    return {name: ns[name] for name in settings}, given


def check(config, names, least=None, above=None, below=None, most=None, choices=None):
    """
    Raise UserError if a setting is out of range.

    names: the settings to check, a string separated by spaces; None is always in range
    least, most: inclusive bounds; above, below: exclusive bounds; choices: the allowed values
    An int is at most 2**31 - 1, the largest that libraries take, unless `most` is given.
    """
    for name in names.split():
        value = config[name]
        if value is None:
            continue
        largest = 2**31 - 1 if most is None and type(value) is int else most
        if choices is not None and value not in choices:
            raise UserError(f'{name}={value!r} is none of {", ".join(map(repr, choices))}')
        if least == 0 and not value >= 0:  # not: nan too
            raise UserError(f'{name}={value} must not be negative')
        if least is not None and not value >= least:
            raise UserError(f'{name}={value} must be at least {least}')
        if above is not None and not value > above:
            raise UserError(f'{name}={value} must be more than {above}')
        if below is not None and not value < below:
            raise UserError(f'{name}={value} must be less than {below}')
        if largest is not None and not value <= largest:
            raise UserError(f'{name}={value} must be at most {largest}')


def writable(config, *names):
    """Raise UserError if a setting names an output file in a folder that does not exist."""
    for name in names:
        path = config[name]
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.')):
            raise UserError(f'{name}={path!r} must be a file in a folder that is there')


# -----------------------------------------------------------------------------
# what a script states
def read_settings(path, ns=None):
    """
    The settings of a script, {name: Setting}, read from its source: assignments to lower-case
    names above its call of configure(), or the fields of a dataclass ('file.py:Name'). A comment
    on a line of its own starts a section. Without `ns`, the script's globals, only annotated
    settings have types.
    """
    cls = section = ''
    if ':' in os.path.basename(path):
        path, _, cls = path.rpartition(':')
    with tokenize.open(path) as f:
        source = f.read()
    lines, nodes, row = source.split('\n'), ast.parse(source).body, 0
    if cls:
        nodes = next(n for n in nodes if isinstance(n, ast.ClassDef) and n.name == cls).body
        row, section = nodes[0].lineno - 1, f'{cls} in {os.path.basename(path)}'
    settings = {}
    for node in nodes:
        if 'configure(globals()' in ast.unparse(node):
            break
        for line in lines[row : node.lineno - 1]:
            if line.startswith('#'):
                section = line.strip('# -') or section
        row = node.end_lineno
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            types = tuple(part.strip() for part in ast.unparse(node.annotation).split('|'))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            types = (type_name(ns[name]),) if ns else ()
        else:
            continue
        if name == name.lower() and not isinstance(node.value, ast.Dict):
            comment = lines[row - 1].encode()[node.end_col_offset :].decode().partition('#')[2]
            default = ast.unparse(node.value)
            settings[name] = Setting(name, types, default, comment.strip(), section)
    return settings


def default_of(setting, earlier, model=''):
    """
    The value of a setting's default, which may be an expression of constants and of `earlier`
    settings, {name: value}. If it needs more, None; an error for a field of `model`.
    """
    try:
        return eval(setting.default, {}, earlier)
    except Exception:
        if model:
            fail(f'{setting.name} in {model}: its default {setting.default} must be a plain value')


def print_help(ns, settings):
    print((ns.get('__doc__') or '').strip())
    section = None
    for setting in settings.values():
        if setting.section != section:
            section = setting.section
            print(f'\n{section}')
        flag = f'--{setting.name}={setting.default}'
        print(f'  {flag:<42} {setting.comment}'.rstrip())


# -----------------------------------------------------------------------------
# what the user sets
def read_flag(arg, settings):
    """'--name=text' as {name: (value, arg)}."""
    flag, equals, text = arg.partition('=')
    name = flag.lstrip('-')
    if name in ('config', 'override') and name not in settings:
        fail(f'unknown flag {arg}; write config files and flags as: config/NAME.py --NAME=VALUE')
    if name not in settings:
        hint = did_you_mean(name.replace('-', '_'), settings, '--')
        fail(f'unknown flag {flag}{hint}; --help lists all')
    setting = settings[name]
    if not arg.startswith('--') or not equals:
        fail(f'{arg}: write --{name}=VALUE, for instance --{name}={setting.default}')
    return {name: (parse(text, setting.types), arg)}


def parse(text, types):
    """The value of a flag's text: if a setting takes text, all but values of its other types."""
    word = text.strip()
    if types in (('str',), ('str', 'list')):  # lists are for config files
        return text
    if word.lower() in ('true', 'false'):
        word = word.capitalize()
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if 'str' in types and (isinstance(value, str) or type_name(value) not in types):
        return text
    return value


def run_file(path, scope, settings, others, ignored=()):
    """
    Execute a config file in `scope`, the values of all settings so far: {name: (value,
    'file:line')} of the settings that it sets, also by import or exec of another file. Those of
    `others` have no effect, and those in `ignored` have none beside one of `others`.
    """
    path = find_file(path)
    scope.update(__file__=path, __name__='config')
    before = dict(scope)
    tree = execute(path, scope)
    stated, places = assigned_lines(tree), {}
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) or 'exec(' in ast.unparse(n)]
    for name, value in scope.items():  # those of an imported or executed file
        is_new = name not in before or value is not before[name]
        if is_new and isinstance(value, PLAIN) and name not in stated:
            places[name] = f'{path}:{imports[0].lineno if imports else 1}'
    places |= {name: f'{path}:{line}' for name, line in stated.items() if name in scope}
    for name, place in places.items():
        hint = did_you_mean(name, settings)
        known = name in settings or name in others or name.startswith('_')
        if not known and (name in stated or hint):
            fail(f'{place}: unknown setting {name!r}{hint} (names of your own start with _)')
    foreign = any(name in others for name in places)
    names = [name for name in places if name in settings and not (foreign and name in ignored)]
    return {name: (scope[name], places[name]) for name in names}


def assigned_lines(tree):
    """{name: the last line that assigns it}, in the order of lines."""
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
    return dict(sorted(lines.items(), key=lambda item: item[1]))


def find_file(path):
    """The path of a config file, from the current folder or else from this file's."""
    for found in (path, os.path.join(HERE, path)):
        if os.path.isfile(found):
            return found
    if '=' in path:
        fail(f'config file {path} not found; a flag is written --{path}')
    folder, files = os.path.dirname(path) or 'config', []
    if os.path.isdir(folder):
        files = [os.path.join(folder, name) for name in os.listdir(folder)]
    fail(f'config file {path} not found{did_you_mean(path, files)}')


def execute(path, scope):
    """Execute a config file in `scope`; returns its syntax tree."""
    try:
        with tokenize.open(path) as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, 'exec'), scope)
        return tree
    except SyntaxError as e:
        fail(f'{path}:{e.lineno}: {e.msg}' if e.lineno else f'{path}: {e.msg or e}')
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        fail(f'{path}:{lines[-1] if lines else "?"}: {type(e).__name__}: {e}')


def type_name(value):
    """The type of a value, as in annotations of settings."""
    name = type(value).__name__
    return {'NoneType': 'None', 'tuple': 'list'}.get(name, name)


def fit(setting, value, place):
    """`value` as one of the setting's types: 2e3 may become an int, 1 a float or a bool."""
    kind, types = type_name(value), setting.types
    limit = 2**63 if kind == 'int' else math.inf
    if kind in ('int', 'float') and not abs(value) < limit:
        fail(f'{place}: {setting.name} takes a finite number below 2**63, not {value}')
    if kind in types:
        return list(value) if kind == 'list' else value
    if kind == 'int' and 'float' in types:
        return float(value)
    if kind == 'float' and 'int' in types and value.is_integer():
        return int(value)
    if kind == 'int' and 'bool' in types and value in (0, 1):
        return bool(value)
    message = f'{place}: {setting.name} takes {" or ".join(types)}, not {value!r}'
    message += f' (default {setting.default})'
    if types == ('None',):
        message += f'; annotate it in the script, for instance {setting.name}: int | None = None'
    fail(message)


def did_you_mean(word, choices, prefix=''):
    """A hint at the one of `choices` that another project calls `word`, or at the nearest one."""
    name = word.rpartition('.')[2]  # of section.name
    for choice in (name, WORDS.get(name)):
        if choice in choices:
            return f', did you mean {prefix}{choice}?'
    near = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f', did you mean {prefix}{near[0]}?' if near else ''
