"""Knobs: config files and --key=value over a script's own knob block. The feel of nanoGPT's configurator, without exec.

    python train_rl.py config/toy.py --learning_rate=1e-4 --seed 2    # files first, then flags, however they are typed
    python train_rl.py toy                                            # a bare name means config/toy.py
    python train_rl.py --help                                         # the knob block as it stands in the script

A knob is a lower-case name that gets a plain int, float, bool or str between the first two lines of the script that
start with `# ---`; its type is the type of its default. Imports, functions and UPPERCASE facts are no knobs. Config
files are parsed, never run: `name = value` lines, where a number may be written with + - * // (`batch_size = 7 * 128`).
A name set twice in one source is an error, since one of the two would be ignored without a word; a later file wins
over an earlier one.
"""
import ast
import difflib
import glob
import importlib.metadata
import json
import math
import operator
import os
import platform
import subprocess
import sys
import time
import traceback

UNARY = {ast.USub: operator.neg}
# no power: 9**9**9 would never end
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
BOOLS = {'true': True, '1': True, 'false': False, '0': False}    # on the command line, any case; files: True or False
error_file = os.environ.get('TORCHELASTIC_ERROR_FILE', '') if 'RANK' in os.environ else ''  # for torchrun to read
WANTED = {bool: 'True or False', int: 'an int like {!r}', float: 'a finite float like {!r}', str: 'a str like {!r}'}


class UserError(ValueError):
    """What a user can get wrong: one line that says what, where and what to do (a line for each of several bad rows).
    Uncaught: that text, exit status 2."""


def constant(node):
    """The int, float, bool or str that an ast node spells out, a number also by + - * //; ValueError for all else."""
    if isinstance(node, ast.Constant) and type(node.value) in WANTED:
        value = node.value
    else:
        if isinstance(node, ast.UnaryOp):
            act, values = UNARY.get(type(node.op)), [constant(node.operand)]
        elif isinstance(node, ast.BinOp):
            act, values = BINARY.get(type(node.op)), [constant(node.left), constant(node.right)]
        else:
            act, values = None, []
        if not act or not all(type(v) in (int, float) for v in values):  # no str: 'ab' * 10**9 would fill the memory
            raise ValueError('anything else would have to be run')
        value = act(*values)
    limit = {int: 2**63, float: math.inf}.get(type(value))
    if limit and not abs(value) < limit:                 # nan fails this as well
        raise ValueError('the number is out of range')
    return value


def read_knobs(path):
    """({knob: default}, the source lines of the knob block) of the script at path."""
    with open(path, encoding='utf-8') as file:
        source = file.read()
    lines = source.split('\n')
    rules = [i for i, line in enumerate(lines) if line.startswith('# ---')][:2]
    assert len(rules) == 2, f'{path}: knobs belong between two lines that start with "# ---", found {len(rules)}'
    defaults = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if rules[0] < node.lineno - 1 < rules[1] and isinstance(target, ast.Name) and target.id.islower():
            try:
                defaults[target.id] = constant(node.value)
            except ValueError:
                pass                                     # a global, not a knob: an unknown name to whoever sets it
    return defaults, lines[rules[0] + 1:rules[1]]


def typed(source, key, value, default):
    """value with the type of the knob's default, else UserError. A text from the command line is read first (a str
    knob keeps it as it is); then 1e3 is an int because it is whole, 1 is a float, True is no number."""
    kind, got = type(default), value
    if source == 'command line' and kind is bool:
        value = BOOLS.get(value.lower(), value)
    elif source == 'command line' and kind in (int, float):
        for read in (int, float)[kind is float:]:        # int first: a float would round a large seed
            try:
                value = read(value)
                break
            except ValueError:
                continue
    if kind is int and type(value) is float and value.is_integer() and abs(value) <= 2**53:  # above, floats skip ints
        value = int(value)
    if kind is float and type(value) is int:             # below 2**63 (constant), so it fits
        value = float(value)
    if type(value) is not kind or (kind is int and abs(value) >= 2**63) or (kind is float and not math.isfinite(value)):
        raise UserError(f'{source}: {key} must be {WANTED[kind].format(default)}, got {got!r}')
    return value


def check_name(source, key, defaults, seen):
    """UserError for a name that is no knob, with the nearest one, or that this source has set before."""
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f', did you mean {near[0]}?' if near else '; --help lists the knobs'
        raise UserError(f'{source}: unknown knob {key if key.isidentifier() else repr(key)}{hint}')
    if key in seen:
        raise UserError(f'{source}: {key} is set twice, keep one')


def read_config(path, defaults):
    """{knob: value} of one config file. All but `name = value` lines and a docstring is a UserError; nothing runs."""
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
        body = ast.parse(source).body
    except SyntaxError as error:
        raise UserError(f'{path}:{error.lineno or 1}: not a Python config file: {error.msg}') from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # not utf-8, a null byte, nested too deep
        raise UserError(f'{path}: cannot be read as a config file: {error}') from None
    values = {}
    for node in body[ast.get_docstring(ast.Module(body, [])) is not None:]:
        where, got = f'{path}:{node.lineno}', source.split('\n')[node.lineno - 1].strip()[:60]
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f'{where}: a config file is read, not run: only name = value lines, got {got!r}')
        key = node.targets[0].id
        check_name(path, key, defaults, values)
        try:
            value = constant(node.value)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise UserError(f'{where}: {key} must be a plain int, float, bool or str ({error}), got {got!r}') from None
        values[key] = typed(path, key, value, defaults[key])
    return values


def find_config(name):
    """The file that a bare argument means: x/y.py is itself, toy is config/toy.py."""
    path = name if name.endswith('.py') else f'config/{name}.py'
    if os.path.isfile(path):
        return path
    folders = ('config', os.path.dirname(path))
    files = {os.path.basename(f): f for folder in folders for f in glob.glob(os.path.join(glob.escape(folder), '*.py'))}
    near = [files[n] for n in difflib.get_close_matches(os.path.basename(path), files, n=3)]
    hint = f'did you mean {" or ".join(near)}?' if near else 'and a knob is set by --key=value'
    raise UserError(f'command line: no config file {path if path.isprintable() else repr(path)}, {hint}')


def read_argv(argv, defaults, positional, several):
    """([config file, ...], {knob: value}) of a command line. A value may hold = and may be a negative number."""
    source, files, flags, queue, open_list = 'command line', [], {}, list(argv), positional
    while queue:
        argument = queue.pop(0)
        if open_list in flags and open_list in several and not argument.startswith('-') and not argument.endswith('.py'):
            flags[open_list] += ',' + argument           # one more word of `--sft a b`, or of the bare ones
            continue
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('-') and not (positional and not argument.endswith('.py')):
            files.append(find_config(argument))
            continue
        if not argument.startswith('-'):
            key, equals, text = positional, '=', argument
        elif not argument.startswith('--'):
            raise UserError(f'{source}: {argument!r} is no knob, write --key=value; --help lists the knobs')
        check_name(source, key, defaults, flags)
        if not equals and (not queue or queue[0].startswith('--')):  # bools too: `--dry_run x.py` has two readings
            raise UserError(f'{source}: {key} needs a value, ' + (
                f'--{key}=True or --{key}=False' if type(defaults[key]) is bool else f'like --{key}={defaults[key]}'))
        open_list = key if key in several else positional
        flags[key] = typed(source, key, text if equals else queue.pop(0), defaults[key])
    return files, flags


def say_last(text, ago=0):
    """Says why this process ends, so that it is the last that people see: torchrun is given it to print, after all else it
    has to say, as the cause of all that failed later; without torchrun it goes to stderr. ago: seconds since it failed."""
    if error_file:
        said = {'py_callstack': text, 'timestamp': str(int(time.time() - ago) - 1)}  # it counts in whole seconds
        try:
            with open(error_file, 'w', encoding='utf-8') as file:
                json.dump({'message': {'message': text, 'extraInfo': said}}, file)
            return
        except OSError:                                  # a full /tmp, say
            pass
    print(text, file=sys.__stderr__, flush=True)


def first_to_fail():
    """Whether this process is the first of the node's that ends by an error, as far as torchrun's folder for errors tells."""
    try:
        if error_file:                                   # .../attempt_0/<local rank>/error.json
            os.close(os.open(os.path.join(os.path.dirname(os.path.dirname(error_file)), 'failed'), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def excepthook(kind, error, trace):
    """The message alone and exit status 2 for a UserError; the usual traceback for everything else. Once for all ranks of a
    node that meet the same: the others wait, and torchrun ends them when it sees the first one's end."""
    if not first_to_fail():
        time.sleep(20)
    if not issubclass(kind, UserError):
        return say_last(''.join(traceback.format_exception(kind, error, trace)).rstrip())
    rank = os.environ.get('RANK', '0')                   # torchrun names it itself
    say_last(f'rank {rank}: ' * (rank != '0' and not error_file) + str(error))
    raise SystemExit(2)                                  # from a hook this sets the status, and atexit still runs


def configure(globals_dict, argv=None, positional='', several=()):
    """{knob: value}: the script's defaults, then config files, then flags; also written into globals_dict, and printed
    on rank 0. globals_dict: the script's globals(); argv: sys.argv[1:] if None; positional: the knob that a bare
    argument not ending in .py sets (`python reflection.py out/toy/samples.jsonl`); several: knobs that take all words up
    to the next flag (`--ckpt a b` is 'a,b'; listed() takes it apart). UserError for what cannot be taken; --help exits 0."""
    sys.excepthook = excepthook
    argv = sys.argv[1:] if argv is None else argv
    script, printing = os.path.basename(globals_dict['__file__']), os.environ.get('RANK', '0') == '0'
    defaults, block = read_knobs(globals_dict['__file__'])
    if '--help' in argv or '-h' in argv:
        bare = f'[{positional}{" ..." if positional in several else ""}] ' if positional else ''
        usage = f'python {script} {bare}[config/file.py ...] [--key=value ...]'
        if printing:
            print(usage, *block, sep='\n')
        raise SystemExit(0)

    files, flags = read_argv(argv, defaults, positional, several)
    config, origin = dict(defaults), {}
    for source, values in [(path, read_config(path, defaults)) for path in files] + [('command line', flags)]:
        config.update(values)
        origin.update(dict.fromkeys(values, source))
    globals_dict.update(config)
    if printing:
        width = max(map(len, config), default=0)
        print(f'{script}: {len(config)} knobs, * where not the default')
        for key, value in config.items():
            note = '' if repr(value) == repr(defaults[key]) else f'  # {origin[key]}; default {defaults[key]!r}'
            print(f'{"*" if note else " "} {key:<{width}} = {value!r}{note}')
        sys.stdout.flush()
    return config


def listed(text):
    """The words of a knob that takes several: 'a, b' is ['a', 'b'], '' is []."""
    return [word.strip() for word in text.split(',') if word.strip()]


def version(package):
    try:
        return importlib.metadata.version(package)       # read from the package's files: importing vllm takes long
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def git_commit():
    """The commit of this file's folder, with -dirty when tracked files differ from it; 'unknown' without git."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ['git', '-C', folder, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def check_at_least(config, least, *knobs):
    """Raises UserError for the first of the knobs whose value is below least."""
    for knob in knobs:
        if not config[knob] >= least:
            raise UserError(f'config: {knob} must be at least {least}, got {config[knob]!r}')


def save_config(config, path):
    """Write config as a config file that repeats the run, with argv, versions and commit as comments. Renamed into
    place, so that a reader never sees half a file; for rank 0 to call."""
    versions = [f'{package} {version(package)}' for package in ('torch', 'transformers', 'vllm')]
    lines = [f'# argv: {sys.argv!r}',                    # repr: a newline in an argument must not end the comment
             f'# processes: {os.environ.get("WORLD_SIZE", "1")}',
             f'# versions: {", ".join([f"python {platform.python_version()}", *versions])}',
             f'# git commit: {git_commit()}', '']
    lines += [f'{key} = {value!r}' for key, value in config.items()]  # floats and strings read back exactly
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')
    os.replace(temporary, path)
