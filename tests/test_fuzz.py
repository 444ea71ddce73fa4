r"""Any words, files, lengths, numbers and texts: what must hold for all of them. Rows and pictures: test_hostile_data.py.

    python -m pytest tests/test_fuzz.py                       # the same examples each time
    NANOMAYE_FUZZ=20 python -m pytest tests/test_fuzz.py      # 20 times as many, other ones each time
"""
import ast
import contextlib
import io
import json
import math
import os
import sys
import threading
import types
import warnings
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import answers
import configurator
from batch import Batch, cut, microbatches, pack, response_logprobs, select
from configurator import UserError, configure, save_config
from model import learning_rate_at, load_config, on_meta
from reflection import TOTALS, WORDS, add, aha_moment, count_words, metrics, ratios, tally, tally_file
from reward import format_reward, language_reward, last_boxed
from train_rl import discounted_returns, k3, loss_weights, policy_loss, token_rewards, whiten

TIMES = int(os.environ.get("NANOMAYE_FUZZ", 0))
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates, control characters and NUL too


def mostly(usual, rare):
    return st.integers(0, 9).flatmap(lambda at: usual if at else rare)


def examples(count):
    return settings(max_examples=count * max(1, TIMES), derandomize=not TIMES, deadline=None)


# ---------------------------------------------------------------------------------------------------------------------
# knobs: words of a command line and config files become values of the right type, or one line that says why not

SCRIPT = """# ---
run_name = 'toy'
batch_size = 896
learning_rate = 5e-6
dry_run = False
offset = -1
others = ''
# ---
later = 2
"""
DEFAULTS = dict(run_name="toy", batch_size=896, learning_rate=5e-6, dry_run=False, offset=-1, others="")
KEYS = st.sampled_from(list(DEFAULTS))
RAN = []  # what code in a config file would append to
NUMBERS = st.integers(-2**70, 2**70) | st.integers(-9, 9) | st.floats()
VALUES = (NUMBERS | st.booleans() | st.sampled_from(["", "1e3", "1e17", "-0", "TRUE", "fALSE", "0x10", "1_0", " 7 ", "٣",
                                                     "9" * 5000, "--offset", "-1", "a=b"]) | TEXT).map(str)
FITTING = {str: VALUES, bool: st.sampled_from(["True", "false", "1", "0"]),
           int: st.integers(-2**63, 2**63).map(str) | st.sampled_from(["1e3", "1e17"]),
           float: st.floats(-1e300, 1e300).map(str)}
FLAG = KEYS.flatmap(lambda key: st.tuples(st.just(key), mostly(FITTING[type(DEFAULTS[key])], VALUES), st.booleans()))
FLAGS = st.lists(FLAG, max_size=4, unique_by=lambda flag: flag[0])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder with a script and two config files, to be in; a process group of one; canary() leaves a mark."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config").mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "config" / "one.py").write_text("offset = 1\nbatch_size = 1\n")
    (folder / "config" / "two.py").write_text("offset = 2\nrun_name = 'two'\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RANK", raising=False)
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(configurator, "git_commit", lambda: "unknown")  # git is slow
        patch.setattr("builtins.canary", lambda *_: RAN.append(1), raising=False)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield folder
        dist.destroy_process_group()


def resolve(*words, **options):
    """What configure() returns, or the text of its UserError; the invariants of both."""
    knobs = {"__file__": "train.py", "run_name": "untouched"}
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal or a file is
    try:
        with contextlib.redirect_stdout(printed):
            config = configure(knobs, list(words), **options)
    except UserError as error:
        assert knobs == {"__file__": "train.py", "run_name": "untouched"}, "a knob was set in spite of the error"
        assert len(str(error).splitlines()) == 1, "an error is one line"
        str(error).encode("utf-8")
        return str(error)
    finally:
        assert not RAN, "code of a config file ran"
    assert {key: type(value) for key, value in config.items()} == {key: type(value) for key, value in DEFAULTS.items()}
    assert math.isfinite(config["learning_rate"]) and max(abs(config["batch_size"]), abs(config["offset"])) < 2**63
    assert {key: knobs[key] for key in config} == config and len(knobs) == len(config) + 1
    printed.seek(0)
    assert len(printed.read().split("\n")) == 2 + len(config), "a line for each knob"
    return config


WORD = st.one_of(
    *[FLAG.map(lambda flag: f"--{flag[0]}={flag[1]}")] * 3, KEYS.map("--{}".format), VALUES, TEXT.map("--{}".format),
    st.builds("--{}={}".format, TEXT, VALUES), st.builds("-{}={}".format, KEYS, VALUES),
    st.sampled_from(["one", "config/two.py", "config/one.py", "thre", "config/thre.py", "two.py", "--", "-", "", "=",
                     "--=", "--help", "-h", "later=2", "--later=2", "--__file__=x", "--Offset=1", "/", "..", "*", "a[/b"])
).map(lambda word: word.replace("\0", ""))  # the one character that no command line can hold


@examples(400)
@given(st.lists(WORD, max_size=5), st.sampled_from([{}, dict(positional="run_name"), dict(
    positional="run_name", several=("run_name", "others"))]))
def test_any_words_are_a_config_or_a_line_that_names_one_of_them(folder, words, options):
    try:
        found = resolve(*words, **options)
    except SystemExit as stop:
        assert stop.code == 0 and {"--help", "-h"} & set(words)
        return
    if isinstance(found, str):
        named = [part for word in words for part in (word, word.removeprefix("--").partition("=")[0])]
        named.append(options.get("positional", "--"))  # the knob that bare words set
        assert any(part in found or repr(part)[1:-1] in found for part in named)
        assert found.startswith(("command line: ", "config/"))


def as_typed(default, text):
    """The slow way: the value that a text stands for, or None."""
    with contextlib.suppress(ValueError):
        if type(default) is str:
            return text
        if type(default) is bool:
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        if type(default) is float:
            return float(text) if math.isfinite(float(text)) else None
        try:
            value = int(text)
        except ValueError:
            value = Fraction(float(text)) if math.isfinite(float(text)) else Fraction(1, 2)
            value = int(value) if value.denominator == 1 and abs(value) <= 2**53 else 2**63
        return value if abs(value) < 2**63 else None


@examples(400)
@given(FLAGS | FLAGS | st.lists(FLAG, max_size=3), st.lists(st.sampled_from(["one", "config/two.py"]),
                                                                              max_size=2), st.integers(0, 10))
@example([("offset", "--1", False)], [], 0)
def test_flags_win_over_files_wherever_they_stand_and_mean_what_they_say(folder, flags, files, at):
    words = [[f"--{key}={text}"] if joined else [f"--{key}", text] for key, text, joined in flags]
    for i, file in enumerate(files):
        words.insert(at % (len(words) + 1) if i == 0 else len(words), [file])  # their own order stays
    wanted, wrong = dict(DEFAULTS), []
    for file in files:
        wanted |= dict(offset=1, batch_size=1) if file == "one" else dict(offset=2, run_name="two")
    for i, (key, text, joined) in enumerate(flags):
        value = None if not joined and text.startswith("--") else as_typed(DEFAULTS[key], text)
        if value is None or key in [flag[0] for flag in flags[:i]]:
            wrong.append(key)
        wanted[key] = value
    assume("--help" not in sum(words, []) and "-h" not in sum(words, []))
    found = resolve(*sum(words, []))
    if wrong:
        assert found.startswith(f"command line: {wrong[0]} ")
    else:
        assert repr(found) == repr(wanted)  # repr: -0.0 is not 0.0


SUMS = st.recursive((st.integers(0, 99) | st.floats(0, 9) | st.integers(0, 2**64)).map(repr), lambda inner: st.one_of(
    st.builds("{} {} {}".format, inner, st.sampled_from(["+", "-", "*", "//"]), inner), inner.map("-{}".format),
    inner.map("({})".format)))
ODD = st.sampled_from(
    ["True", "'x'", '"#"', "inf", "1j", "0x1F", "1_000", "None", "1e999", "7 / 2", "7 % 4", "2 ** 3", "1 << 3",
     "1 if 1 else 2", "1 and 2", "~1", "+1", "not 1", "'a' * 3", "'a' + 'b'", "True + 1", "-True", "1 // 0", "1.0 // 0",
     "9" * 5000, "offset", "1 < 2", "f'1'", "b'1'", "'a' 'b'", "(1)", "(1,)", "[1]", "..."])
QUOTED = st.text(max_size=20).map(repr) | st.text(max_size=20).map(ascii)
SAID = {str: QUOTED, bool: st.booleans().map(repr), int: SUMS, float: SUMS}
SET = KEYS.flatmap(lambda key: mostly(SAID[type(DEFAULTS[key])], ODD | NUMBERS.map(repr)).map(f"{key} = {{}}".format))
SOUP = st.lists(st.sampled_from(
    [*DEFAULTS, "later", "lerning_rate", " = ", " = ", " = ", "\n", "\n", "\r", "\r\n", ";", "\\\n", "\f", " ", "    ",
     "#", "1", "-1", "7", "2.5", "1e999", "True", "None", "'a'", '"""', "'", "\\", "(", ")", "[", "]", ",", ":", " += ",
     " * ", " ** ", "//", "~", "canary()", "eval('canary()')", "exec('canary()')", "import os", "if canary(): ",
     "lambda: canary()", "f'{canary()}'", "__import__('os')", "b'a'", "\\N{DIGIT ONE}", "\ufeff", "# coding: latin-1\n", "\0",
     "\u2028", "é", "1" * 5000, "{}"]), max_size=12).map("".join)
LINES = st.lists(st.one_of(SET, SET, SET, SET, SOUP), max_size=3).map("\n".join)


TAKEN = (ast.Module, ast.Assign, ast.Expr, ast.Name, ast.Store, ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add,
         ast.Sub, ast.Mult, ast.FloorDiv)
KNOBS = st.lists(SET, max_size=4, unique_by=lambda line: line.split()[0]).map("\n".join)


@examples(500)
@given(st.one_of(LINES, KNOBS, KNOBS, SOUP, TEXT))
@example("offset = 9**9**9")
@example("run_name = 'a' * 3")
@example("offset = True + 1")
@example('"""docs"""\noffset = 7 * -(3 // 2)')
@example("offset = (1,)")
@example("run_name = 'a' 'b'")
def test_any_config_file_means_what_python_says_or_is_a_line_that_names_it(folder, text):
    path = folder / "config" / "any.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resolve("any")
        if isinstance(found, str):
            assert found.startswith("config/any.py:")
            return
        tree, says = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        assert isinstance(node, TAKEN) and not isinstance(getattr(node, "value", 0), (bytes, complex, type(None), type(...)))
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            assert {type(leaf.value) for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)} <= {int, float}
    exec(compile(tree, "any", "exec"), {"__builtins__": {}}, says)  # only values, or found would be a complaint
    says.pop("__doc__", None)
    assert says.keys() <= DEFAULTS.keys()
    assert repr(found) == repr(DEFAULTS | {key: type(DEFAULTS[key])(value) for key, value in says.items()})
    assert all(type(value) is type(DEFAULTS[key]) or not isinstance(value, (str, bool)) for key, value in says.items())


@examples(200)
@given(st.binary(max_size=60) | LINES.map(lambda text: text.encode("utf-16", "surrogatepass")))
@example(b"\xff\xfeo\0f\0")
def test_any_bytes_are_a_config_file_or_a_line_that_names_it(folder, content):
    (folder / "config" / "any.py").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resolve("any")
    assert not isinstance(found, str) or found.startswith("config/any.py:")


@examples(200)
@given(st.fixed_dictionaries(dict(
    run_name=TEXT | st.sampled_from(['"""', "'\"", "a\\", "\r\n", "#", "\x85\u2028", "'\n__import__('os')"]), others=TEXT,
    batch_size=st.integers(-2**70, 2**70) | st.integers(-9, 9), dry_run=st.booleans(),
    offset=st.sampled_from([2**63, -2**63, 2**63 - 1, 1 - 2**63, 0, 10**30]),
    learning_rate=st.floats() | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 1e308, 5e-324]))))
def test_a_saved_config_is_read_back_the_same_or_refused_but_never_another(folder, config):
    save_config(config, "saved.py")
    fits = math.isfinite(config["learning_rate"]) and max(abs(config["batch_size"]), abs(config["offset"])) < 2**63
    found = resolve("saved.py")
    if fits:
        assert repr({key: found[key] for key in config}) == repr(config)
    else:  # configure() lets none of these through, so no run can save one
        assert found.startswith("saved.py:") and any(key in found for key in ("learning_rate", "batch_size", "offset"))
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------------------------------
# batches: no row and no token is lost, none counts twice, padding never counts

EOS, PAD, START, END, IMAGE = 2, 0, 3, 4, 6  # ids of the tiny tokenizer; 0 and 2 may stand anywhere in a text
PLAIN = st.sampled_from([PAD, EOS, 1, 10, 11, 40])
ROWS = st.lists(st.tuples(
    st.lists(PLAIN, max_size=5), st.sampled_from([(2, 2), (2, 4), (4, 2), (4, 6)]), st.lists(PLAIN, max_size=5),
    st.lists(PLAIN | st.just(IMAGE), min_size=1, max_size=6)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    """As much of a Policy as pack() takes."""
    hf = on_meta(load_config(tiny_model_dir))
    return types.SimpleNamespace(image_token_id=hf.config.image_token_id, rope_index=hf.model.get_rope_index)


def packed(policy, rows, pad_id):
    queries = [before + [START] + [IMAGE] * (h * w // 4) + [END] + after for before, (h, w), after, _ in rows]
    grids = [torch.tensor([[1, h, w]]) for _, (h, w), _, _ in rows]
    return queries, pack(policy, queries, [row[3] for row in rows], grids, pad_id, "cpu")


def positions_of(before, grid, after, response):
    """M-RoPE the slow way: text counts on all three axes, an image's rows and columns on two; on from the largest."""
    triples, at = [], 0
    for part in (before + [START], grid, [END] + after + response):
        if part is grid:
            rows, columns = grid[0] // 2, grid[1] // 2
            triples += [(at, at + r, at + c) for r in range(rows) for c in range(columns)]
            at += max(rows, columns)
        else:
            triples += [(at + i,) * 3 for i in range(len(part))]
            at += len(part)
    return [list(axis) for axis in zip(*triples)]


@examples(150)
@given(ROWS, st.sampled_from([PAD, EOS, 1]))
def test_packed_masks_and_positions_follow_lengths_whatever_the_ids(policy, rows, pad_id):
    queries, batch = packed(policy, rows, pad_id)
    Q, R = max(map(len, queries)), max(len(row[3]) for row in rows)
    for i, (query, row) in enumerate(zip(queries, rows)):
        response, real = row[3], batch.attention_mask[i].bool()
        left, right = Q - len(query), R - len(response)
        assert batch.query_responses[i].tolist() == [pad_id] * left + query + response + [pad_id] * right
        assert batch.attention_mask[i].tolist() == [0] * left + [1] * len(query + response) + [0] * right
        assert batch.response_mask[i].tolist() == [True] * len(response) + [False] * right
        assert batch.position_ids[:, i, real].tolist() == positions_of(*row)


@examples(150)
@given(ROWS, st.sampled_from([PAD, EOS]), st.data())
def test_selected_rows_are_the_rows_packed_alone(policy, rows, pad_id, data):
    _, batch = packed(policy, rows, pad_id)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    part, (_, alone) = select(batch, torch.tensor(chosen)), packed(policy, [rows[i] for i in chosen], pad_id)
    for name in ("query_responses", "attention_mask", "response_mask"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    real = alone.attention_mask.bool()
    assert torch.equal(part.position_ids[:, real], alone.position_ids[:, real])
    assert part.response_mask.sum(1).tolist() == [len(rows[i][3]) for i in chosen]
    assert part.attention_mask.any(0).all(), "a column of padding alone is left"


LENGTHS = st.lists(st.integers(1, 60), max_size=30)


@examples(300)
@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_in_one_micro_batch_within_the_budget_and_none_is_half_empty(lengths, budget):
    batches = cut(lengths, budget)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget for rows in batches)
    in_order = [lengths[i] for rows in batches for i in rows]
    assert in_order == sorted(lengths, reverse=True), "rows of like length go together"
    for rows, following in zip(batches, batches[1:]):
        assert (len(rows) + 1) * max(lengths[i] for i in rows) > budget, "the next row would have fitted"
        assert following


@examples(100)
@given(LENGTHS.filter(bool), st.integers(1, 200), st.integers(0, 5))
def test_all_ranks_have_as_many_micro_batches_and_the_added_ones_are_not_real(lengths, budget, more):
    alone = cut(lengths, budget)
    assert microbatches(lengths, budget) == [(rows, True) for rows in alone]
    with pytest.MonkeyPatch.context() as patch:  # another rank has more
        patch.setitem(microbatches.__globals__, "all_max", lambda count: float(count + more))
        assert microbatches(lengths, budget) == [(rows, True) for rows in alone] + [([0], False)] * more


class Echo:
    """A policy whose log-probability of a token is its id, and whose entropy is the token's place in its row's response."""

    def __call__(self, input_ids, position_ids, attention_mask, image_features, response_mask, temperature, with_entropy):
        assert len(image_features) == len(input_ids)
        assert [feature for feature in image_features] == [int(row[mask.bool()].sum()) for row, mask in
                                                           zip(input_ids, attention_mask)], "another row's image"
        R = response_mask.shape[1]
        return input_ids[:, -R:] * response_mask.float(), torch.arange(R) * response_mask.float()

    def reshard(self):
        pass


@examples(100)
@given(ROWS, st.sampled_from([PAD, EOS, 1]), st.integers(1, 150), st.integers(0, 2))
def test_logprobs_come_back_to_their_tokens_whatever_the_micro_batches(policy, rows, pad_id, budget, more):
    _, batch = packed(policy, rows, pad_id)
    features = [int(row[mask.bool()].sum()) for row, mask in zip(batch.query_responses, batch.attention_mask)]
    R = batch.response_mask.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(microbatches.__globals__, "all_max", lambda count: float(count + more))
        logprobs, entropy = response_logprobs(Echo(), batch, features, budget, 1.0)
    assert torch.equal(logprobs, (batch.query_responses[:, -R:] * batch.response_mask).float())
    assert torch.equal(entropy, (torch.arange(R) * batch.response_mask).float())


# ---------------------------------------------------------------------------------------------------------------------
# the objective, against plain Python

FINITE = st.floats(-10, 10, width=32)


def tensors(count, least=1):
    """lengths, and count lists of rows of numbers, each row as long as the longest response: what padding holds is noise."""
    def rows_of(lengths):
        row = st.lists(FINITE, min_size=max(1, *lengths), max_size=max(1, *lengths))
        return st.tuples(st.just(lengths), *[st.lists(row, min_size=len(lengths), max_size=len(lengths))] * count)
    return st.lists(st.integers(least, 6), min_size=2, max_size=6).flatmap(rows_of)


def mask_of(lengths):
    return torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]


@examples(200)
@given(tensors(1), st.sampled_from(["seq_mean", "token_mean"]), st.integers(1, 40))
def test_weights_sum_to_1_and_give_the_mean_over_any_split(drawn, loss_agg, budget):
    lengths, rows = drawn
    mask, values = mask_of(lengths), torch.tensor(rows)
    batch = Batch(torch.ones_like(mask).long(), mask.long(), torch.zeros(3, *mask.shape).long(), mask)  # no query
    means = [sum(row[:n]) / n for row, n in zip(rows, lengths)]
    wanted = {"seq_mean": sum(means) / len(means),
              "token_mean": sum(sum(row[:n]) for row, n in zip(rows, lengths)) / sum(lengths)}[loss_agg]
    total = weight_sum = 0.0
    for chosen, real in microbatches(lengths, budget) + [([0], False)]:
        part = select(batch, chosen)
        weights = loss_weights(part.response_mask, loss_agg, len(lengths), sum(lengths)) * real
        weight_sum += weights.double().sum().item()
        total += (weights * values[chosen, :part.response_mask.shape[1]]).double().sum().item()
    assert weight_sum == pytest.approx(1, abs=1e-5) and total == pytest.approx(wanted, abs=1e-4)


def on_ranks(function, parts):
    """[function(*part), ...], each in a thread that is a rank of its own: all_sum sums over the threads."""
    meet, slots, results = threading.Barrier(len(parts), timeout=60), [None] * len(parts), [None] * len(parts)
    here = threading.local()

    def all_sum(values):
        slots[here.rank] = values
        meet.wait()
        total = sum(slots[1:], slots[0])
        meet.wait()
        return total

    def work(rank):
        here.rank = rank
        results[rank] = function(*parts[rank])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(function.__globals__, "all_sum", all_sum)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


@examples(200)
@given(tensors(2, least=0), st.integers(0, 6), st.sampled_from([1.0, 1e-2, 1e4]), st.sampled_from([0.0, 100.0]))
def test_whitened_values_have_mean_0_and_variance_1_and_see_no_padding_and_no_ranks(drawn, at, scale, shift):
    lengths, rows, noise = drawn
    mask, values = mask_of(lengths), torch.tensor(rows) * scale + shift
    assume(mask.sum() >= 2 and values[mask].double().var(unbiased=False) > 1e-3 * scale**2)
    white = whiten(values, mask)
    counted = white[mask].double()
    assert counted.mean().abs() < 1e-5
    assert (white[~mask] == 0).all() and white.dtype == torch.float32
    plain = values[mask].tolist()
    mean = sum(plain) / len(plain)
    variance = sum((x - mean) ** 2 for x in plain) / len(plain)
    assert counted.var(unbiased=False).item() == pytest.approx(variance / (variance + 1e-8), rel=1e-5)  # all but 1
    wanted = torch.tensor([(x - mean) / math.sqrt(variance + 1e-8) for x in plain])
    torch.testing.assert_close(white[mask], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(whiten(torch.where(mask, values, torch.tensor(noise) * 1e6), mask), white)
    wider = torch.nn.functional.pad(values, (0, 3), value=7.0), torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(whiten(*wider)[:, :mask.shape[1]], white)
    at = at % (len(lengths) + 1)  # a rank may have no row, or no token
    parts = on_ranks(whiten, [(values[:at], mask[:at]), (values[at:], mask[at:])])
    torch.testing.assert_close(torch.cat(parts), white)


@examples(200)
@given(tensors(1), st.data(), st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_rewards_and_returns_are_those_of_a_slow_loop(drawn, data, coeff, gamma):
    lengths, rows = drawn
    scores = data.draw(st.lists(FINITE, min_size=len(lengths), max_size=len(lengths)))
    mask = mask_of(lengths)
    given_kl = torch.tensor(rows)
    kl = given_kl.clone()
    rewards = token_rewards(torch.tensor(scores), kl, mask, coeff)
    assert torch.equal(kl, given_kl), "the log-probabilities' KL is logged later on"
    returns = discounted_returns(rewards, gamma)
    for i, n in enumerate(lengths):
        slow = [-coeff * x if t < n else 0.0 for t, x in enumerate(rows[i])]
        slow[n - 1] += scores[i]
        assert rewards[i].tolist() == pytest.approx(slow, abs=1e-4)
        sums = [sum(gamma**(u - t) * slow[u] for u in range(t, len(slow))) for t in range(len(slow))]
        assert returns[i].tolist() == pytest.approx(sums, abs=1e-3)


@examples(300)
@given(st.floats(-3, 3, width=32), FINITE, st.floats(0, 0.875, width=32), st.floats(0, 2, width=32))
def test_clipping_is_a_bound_and_takes_the_gradient_just_where_it_says(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    assume(abs(ratio - 1 + low) > 1e-5 and abs(ratio - 1 - high) > 1e-5 and (advantage == 0 or abs(advantage) > 1e-6))
    new, old = torch.tensor([log_ratio - 5.0], requires_grad=True), torch.tensor([-5.0])
    loss, kl, got, clipped = policy_loss(new, old, old, torch.tensor([advantage]), low, high)
    loss.sum().backward()
    assert got.item() == pytest.approx(ratio, rel=1e-5)
    assert loss.item() >= -advantage * ratio - 1e-4, "the loss is never below the unclipped one"
    stops = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    assert clipped.item() is stops
    if stops:
        assert new.grad.item() == 0
        assert loss.item() == pytest.approx(-advantage * (1 + high if advantage > 0 else 1 - low), rel=1e-4, abs=1e-5)
    else:
        assert new.grad.item() == pytest.approx(-advantage * ratio, rel=1e-4, abs=1e-5)
        assert loss.item() == pytest.approx(-advantage * ratio, rel=1e-4, abs=1e-5)
    assert kl.item() == pytest.approx(1 / ratio + log_ratio - 1, rel=1e-3, abs=1e-5)


@examples(200)
@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=5))
def test_k3_is_never_negative(pairs):
    new, ref = (torch.tensor(column) for column in zip(*pairs))
    assert (k3(new, ref) >= 0).all() and (k3(new, new) == 0).all()


@examples(200)
@given(st.integers(1, 2000), st.floats(0, 1), st.floats(1e-9, 1))
def test_learning_rates_lie_between_0_and_their_peak_and_rise_then_fall(updates, warmup_ratio, peak):
    rates = [learning_rate_at(i, updates, peak, warmup_ratio) for i in range(updates)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates) and max(rates) == pytest.approx(peak)
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# answers and rewards; hostile answers at the judge's workers are in test_judge_hostile.py

def spellings(number):
    """Ways to write a Fraction without a decimal."""
    top, bottom, sign = abs(number.numerator), number.denominator, "-" if number < 0 else ""
    if bottom == 1:
        ways = [f"{top}", f"{top:,}", rf"\frac{{{3 * top}}}{{3}}", f"{7 * top}/7", f"{top}".zfill(9),
                f"{top:,}".replace(",", "{,}")]
    else:
        ways = [rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", rf"\dfrac{{{2 * top}}}{{{2 * bottom}}}",
                f"{top} : {bottom}"]
        ways += [rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"] * (top > bottom)
    around = ["{}", "${}$", "x = {}", r"\boxed{{{}}}", r"{} \text{{ cm}}", r"\({}\).", " {} ", r"\text{{Area}} = {}"]
    return st.builds(lambda way, wrap: wrap.format(sign + way), st.sampled_from(ways), st.sampled_from(around))


def judged(gold, box):
    """The verdict without math-verify, which plain numbers do not need."""
    def ask(gold, box, decimal):
        raise AssertionError(f"{gold} or {box} is no plain number")
    return answers.compare(last_boxed(gold) or gold, last_boxed(box) or box, ask)


FRACTIONS = st.builds(Fraction, st.integers(-10**6, 10**6) | st.integers(-9, 9), st.integers(1, 12))


@examples(400)
@given(FRACTIONS, FRACTIONS, st.booleans(), st.data())
def test_numbers_without_decimals_are_right_just_when_equal_whichever_is_gold(a, b, same, data):
    b = a if same else b
    one, other = data.draw(spellings(a)), data.draw(spellings(b))
    assert judged(one, other) == judged(other, one) == (a == b), (one, other)


@examples(200)
@given(st.integers(-10**6, 10**6) | st.integers(-200, 200), st.integers(-3 * 10**4, 3 * 10**4) | st.none(),
       st.sampled_from([-1, 1]), st.integers(-1, 1))
def test_a_decimal_is_right_within_a_hundredth_or_a_tenth_of_the_gold(gold, off, sign, jitter):
    if off is None:  # at the border of what is right
        off = sign * min(10, abs(gold) // 10) + jitter
    texts = [f"{'-' * (n < 0)}{abs(n) // 1000}.{abs(n) % 1000:03d}" for n in (gold, gold + off)]
    assert judged(*texts) == (off == 0 or abs(off) < 10 and 10 * abs(off) < abs(gold))


PIECES = st.lists(st.sampled_from(
    ["1", "2", "10", "0", ".", ",", ";", ":", "/", "=", "<", "-", "+", "^", "_", "{", "}", "(", ")", "[", "]", r"\{", r"\}",
     "|", " ", "x", "A", "AB", "e", "B.", r"\frac", r"\frac{1}{2}", r"\frac{1}{0}", r"\sqrt", r"\pi", r"\pm", r"\cup",
     r"\in ", r"\text{", r"\text{cm}", r"\text{and}", r"\approx", r"\circ", "%", r"\%", "$", '"', "cm", "m", "degrees", "two",
     "million", "not", "°", "½", "²", "٣", "٣.٣", "−", r"\overline{3}", r"\times 10^", "0.", "9" * 300, r"\le", r"\not",
     r"\begin{aligned}", "\\", "&", "*", "**", "«", "»", "⅘", "Ⅷ", "①"]), max_size=10).map("".join)


@examples(800)
@given(PIECES | TEXT, PIECES | TEXT, st.booleans())
@example("٣", "٣", True)
@example("1/0", "1/0", False)
def test_any_two_texts_are_compared_or_unreadable(gold, box, equal):
    """reward.py takes any other exception for Unreadable too, but nothing here should need that."""
    try:
        assert answers.compare(gold, box, lambda *_: equal) in (True, False)
    except answers.Unreadable:
        pass


UNBRACED = st.text(st.characters(exclude_characters="{}\\"), max_size=4)
BALANCED = st.recursive(UNBRACED | st.sampled_from([r"\{", r"\}", r"\\", r"\pi ", r"\frac"]), lambda inner: st.one_of(
    inner.map("{{{}}}".format), st.lists(inner, max_size=3).map("".join)), max_leaves=8)


@examples(200)
@given(TEXT | PIECES, BALANCED, st.text(st.characters(exclude_characters="\\"), max_size=10))
def test_the_last_box_is_found_whatever_its_braces(before, inside, after):
    assert last_boxed(rf"{before} \boxed{{{inside}}}{after}") == inside


@examples(200)
@given(TEXT | PIECES, BALANCED | TEXT)
def test_rewards_of_any_text_are_in_their_range(text, inside):
    for response in (text, inside, rf"{text}\boxed{{{inside}}}", rf"\boxed{{{inside}}}{text}"):
        assert -1 <= language_reward(response) <= 0 and format_reward(response) in (0, 1)
    assert language_reward(text) * sum(map(str.isalpha, text)) == pytest.approx(
        sum(language_reward(char) for char in text), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# reflection

TALK = st.lists(st.sampled_from(
    [*WORDS, *map(str.upper, WORDS), "wai", "t", "again", "-", "'", " ", "\n", ".", "re", "İ", "ß", "K", r"\boxed{", "}",
     "the answer is 4", "2+2=5", "= 4", "1,000", "\ud800"]), max_size=10).map("".join) | TEXT
BATCHES = st.lists(st.tuples(TALK, st.booleans()), max_size=5)
MATCH = st.sampled_from(["substring", "word"])


@examples(200)
@given(BATCHES, BATCHES, MATCH)
def test_tallies_of_any_texts_are_counts_that_add_up(one, two, match):
    def count(batch):
        return tally([text for text, _ in batch], [right for _, right in batch], match)
    counts = count(one)
    assert list(counts) == [*TOTALS, *WORDS] and all(type(n) is int and n >= 0 for n in counts.values())
    n, n_ref, n_correct, n_both = (counts[name] for name in TOTALS)
    assert n == len(one) and n_correct == sum(right for _, right in one)
    assert all(counts[word] == sum(count_words(text, match)[word] for text, _ in one) for word in WORDS)
    assert n_ref + n_correct - n <= n_both <= min(n_ref, n_correct) and n_ref <= n
    assert n_ref <= sum(counts[word] for word in WORDS) and bool(n_ref) == any(counts[word] for word in WORDS)
    assert add(counts, count(two)) == count(one + two) == count((one + two)[::-1])
    for name, value in ratios(counts).items():
        assert value is None or 0 <= value <= 1, name
    assert len(metrics(counts)) == 20
    json.dumps(metrics(counts))


@examples(200)
@given(TALK)
def test_a_whole_word_is_also_a_substring(text):
    whole, parts = count_words(text, "word"), count_words(text)
    assert all(whole[word] <= parts[word] for word in WORDS if " " not in word)
    assert all(parts[word] == text.lower().count(word) for word in WORDS)


@examples(200)
@given(TALK, TALK)
def test_aha_moments_of_any_text_point_into_it(response, final):
    found = aha_moment(response, final)
    if found:
        strength, stated, word, at = found
        assert strength in (1, 2, 3, 4) and stated in response and word and response[at:at + len(word)] == word


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["response", "correct", "x"]), inner, max_size=3), max_leaves=4)
RESPONSES = st.builds(lambda text, right: json.dumps(dict(response=text, correct=right)).encode(), TALK, st.booleans() | JSON)


@examples(300)
@given(st.lists(RESPONSES | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20), max_size=3))
@example([b"\xff\xfe{\0}\0"])
@example([b"[" * 100_000])
@example([b'{"response": "", "correct": ' + b"1" * 5000 + b"}"])
def test_any_file_of_responses_is_tallied_or_one_line_names_the_place(folder, lines):
    path = folder / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        counts = tally_file(str(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1
        return
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert counts == tally([row["response"] for row in rows], [bool(row["correct"]) for row in rows])
