"""configurator.py: what it accepts, and every message of what it does not."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from configurator import UserError, configure, save_config

SCRIPT = '''"""A script."""
import os
other = 1
# ---------------------------------
# I/O
run_name = 'toy'       # a name
batch_size = 7 * 128   # queries x ranks
                       # and more of the comment
learning_rate = 5e-6   # AdamW
dry_run = False        # True prints and stops
offset = -1            # may be negative
import math
EVALS = 8
computed = max(1, 2)
# ---------------------------------
later = 2
if __name__ == '__main__':
    from configurator import configure, UserError
    config = configure(globals())
    if run_name == 'user':
        raise UserError('bad\\nrow')
    if run_name == 'crash':
        raise KeyError('crash')
'''
DEFAULTS = {'run_name': 'toy', 'batch_size': 896, 'learning_rate': 5e-6, 'dry_run': False, 'offset': -1}


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'train.py').write_text(SCRIPT)
    return tmp_path / 'train.py'


def resolve(script, *argv, **options):
    return configure({'__file__': str(script)}, list(argv), **options)


def config_file(text, name='geo3k'):
    Path(f'config/{name}.py').write_text(text)
    return f'config/{name}.py'


def test_knobs_are_the_plain_lower_case_values_between_the_rules(script):
    knobs = {'__file__': str(script), 'learning_rate': None}
    assert configure(knobs, []) == DEFAULTS
    assert knobs['learning_rate'] == 5e-6 and 'other' not in knobs


@pytest.mark.parametrize('argv, expected', [
    (['--run_name=a=b'], {'run_name': 'a=b'}),
    (['--run_name='], {'run_name': ''}),
    (['--run_name', 'a b'], {'run_name': 'a b'}),
    (['--run_name=2024'], {'run_name': '2024'}),
    (['--run_name=--x'], {'run_name': '--x'}),
    (['--batch_size=1e3'], {'batch_size': 1000}),
    (['--batch_size=9007199254740993'], {'batch_size': 9007199254740993}),
    (['--offset', '-7'], {'offset': -7}),
    (['--offset=-7'], {'offset': -7}),
    (['--learning_rate=1'], {'learning_rate': 1.0}),
    (['--learning_rate', '-1e-4'], {'learning_rate': -1e-4}),
    (['--dry_run=true'], {'dry_run': True}),
    (['--dry_run', 'TRUE'], {'dry_run': True}),
    (['--dry_run=1'], {'dry_run': True}),
    (['--dry_run=false'], {'dry_run': False}),
    (['--dry_run=0'], {'dry_run': False})])
def test_flags(script, argv, expected):
    config = resolve(script, *argv)
    assert config == DEFAULTS | expected
    assert {k: type(v) for k, v in config.items()} == {k: type(v) for k, v in DEFAULTS.items()}


def test_files_first_then_flags_whatever_the_order(script):
    config_file('"""docs"""\nbatch_size = 2 * 3 - 10 // 4\nlearning_rate = 1\noffset = -(2 + 1)\n')
    config_file('offset = 9\nrun_name = "file"\n', 'two')
    for argv in (['--run_name=flag', 'config/geo3k.py', 'two'], ['geo3k', 'config/two.py', '--run_name=flag'],
                 ['geo3k', '--run_name', 'flag', 'two']):
        config = resolve(script, *argv)
        assert config == {'run_name': 'flag', 'batch_size': 4, 'learning_rate': 1.0, 'dry_run': False, 'offset': 9}
        assert type(config['learning_rate']) is float
    assert resolve(script, 'two', 'geo3k')['offset'] == -3


@pytest.mark.parametrize('argv, message', [
    (['--lerning_rate=1'], 'unknown knob lerning_rate, did you mean learning_rate?'),
    (['--batch-size=1'], "unknown knob 'batch-size', did you mean batch_size?"),
    (['--zzz=1'], 'unknown knob zzz; --help lists the knobs'),
    (['--other=1'], 'unknown knob other; --help lists the knobs'),
    (['--math=1'], 'unknown knob math; --help lists the knobs'),
    (['--EVALS=1'], 'unknown knob EVALS; --help lists the knobs'),
    (['--computed=1'], 'unknown knob computed; --help lists the knobs'),
    (['--batch_size=12.5'], "batch_size must be an int like 896, got '12.5'"),
    (['--batch_size=True'], "batch_size must be an int like 896, got 'True'"),
    (['--batch_size='], "batch_size must be an int like 896, got ''"),
    (['--batch_size=inf'], "batch_size must be an int like 896, got 'inf'"),
    (['--batch_size=1e17'], "batch_size must be an int like 896, got '1e17'"),   # above 2**53 a float skips ints
    (['--batch_size=1e30'], "batch_size must be an int like 896, got '1e30'"),
    (['--batch_size=9223372036854775808'], "batch_size must be an int like 896, got '9223372036854775808'"),
    (['--learning_rate=fast'], "learning_rate must be a finite float like 5e-06, got 'fast'"),
    (['--learning_rate=nan'], "learning_rate must be a finite float like 5e-06, got 'nan'"),
    (['--learning_rate=-inf'], "learning_rate must be a finite float like 5e-06, got '-inf'"),
    (['--dry_run=yes'], "dry_run must be True or False, got 'yes'"),
    (['--dry_run', 'config/x.py'], "dry_run must be True or False, got 'config/x.py'"),
    (['--dry_run'], 'dry_run needs a value, --dry_run=True or --dry_run=False'),
    (['--dry_run', '--offset=1'], 'dry_run needs a value, --dry_run=True or --dry_run=False'),
    (['--offset'], 'offset needs a value, like --offset=-1'),
    (['-offset=1'], "'-offset=1' is no knob, write --key=value; --help lists the knobs"),
    (['--offset=1', '--offset', '2'], 'offset is set twice, keep one'),
    (['geo3'], 'no config file config/geo3.py, did you mean config/geo3k.py?'),
    (['config/geo3.py'], 'no config file config/geo3.py, did you mean config/geo3k.py?'),
    (['offset=1'], 'no config file config/offset=1.py, and a knob is set by --key=value')])
def test_command_line_messages(script, argv, message):
    config_file('')
    with pytest.raises(UserError) as error:
        resolve(script, *argv)
    assert str(error.value) == f'command line: {message}'


ONLY = 'a config file is read, not run: only name = value lines, got'
PLAIN = 'must be a plain int, float, bool or str'


@pytest.mark.parametrize('text, message', [
    ('lerning_rate = 1', ': unknown knob lerning_rate, did you mean learning_rate?'),
    ('batch_size = 12.5', ': batch_size must be an int like 896, got 12.5'),
    ('batch_size = True', ': batch_size must be an int like 896, got True'),
    ('batch_size = "8"', ": batch_size must be an int like 896, got '8'"),
    ('learning_rate = "1"', ": learning_rate must be a finite float like 5e-06, got '1'"),
    ('learning_rate = False', ': learning_rate must be a finite float like 5e-06, got False'),
    ('dry_run = 1', ': dry_run must be True or False, got 1'),
    ('dry_run = "True"', ": dry_run must be True or False, got 'True'"),
    ('run_name = 5', ": run_name must be a str like 'toy', got 5"),
    ('offset = 1\noffset = 2', ': offset is set twice, keep one'),
    ('\nimport os', f":2: {ONLY} 'import os'"),
    ('offset += 1', f":1: {ONLY} 'offset += 1'"),
    ('offset = batch_size = 1', f":1: {ONLY} 'offset = batch_size = 1'"),
    ('offset = 1\n"late docs"', f":2: {ONLY} '\"late docs\"'"),
    ('run_name = None', f":1: run_name {PLAIN} (anything else would have to be run), got 'run_name = None'"),
    ('run_name = f"{1}"', f":1: run_name {PLAIN} (anything else would have to be run), got 'run_name = f\"{{1}}\"'"),
    ('run_name = "a" * 3', f":1: run_name {PLAIN} (anything else would have to be run), got 'run_name = \"a\" * 3'"),
    ('offset = 2 ** 3', f":1: offset {PLAIN} (anything else would have to be run), got 'offset = 2 ** 3'"),
    ('offset = True + 1', f":1: offset {PLAIN} (anything else would have to be run), got 'offset = True + 1'"),
    ('offset = 1 // 0', f":1: offset {PLAIN} (integer division or modulo by zero), got 'offset = 1 // 0'"),
    ('offset = 2 * 9223372036854775807',
     f":1: offset {PLAIN} (the number is out of range), got 'offset = 2 * 9223372036854775807'"),
    ('learning_rate = 1e999', f":1: learning_rate {PLAIN} (the number is out of range), got 'learning_rate = 1e999'"),
    ('offset = 1\nrun_name = (', ":2: not a Python config file: '(' was never closed")])
def test_config_file_messages(script, text, message):
    path = config_file(text)
    with pytest.raises(UserError) as error:
        resolve(script, path)
    assert str(error.value) == f'{path}{message}'


def test_unreadable_config_files_are_one_line(script):
    deep = b'offset = ' + b'-' * 50000 + b'1', b'offset = ' + b'1+' * 20000 + b'1'
    for data in (b'run_name = "\xff"', b'offset = 1\0', *deep):
        Path('config/geo3k.py').write_bytes(data)
        with pytest.raises(UserError, match='^config/geo3k.py:') as error:
            resolve(script, 'geo3k')
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('code', ["__import__('os').system('touch ran')",
                                  "run_name = __import__('os').popen('touch ran').read()",
                                  "run_name = open('ran', 'w').name", "if open('ran', 'w'):\n    offset = 2"])
def test_code_in_a_config_file_is_refused_and_never_runs(script, code):
    path = config_file(code)
    with pytest.raises(UserError, match='^config/geo3k.py:1: '):
        resolve(script, path)
    assert not os.path.exists('ran')


def test_a_bare_argument_sets_the_positional_knob(script):
    config_file('offset = 3')
    config = resolve(script, 'out/x/samples.jsonl', 'config/geo3k.py', positional='run_name')
    assert config == DEFAULTS | {'run_name': 'out/x/samples.jsonl', 'offset': 3}
    with pytest.raises(UserError, match='run_name is set twice'):
        resolve(script, 'a', '--run_name=b', positional='run_name')


def test_a_knob_may_take_several_words(script):
    script.write_text(SCRIPT.replace('offset = -1            # may be negative', "sft = ''  # other runs"))
    both = dict(positional='run_name', several=('run_name', 'sft'))
    for argv in (['a', 'b', '--sft', 'c', 'd', '--dry_run', 'True', 'e'], ['--sft=c', 'd', '--dry_run=True', 'a', 'b', 'e'],
                 ['a,b,e', '--sft=c,d', '--dry_run=1']):
        config = resolve(script, *argv, **both)
        assert (config['run_name'], config['sft'], config['dry_run']) == ('a,b,e', 'c,d', True), argv
    assert configurator.listed('a,b , c,') == ['a', 'b', 'c'] and configurator.listed('') == []
    with pytest.raises(UserError, match='sft is set twice'):
        resolve(script, '--sft', 'a', '--sft', 'b', **both)


def test_help_shows_every_knob_with_its_comment_and_exits_0(script, capsys):
    with pytest.raises(SystemExit) as stop:
        resolve(script, '--batch_size=bad', '--help')
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for line in ("run_name = 'toy'       # a name", '7 * 128   # queries x ranks', '# and more of the comment',
                 'learning_rate = 5e-6   # AdamW', 'dry_run = False        # True prints', 'offset = -1', '# I/O'):
        assert line in out
    assert 'later' not in out and 'other' not in out


def test_the_block_is_printed_once_on_rank_0_and_marks_changes(script, capsys, monkeypatch):
    config_file('offset = 3\nbatch_size = 896')
    resolve(script, 'geo3k', '--run_name=x')
    assert capsys.readouterr().out.splitlines() == [
        'train.py: 5 knobs, * where not the default',
        "* run_name      = 'x'  # command line; default 'toy'",
        '  batch_size    = 896',
        '  learning_rate = 5e-06',
        '  dry_run       = False',
        '* offset        = 3  # config/geo3k.py; default -1']
    monkeypatch.setenv('RANK', '1')
    resolve(script)
    with pytest.raises(SystemExit):
        resolve(script, '-h')
    assert capsys.readouterr().out == ''
    monkeypatch.setenv('RANK', '0')
    resolve(script)
    assert capsys.readouterr().out


def run(script, *argv, **environment):
    ours = {k: v for k, v in os.environ.items() if k != 'RANK'} | {'PYTHONPATH': os.path.dirname(configurator.__file__)}
    return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=ours | environment)


def test_a_user_error_is_one_line_and_status_2(script):
    for argv, environment, expected in [
            (['--lerning_rate=1'], {}, 'command line: unknown knob lerning_rate, did you mean learning_rate?\n'),
            (['--run_name=user'], {}, 'bad\nrow\n'),                # of several bad rows each has a line
            (['--run_name=user'], {'RANK': '3'}, 'rank 3: bad\nrow\n')]:
        done = run(script, *argv, **environment)
        assert (done.returncode, done.stderr) == (2, expected)
    crash = run(script, '--run_name=crash')
    assert crash.returncode == 1 and 'Traceback' in crash.stderr and "KeyError: 'crash'" in crash.stderr


text = st.text(st.characters(), max_size=20)             # quotes, newlines, null bytes and lone surrogates too


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({
    'run_name': text, 'batch_size': st.integers(1 - 2**63, 2**63 - 1), 'dry_run': st.booleans(),
    'learning_rate': st.floats(allow_nan=False, allow_infinity=False), 'offset': st.integers(-9, 9)}))
def test_a_saved_config_repeats_the_run_exactly(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp('run')
    (folder / 'train.py').write_text(SCRIPT)
    path = str(folder / 'out' / 'config.py')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', '--run_name=' + config['run_name'] + '\noffset = 77'])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(configurator, 'git_commit', lambda: 'unknown')     # git is slow
        patch.delenv('RANK', raising=False)
        save_config(config, path)
        again = configure({'__file__': str(folder / 'train.py')}, [path])
    assert repr(again) == repr({key: config[key] for key in DEFAULTS})   # repr tells -0.0 from 0.0
    assert os.listdir(folder / 'out') == ['config.py']                   # no temporary file stays


def test_a_saved_config_says_where_it_came_from(tmp_path):
    save_config({'offset': 1}, str(tmp_path / 'config.py'))
    head = (tmp_path / 'config.py').read_text()
    import torch
    assert f'# argv: {sys.argv!r}' in head and f'torch {torch.__version__}' in head
    assert 'transformers ' in head and 'vllm ' in head
    assert f'# git commit: {configurator.git_commit()}' in head
    assert configurator.version('no-such-package-here') == 'not installed'


def test_git_commit_names_the_commit_and_a_dirty_tree(tmp_path, monkeypatch):
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@example.org', '-C', str(tmp_path)]
    monkeypatch.setattr(configurator, '__file__', str(tmp_path / 'configurator.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert configurator.git_commit() == 'unknown'
    (tmp_path / 'file').write_text('1')
    for command in (['init', '-q'], ['add', 'file'], ['commit', '-q', '-m', 'one']):
        subprocess.run(git + command, check=True)
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()
    assert configurator.git_commit() == commit
    (tmp_path / 'file').write_text('2')
    assert configurator.git_commit() == f'{commit}-dirty'
