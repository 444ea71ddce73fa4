"""A script's knobs, the lower-case names between its first two `# ---` lines: nanoGPT's way, without exec.
`python train_rl.py toy --learning_rate=1e-4 --seed 2` reads config/toy.py, then the flags, in any order."""
import ast
import difflib
import os
import pprint
import shlex
import sys
from importlib.metadata import distributions
from operator import add, floordiv, mul, sub
from pathlib import Path

ARITHMETIC = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.FloorDiv: floordiv}  # no power: 9**9**9


class UserError(ValueError):
    """What a user can get wrong: what, where, what to do. Uncaught: that text alone, and exit status 2."""


def literal(node):
    """The value of an ast node: a literal, or arithmetic on literals. Raises for what would have to run."""
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](literal(node.left), literal(node.right))
    return ast.literal_eval(node)


def read_values(source, pairs, defaults):
    """{knob: value} of the [(key, text), ...] that a source sets; every value has the type of the default."""
    values = {}
    for key, text in pairs:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            raise UserError(f"{source}: unknown knob {key}, did you mean {near[0] if near else '--help'}?")
        if key in values:
            raise UserError(f"{source}: {key} is set twice, keep one")
        kind = type(defaults[key])
        try:
            value = literal(ast.parse(text.capitalize() if kind is bool else text, mode="eval").body)
            if {type(value), kind} == {int, float} and kind(value) == value:
                value = kind(value)                      # 1 is a float too, 1e3 an int
        except Exception:                                # the text is no value, whatever the reason
            value = None
        if type(value) is not kind or (kind is float and not abs(value) < float("inf")):
            raise UserError(f"{source}: {key} must be {'an' if kind is int else 'a'} {kind.__name__} like "
                            f"{defaults[key]!r}, got {repr(text) if source == 'command line' else text}")
        values[key] = value
    return values


def read_config(path):
    """[(key, text), ...] of a config file, which is parsed, never run: `import os` is an unknown key."""
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a config file: {error}") from None
    nodes = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return [ast.unparse(node).partition(" = ")[::2] for node in nodes]


def excepthook(kind, error, trace):
    """The message alone and exit status 2 for a UserError, else the usual traceback; torchrun repeats it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler
        try:
            raise error                                  # the handler records the error that is being handled
        except kind:
            get_error_handler().record_exception(error)
    if not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    print(error, file=sys.__stderr__, flush=True)      # torch puts a buffer in the place of sys.stderr
    raise SystemExit(2)


def configure(globals_dict, argv=None, positional=""):
    """{knob: value}: the script's defaults, then config files, then flags; put into its globals, and printed.
    A bare argument is a config file; with positional, unless it ends in .py, it is that knob's value."""
    sys.excepthook = excepthook
    block = Path(globals_dict["__file__"]).read_text("utf-8").split("\n# ---")[1]
    config = {key: globals_dict[key] for key in globals_dict if key.islower() and f"\n{key} = " in block}
    files, flags, arguments = [], [], iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if argument == "--help":
            print("# ---" + block)
            raise SystemExit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals and (text := next(arguments, "--")).startswith("--"):
                raise UserError(f"command line: {key} needs a value, --{key}=...")
            flags.append((key, repr(text) if isinstance(config.get(key), str) else text))  # needs no quotes
        elif positional and not argument.endswith(".py"):
            flags.append((positional, repr(argument)))
        else:
            files.append(argument if argument.endswith(".py") else f"config/{argument}.py")
    for source, pairs in [(path, read_config(path)) for path in files] + [("command line", flags)]:
        config |= read_values(source, pairs, config)
    globals_dict.update(config)
    if os.environ.get("RANK", "0") == "0":
        print(*(f"{key} = {value!r}" for key, value in config.items()), sep="\n", flush=True)
    return config


def check_at_least(config, least, *knobs):
    """UserError for the first of the knobs that is below least."""
    for knob in knobs:
        if config[knob] < least:
            raise UserError(f"config: {knob} must be at least {least}, got {config[knob]!r}")


def one_of(config, knob, *values):
    """UserError if the knob has none of the values."""
    if config[knob] not in values:
        raise UserError(f"config: {knob} must be one of {', '.join(map(repr, values))}, got {config[knob]!r}")


def listed(text):
    """The words of a knob that holds several: "a, b" is ["a", "b"], "" is []."""
    return [word.strip() for word in text.split(",") if word.strip()]


def save_config(config, path):
    """Writes config as a config file that repeats the run; argv, versions and commit are its comments."""
    found = [p for name in ("torch", "transformers", "vllm") for p in distributions(name=name)]
    commit = os.popen(f"git -C {shlex.quote(sys.path[0])} describe --always --dirty 2>&1").read().strip()
    argv = pprint.pformat(sys.argv, width=100, compact=True).replace("\n", "\n#       ")
    lines = [f"# argv: {argv}", f"# commit: {commit!r}", *(f"# {p.name} {p.version}" for p in found)]
    lines += [f"{key} = {value!r}" for key, value in config.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", "utf-8")
