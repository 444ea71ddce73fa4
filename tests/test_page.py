"""The report page: what Python packs, and what a browser (Chromium, offline, from a file) makes of it."""
import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

import page
from page import AHA, BOX, FIELDS, WORD, find_marks, read_samples, thumbnail, write_page
from reflection import find_words
from reward import last_box

HOSTILE = ['<script>window.__pwned=1;alert(1)</script>', '<img src=x onerror="window.__pwned=1;alert(1)">',
           '</script><script>window.__pwned=1;alert(1)</script>', 'javascript:window.__pwned=1',
           '<!--<script>window.__pwned=1', '"><svg onload="window.__pwned=1">', "{{data}}{{policy}}", '${__pwned=1}']


def sample(id, step=1, response=r'16+4=20. \boxed{20}', correct=True, **more):
    return {'step': step, 'split': 'train', 'id': id, 'image': '', 'question': f'<image>Find {id}.', 'answer': '20',
            'response': response, 'correct': correct, 'error': '', 'score': 1.0, 'rewards': {'accuracy': float(correct)},
            'length': 12, 'finish_reason': 'stop'} | more


def write_run(folder, rows):
    """a run's folder with rows, dicts or raw lines, as its samples.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if type(row) is bytes else json.dumps(row).encode() for row in rows]
    (folder / 'samples.jsonl').write_bytes(b''.join(line + b'\n' for line in lines))
    return str(folder)


def unpack(samples):
    """the packed samples as dicts again."""
    texts = samples['strings']
    rows = [dict(zip(FIELDS, row)) for row in samples['rows']]
    return [row | {key: texts[row[key]] for key in page.TEXTS} | {'rewards': {texts[i]: v for i, v in row['rewards']}}
            for row in rows]


def data_of(path):
    """the data block of a written page, found as a browser does: up to the first end tag."""
    text = path.read_text(encoding='utf-8')
    return json.loads(text.split('<script type="application/json" id="data">')[1].split('</script')[0])


# packing

def test_marks_are_what_reflection_counts_and_reward_judges():
    rng = random.Random(0)
    pieces = ['😀', 'Wait', 'recheck', ' again', ' ', 'İ', r'\boxed{', '5', '}', r'\boxed 7', '\ud800', 'yet', 'x']
    boxes = 0
    for _ in range(500):
        text = ''.join(rng.choices(pieces, k=rng.randrange(1, 14)))
        units = text.encode('utf-16-le', 'surrogatepass')

        def cut(start, end, units=units):
            return units[2 * start:2 * end].decode('utf-16-le', 'surrogatepass')

        marks, _ = find_marks(text, None)
        assert [cut(a, b) for a, b, kind in marks if kind == WORD] == [text[a:b] for a, b in find_words(text)]
        found, box = last_box(text), [cut(a, b) for a, b, kind in marks if kind == BOX]
        assert len(box) == bool(found)
        if found:
            boxes += 1
            assert box[0].startswith(r'\boxed') and found[0] in box[0]
            assert box[0].count(r'\boxed') == 1 + found[0].count(r'\boxed')
            end = next(b for _, b, kind in marks if kind == BOX)
            assert 2 * end == len(text[:found[1]].encode('utf-16-le', 'surrogatepass'))
        assert marks == sorted(marks)
    assert boxes > 50


def test_an_aha_moment_is_marked_only_in_a_right_response():
    text = r'😀 16+4=21. Wait, 16+4=20. \boxed{20}'
    marks, aha = find_marks(text, True)
    assert aha == [2, '21', 'Wait', '20']
    assert [12, 16, AHA] in marks and text.encode("utf-16-le")[24:32].decode('utf-16-le') == 'Wait'
    assert find_marks(text, False)[1] is find_marks(text, None)[1] is None


def test_rows_come_back_as_written_and_bad_lines_are_counted(tmp_path):
    rows = [sample('a', setting='pass@1'), b'{"response": ', b'[1]', b'null', b'{"response": 5}', b'\xff\xfe{}',
            b'[' * 100_000, b'',
            {'response': 'x', 'step': '1', 'split': 3, 'id': 7, 'image': [], 'question': None, 'answer': 2.5,
             'correct': 'yes', 'error': {}, 'score': True, 'rewards': {'a': 'b', 'c': 2, 'd': None}, 'length': 2**60},
            b'{"response": "y", "score": NaN, "length": Infinity, "rewards": [1]}']
    runs = [('one', 'rl', write_run(tmp_path / 'one', rows)), ('two', 'sft', str(tmp_path / 'two'))]
    samples, notes = read_samples(runs, 100)
    first, odd, empty = unpack(samples)
    assert first['question'] == '<image>Find a.' and first['rewards'] == {'accuracy': 1.0} and first['setting'] == 'pass@1'
    assert (first['run'], first['step'], first['correct'], first['line'], first['length']) == ('one', 1, True, 1, 12)
    assert (odd['id'], odd['answer'], odd['split'], odd['question']) == ('7', '2.5', '3', '')
    assert odd['step'] is odd['correct'] is odd['score'] is odd['length'] is None and odd['rewards'] == {'c': 2}
    assert empty['id'] == 'one line 10' and empty['score'] is empty['length'] is None and empty['rewards'] == {}
    assert notes == ['one: 6 of 9 lines of samples.jsonl are no objects with a text response; left out',
                     'no samples.jsonl, so no samples on the page, of two']


def test_a_cap_drops_whole_problems_keeps_aha_moments_and_ignores_the_order(tmp_path):
    rows = [sample(f'p{i}', step=step) for step in range(5) for i in range(40)]
    rows += [sample('aha', step=9, response=r'16+4=21. Wait, 16+4=20. \boxed{20}')]
    kept = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        runs = [('one', 'rl', write_run(tmp_path / f'{seed}', rows[:120])),
                ('two', 'rl', write_run(tmp_path / f'{seed}b', rows[120:]))]
        samples, notes = read_samples(runs, 83)
        ids = [row['id'] for row in unpack(samples)]
        assert len(ids) == 81 and 'aha' in ids and all(ids.count(id) == 5 for id in set(ids) - {'aha'})
        assert notes == ['samples: 81 of 201 are in the page, all those of 17 of 41 problems, '
                         'those with a candidate aha moment first; at most 83 samples and 10 MB of text']
        order = [(row['run'], row['line']) for row in unpack(samples)]
        assert order == sorted(order)
        kept.append(set(ids))
    assert kept[0] == kept[1]
    assert kept[0] != {'aha'} | {f'p{i}' for i in range(16)}       # by a hash, not the first ones
    assert [row['id'] for row in unpack(read_samples(runs, 5)[0])] == ['aha']      # it first, then no other fits
    assert read_samples(runs, 0)[0]['rows'] == []


def test_the_same_id_in_two_splits_is_two_problems(tmp_path):
    rows = [sample('1', step, split=split) for step in (1, 2) for split in ('train', 'validation')]
    samples, notes = read_samples([('one', 'rl', write_run(tmp_path, rows))], 3)
    assert len({row['split'] for row in unpack(samples)}) == 1 and len(samples['rows']) == 2
    assert notes[0].startswith('samples: 2 of 4 are in the page, all those of 1 of 2 problems')


def test_text_that_is_too_much_leaves_out_its_problem_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'TEXT_BYTES', 50_000)
    rows = [sample('long', response='<' * 9_000), *(sample(f'p{i}') for i in range(20))]    # each < takes six bytes
    samples, notes = read_samples([('one', 'rl', write_run(tmp_path, rows))], 100)
    assert {row['id'] for row in unpack(samples)} == {f'p{i}' for i in range(20)}
    assert notes == ['samples: 20 of 21 are in the page, all those of 20 of 21 problems, '
                     'those with a candidate aha moment first; at most 100 samples and 0.05 MB of text']
    assert len(page.encode(samples)) < 60_000 and not any('<<' in text for text in samples['strings'])


# pictures

def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def opened(url):
    assert url.startswith('data:image/webp;base64,'), url
    return Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))


def test_a_small_picture_keeps_its_pixels_and_a_large_one_fits_its_share(tmp_path):
    small, large = noise(50, 84), noise(900, 1200)
    small.save(tmp_path / 'small.png')
    large.save(tmp_path / 'large.png')
    Image.new('RGB', (3000, 20), 'red').save(tmp_path / 'thin.png')
    same = opened(thumbnail(str(tmp_path / 'small.png'), 32_768, tmp_path)).convert('RGB')
    assert np.array_equal(np.asarray(same), np.asarray(small))
    for limit in (32_768, 6_000, 1_500):
        url = thumbnail(str(tmp_path / 'large.png'), limit, tmp_path)
        width, height = opened(url).size
        assert len(url) <= limit and max(width, height) <= 320 and abs(width / height - 4 / 3) < 0.1
    assert opened(thumbnail(str(tmp_path / 'thin.png'), 32_768, tmp_path)).size in [(319, 2), (320, 2)]
    assert thumbnail(str(tmp_path / 'large.png'), 50, tmp_path) == 'left out, too many pictures'


@pytest.mark.parametrize('mode', ['P', 'CMYK', 'RGBA', 'L', '1', 'I;16'])
def test_every_kind_of_picture_is_shown(tmp_path, mode):
    grey = Image.new('RGB', (40, 30), (200, 200, 200))
    picture = Image.new(mode, (40, 30), 51_400) if mode == 'I;16' else grey.convert(mode)
    name = str(tmp_path / ('x.jpg' if mode == 'CMYK' else 'x.png'))
    picture.save(name)
    shown = np.asarray(opened(thumbnail(name, 32_768, tmp_path)).convert('L'))
    assert shown.shape == (30, 40) and abs(shown.mean() - 200) < (3 if mode != '1' else 60)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_shared_picture_is_stored_once_and_lost_ones_are_counted(tmp_path):
    noise(30, 30).save(tmp_path / 'there.png')
    (tmp_path / 'broken.png').write_bytes((tmp_path / 'there.png').read_bytes()[:200])
    os.mkfifo(tmp_path / 'pipe.png')
    Image.new('1', (12_000, 12_000)).save(tmp_path / 'huge.png')
    names = ['there.png', 'there.png', 'broken.png', 'gone.png', 'pipe.png', 'huge.png', '\0', '\ud800']
    rows = [sample(f'p{i}', image=name if name in '\0\ud800' else str(tmp_path / name)) for i, name in enumerate(names)]
    samples, notes = read_samples([('one', 'rl', write_run(tmp_path, rows + [sample('none', image=None)]))], 100, tmp_path)
    urls = {os.path.basename(samples['strings'][int(key)]): url for key, url in samples['images'].items()}
    assert urls.pop('there.png').startswith('data:image/webp;base64,')
    assert urls == dict.fromkeys(['broken.png', 'huge.png'], 'cannot be read') | \
        dict.fromkeys(['gone.png', 'pipe.png', '\0', '\ud800'], 'no such file')
    assert notes == ['pictures: 6 of 7 are missing or cannot be read here; their places are marked']


def test_a_path_that_leads_out_of_the_folder_of_images_is_not_followed(tmp_path):
    inside = tmp_path / 'inside'
    inside.mkdir()
    noise(30, 30).save(tmp_path / 'private.png')
    noise(30, 31).save(inside / 'ours.png')
    os.symlink(tmp_path / 'private.png', inside / 'link.png')
    names = [str(tmp_path / 'private.png'), f'{inside}/../private.png', f'{inside}/link.png', f'{inside}/ours.png']
    rows = [sample(f'p{i}', image=name) for i, name in enumerate(names)]
    samples, notes = read_samples([('one', 'rl', write_run(inside, rows))], 100, inside)
    urls = {samples['strings'][int(key)]: url for key, url in samples['images'].items()}
    assert [urls[name] for name in names[:3]] == ['outside the folder of images'] * 3
    assert urls[names[3]].startswith('data:image/webp;base64,')
    assert notes == ['pictures: 3 of 4 are outside the folder of images, --images=FOLDER names another; their places are '
                     'marked']


def test_pictures_left_out_for_their_size_are_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'IMAGE_BYTES', 200)
    noise(300, 300).save(tmp_path / 'x.png')
    _, notes = read_samples([('one', 'rl', write_run(tmp_path, [sample('a', image=str(tmp_path / 'x.png'))]))], 100, tmp_path)
    assert notes == ['pictures: 1 of 1 are left out since all would be too much for the page; their places are marked']


def test_pictures_share_their_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'IMAGE_BYTES', 40_000)
    for i in range(10):
        noise(300, 300 + i).save(tmp_path / f'{i}.png')
    rows = [sample(f'p{i}', image=str(tmp_path / f'{i}.png')) for i in range(10)]
    samples, notes = read_samples([('one', 'rl', write_run(tmp_path, rows))], 100, tmp_path)
    assert len(samples['images']) == 10 and sum(map(len, samples['images'].values())) <= 40_000 and notes == []


# writing

def test_the_policy_allows_the_one_script_and_style_of_the_page(tmp_path):
    write_page(tmp_path / 'index.html', {'title': HOSTILE[2], 'notes': HOSTILE})
    text = (tmp_path / 'index.html').read_text(encoding='utf-8')
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    for tag in ('script', 'style'):
        (body,) = re.findall(rf'<{tag}>(.*?)</{tag}>', text, re.S)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ") and 'unsafe' not in policy
    assert text.count('<script') == 2 and 'innerHTML' not in text and 'http://www.w3.org/2000/svg' in text
    assert set(re.findall(r'https?://[\w.]+', text)) == {'http://www.w3.org'}      # a name, nothing that is fetched
    assert data_of(tmp_path / 'index.html')['notes'] == HOSTILE


def test_odd_text_and_numbers_are_written_and_read_back(tmp_path):
    odd = 'half \ud83d\u2028\u2029 \x00\u202e <b>&amp; 😀'
    panel = {'title': odd, 'series': [{'x': [0, 1], 'mean': [float('nan'), np.float32(0.5)], 'sd': [float('inf'), None]}]}
    write_page(tmp_path / 'new' / 'index.html',
               {'title': odd, 'figures': [{'panels': [panel]}], 'configs': [{'run': odd, 'text': odd}]})
    data = data_of(tmp_path / 'new' / 'index.html')
    assert data['title'] == data['configs'][0]['text'] == data['figures'][0]['panels'][0]['title'] == odd
    assert data['figures'][0]['panels'][0]['series'][0]['mean'] == [None, 0.5]
    assert data['tables'] == data['notes'] == [] and data['samples'] is None
    assert (tmp_path / 'new' / 'index.html').read_bytes().isascii()


def test_what_is_too_large_is_left_out_with_a_note(tmp_path):
    write_page(tmp_path / 'index.html', {'configs': [{'run': 'one', 'text': 'x' * 40_000_000}], 'title': 'y' * 10_000_000,
                                         'tables': [{'columns': ['a'], 'rows': [['b']]}], 'notes': ['z' * 10_000_000] * 300})
    data = data_of(tmp_path / 'index.html')
    assert data['configs'] == [] and data['tables']
    assert data['notes'][-1] == 'configs: left out, 40.0 MB is too much for the page'
    assert os.path.getsize(tmp_path / 'index.html') < 1_000_000


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_page(tmp_path / 'index.html', {'title': 'old'})

    def fail(*_):
        raise OSError('full')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='full'):
        write_page(tmp_path / 'index.html', {'title': 'new'})
    assert data_of(tmp_path / 'index.html')['title'] == 'old' and os.listdir(tmp_path) == ['index.html']


# in a browser

@pytest.fixture(scope='module')
def browser():
    """Chromium; a test skips where there is none, but fails when NANOMAYE_BROWSER=required."""
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    try:
        from playwright.sync_api import sync_playwright
        missing = None if path else 'no chromium, chromium-browser or google-chrome on the PATH'
    except ImportError:
        missing = 'playwright is not installed'
    if missing:
        (pytest.fail if os.environ.get('NANOMAYE_BROWSER') == 'required' else pytest.skip)(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-gpu'])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """visit(path, **context options) -> the open page. At the end: no request but the file, no error, no dialog."""
    contexts, trouble = [], []

    def visit(path, fragment='', **options):
        context = browser.new_context(**({'viewport': {'width': 1400, 'height': 900}} | options))
        contexts.append(context)
        context.set_offline(True)
        url, tab = path.as_uri(), context.new_page()
        tab.set_default_timeout(5_000)
        tab.on('request', lambda request: request.url.split('#')[0] == url or request.url.startswith('data:')
               or trouble.append(request.url[:200]))
        tab.on('console', lambda message: trouble.append(message.text))
        tab.on('pageerror', lambda error: trouble.append(str(error)))
        tab.on('dialog', lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        tab.goto(url + fragment)
        tab.trouble = trouble
        return tab

    yield visit
    for context in contexts:
        assert all(tab.evaluate('window.__pwned') is None for tab in context.pages)
        context.close()
    assert trouble == []


def panel(**more):
    rl = {'name': 'RL', 'role': 'rl', 'x': [0, 1, 2], 'mean': [0.25, 0.5, 0.925], 'sd': [0.01, None, 0.005],
          'runs': [{'name': 'one', 'y': [0.24, 0.5, 0.92]}, {'name': 'two', 'y': [0.26, None, 0.93]}]}
    sft = {'name': 'SFT', 'role': 'sft', 'x': [0, 2], 'mean': [0.25, 0.75], 'sd': [None, None], 'runs': []}
    base = {'name': 'untrained', 'role': 'base', 'x': [0], 'mean': [0.254], 'sd': [None], 'runs': []}
    return {'title': 'validation', 'x': 'epoch', 'y': 'accuracy', 'percent': True, 'series': [rl, sft, base]} | more


@pytest.fixture(scope='module')
def ordinary(tmp_path_factory):
    """a page of two runs: ten problems, each at steps 1 to 4, right from step 3 on, and two candidate aha moments."""
    folder = tmp_path_factory.mktemp('ordinary')
    noise(84, 84).save(folder / 'p.png')
    runs = []
    for run in ('one', 'two'):
        rows = [sample(f'p{i}', step, f'{run} step {step}: 20' + r' Wait. \boxed{20}' * (i < 3), step > 2,
                       image=str(folder / ('p.png' if i else 'gone.png')), split='train' if i < 8 else 'test',
                       setting='pass@8' if i > 7 else '')
                for step in range(1, 5) for i in range(10)]
        runs.append((run, 'rl', write_run(folder / run, rows)))
    weak, strong = r'x = 7. 😀 Wait. The sum is 20. \boxed{20}', r'It is \boxed{12}. Wait, no. So \boxed{20}.'
    with open(folder / 'one' / 'samples.jsonl', 'a') as file:
        for row in (sample('p1', 3, weak), sample('p2', 2, strong), sample('p3', 2, 'x', False, error='timeout')):
            file.write(json.dumps(row) + '\n')
    samples, notes = read_samples(runs, 1000, folder)
    write_page(folder / 'index.html', {
        'title': 'Two runs', 'notes': notes, 'samples': samples, 'configs': [{'run': 'one', 'text': 'seed = 0'}],
        'figures': [{'title': 'Evaluation', 'caption': 'why',
                     'panels': [panel(), *(panel(title=f'word {i}', percent=False) for i in range(14))]}],
        'tables': [{'title': 'Wide', 'columns': [f'column {i}' for i in range(30)], 'rows': [['1.5'] * 30]}]})
    return folder / 'index.html'


def position(tab):
    return tab.locator('#position').inner_text().split(' (')[0]


def test_filters_show_the_right_samples(visit, ordinary):
    tab = visit(ordinary)
    assert position(tab) == '1 of 83'
    for name, value, count in [
            ('run', 'two', 40), ('split', 'test', 16), ('setting', 'none', 67), ('verdict', 'wrong', 41),
            ('verdict', 'right', 42), ('verdict', 'judge error', 1), ('reflection', 'with', 26),
            ('reflection', 'without', 57)]:
        tab.locator(f'select[name={name}]').select_option(label=value)
        assert position(tab) == f'1 of {count}', (name, value)
        tab.locator('#reset').click()
    for name, value, count in [
            ('from', '4', 20), ('to', '1', 20), ('id', 'P9', 8), ('search', 'TWO STEP 3', 10), ('search', 'nowhere', 0)]:
        tab.locator(f'input[name={name}]').fill(value)
        assert position(tab) == f'{min(count, 1)} of {count}', (name, value)
        tab.locator('#reset').click()
    tab.locator('select[name=run]').select_option(label='two')
    tab.locator('input[name=search]').fill('step 2')
    tab.locator('select[name=reflection]').select_option(label='with')
    assert position(tab) == '1 of 3' and tab.locator('#response').inner_text() == r'two step 2: 20 Wait. \boxed{20}'
    assert tab.locator('.item').count() == 3 and tab.locator('.item').first.inner_text().startswith('✗ wrong p0')


def test_a_sample_is_chosen_by_click_button_key_and_address(visit, ordinary):
    tab = visit(ordinary)
    tab.locator('.item').nth(2).click()
    assert position(tab) == '3 of 83' and tab.locator('#question').inner_text() == 'Find p2.'
    assert tab.locator('#sample img').evaluate('image => [image.naturalWidth, image.naturalHeight]') == [84, 84]
    facts = tab.locator('#sample dl').inner_text().split('\n')
    assert dict(zip(facts[::2], facts[1::2])) | {'picture': ''} == {
        'run': 'one', 'split': 'train', 'step': '1', 'score': '1', 'reward accuracy': '0', 'length': '12 tokens',
        'finish reason': 'stop', 'picture': '', 'line of samples.jsonl': '3'}
    for key, at in [('j', 4), ('n', 5), ('k', 4), ('p', 3), ('ArrowDown', 4), ('ArrowUp', 3)]:
        tab.keyboard.press(key)
        assert position(tab) == f'{at} of 83', key
    tab.locator('#next').click()
    assert position(tab) == '4 of 83' and tab.url.endswith('#sample=3')
    tab.locator('#previous').click()
    tab.keyboard.press('/')
    tab.keyboard.type('njpk')                                   # typed, not obeyed
    assert tab.locator('[name=search]').input_value() == 'njpk' and position(tab) == '0 of 0'
    tab.locator('[name=search]').fill('')
    tab.keyboard.press('Escape')
    tab.keyboard.press('j')
    assert position(tab) == '2 of 83'
    for _ in range(90):
        tab.keyboard.press('j')
    assert position(tab) == '83 of 83' and tab.locator('#next').is_disabled()
    assert tab.locator('.item[aria-selected=true]').inner_text().startswith('✓ right p9')
    other = visit(ordinary, '#sample=82')                       # the last of run two: p9 at step 4
    assert position(other) == '83 of 83' and other.locator('#question').inner_text() == 'Find p9.'
    tab.evaluate('location.hash = "#sample=0"')
    tab.locator('#position', has_text=re.compile('^1 of 83')).wait_for()
    assert re.fullmatch('No picture: .*gone.png, no such file', tab.locator('.placeholder').inner_text())


def test_candidate_aha_moments_are_listed_strongest_first_and_marked(visit, ordinary):
    tab = visit(ordinary)
    assert tab.locator('#aha').inner_text() == 'Candidate aha moments (2)'
    tab.locator('#aha').click()
    assert [text.split('\n')[-1] for text in tab.locator('.item').all_inner_texts()] == \
        ['12 → 20 (strength 4, Wait), step 2', '7 → 20 (strength 1, Wait), step 3']
    tab.locator('.item').nth(1).click()
    assert tab.locator('#response').inner_text() == r'x = 7. 😀 Wait. The sum is 20. \boxed{20}'
    marks = tab.locator('#response mark').evaluate_all('marks => marks.map(mark => [mark.className, mark.textContent])')
    assert marks == [['word aha', 'Wait'], ['box', r'\boxed{20}']]
    tab.locator('#aha').click()
    assert tab.locator('#position').inner_text().endswith('of 83')


def test_one_problem_is_followed_over_the_steps(visit, ordinary):
    tab = visit(ordinary)
    tab.locator('select[name=verdict]').select_option(label='wrong')
    tab.locator('.item').nth(5).click()
    tab.get_by_role('button', name='in this run (4)').click()
    assert tab.locator('#strip .step').all_inner_texts() == [f'step {i}\n{glyph}' for i, glyph in enumerate('✗✗✓✓', 1)]
    assert position(tab) == '1 of 4' and tab.locator('#question').inner_text() == 'Find p5.'
    tab.locator('#strip .step button').nth(2).click()
    assert position(tab) == '3 of 4' and tab.locator('#response').inner_text() == 'one step 3: 20'
    tab.get_by_role('button', name='in all runs (8)').click()
    assert tab.locator('#strip .row').count() == 2 and position(tab).endswith(' of 8')
    tab.keyboard.press('Escape')
    tab.keyboard.press('Escape')
    assert tab.locator('#strip').is_hidden() and position(tab).endswith(' of 41')     # the filters from before


def test_hover_touch_and_keys_show_the_numbers_of_the_data(visit, ordinary):
    tab = visit(ordinary)
    plot, tip = tab.locator('.plot svg').first, tab.locator('.plot .tip').first
    box = plot.bounding_box()
    tab.mouse.move(box['x'] + box['width'] * 0.96, box['y'] + 50)
    assert tip.inner_text().split('\n') == ['epoch 2', 'RL 92.5% ± 0.5', 'one 92.0%, two 93.0%', 'SFT 75.0%',
                                            'untrained 25.4%']
    tab.mouse.move(box['x'] + box['width'] * 0.5, box['y'] + 50)
    assert tip.inner_text().split('\n')[:4] == ['epoch 1', 'RL 50.0%', 'one 50.0%, two none', 'SFT 25.0% (at 0)']
    tab.mouse.move(0, 0)
    assert tip.is_hidden()
    plot.focus()
    tab.keyboard.press('ArrowLeft')
    assert tip.inner_text().startswith('epoch 0\nRL 25.0% ± 1.0')
    assert plot.locator('.mean').count() == 3 and plot.locator('.single').count() == 2
    assert plot.locator('text').all_text_contents() == ['0%', '50%', '100%', '0', '1', '2', 'epoch']
    assert tab.locator('.legend').first.inner_text().startswith('RL')
    phone = visit(ordinary, viewport={'width': 390, 'height': 844}, has_touch=True, is_mobile=True)
    phone.locator('.plot svg').first.tap(position={'x': 340, 'y': 60})
    assert phone.locator('.plot .tip').first.inner_text().startswith('epoch 2\nRL 92.5%')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_phone_has_no_sideways_scroll_and_opens_the_detail_over_the_list(visit, ordinary, scheme):
    tab = visit(ordinary, viewport={'width': 390, 'height': 844}, has_touch=True, is_mobile=True, color_scheme=scheme)
    fits = 'document.documentElement.scrollWidth <= innerWidth && innerWidth === 390'
    assert tab.evaluate(fits) and tab.locator('#detail').is_hidden()
    tab.locator('.item').nth(1).tap()
    assert tab.locator('#detail').bounding_box() == {'x': 0, 'y': 0, 'width': 390, 'height': 844} and tab.evaluate(fits)
    tab.locator('#next').tap()
    assert position(tab) == '3 of 83'
    tab.locator('#back').tap()
    assert tab.locator('#detail').is_hidden() and tab.locator('#list').is_visible()


def test_text_and_marks_have_contrast_in_light_and_dark(visit, ordinary):
    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r'\d+', color)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]    # WCAG 2's relative luminance
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for scheme in ('light', 'dark'):
        tab = visit(ordinary, color_scheme=scheme)
        tab.locator('#aha').click()
        tab.locator('.plot svg').first.focus()
        tab.keyboard.press('ArrowLeft')
        for selector in ('body', '.muted', '.right', 'mark.box', 'mark.word', 'mark.aha', 'nav a', '.item .muted', '#aha',
                         'dt', '.tip .muted'):
            ink, paper = tab.locator(selector).first.evaluate("""node => {
                const clear = node => getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)";
                let behind = node;
                while (clear(behind)) behind = behind.parentElement;
                return [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor] }""")
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector, ink, paper)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text_is_shown_and_never_run(visit, tmp_path, text):
    row = sample(text, question=text, answer=text, response=text + r' Wait \boxed{20}', split=text, setting=text, error=text,
                 finish_reason=text, image=text, rewards={text: 1.0})
    samples, notes = read_samples([(text, 'rl', write_run(tmp_path / 'run', [row, row]))], 100)
    series = {'name': text, 'role': text, 'x': [0, 1], 'mean': [1, 2], 'sd': [None, 0.1],
              'runs': [{'name': text, 'y': [1, 2]}]}
    write_page(tmp_path / 'index.html', {
        'title': text, 'notes': [text], 'samples': samples, 'configs': [{'run': text, 'text': text}],
        'tables': [{'id': text, 'title': text, 'caption': text, 'columns': [text], 'rows': [[text, text]]}],
        'figures': [{'id': text, 'title': text, 'caption': text,
                     'panels': [panel(), panel(title=text, x=text, y=text, series=[series])]}]})
    tab = visit(tmp_path / 'index.html')
    tab.locator('.item').nth(1).click()
    tab.locator('summary').click()
    tab.locator('.plot svg').nth(1).focus()
    tab.keyboard.press('ArrowLeft')
    tab.locator('select[name=run]').select_option(label=text)
    for selector in ('#title', '#notes li', 'figcaption', 'figure h4 >> nth=1', 'th', 'td >> nth=0', 'td >> nth=1', 'summary',
                     'pre', '#question', '#answer', '#tables h3', 'figure .legend span >> nth=3',
                     '.plot svg >> nth=1 >> text >> nth=-1'):
        assert tab.locator(selector).first.text_content() == text, selector
    assert tab.title() == text and tab.locator('#response').text_content() == text + r' Wait \boxed{20}'
    assert tab.locator('dd').all_text_contents().count(text) == 6       # run, split, setting, finish reason, error, picture
    assert tab.locator('dt').nth(5).text_content() == 'reward ' + text and text in tab.locator('.placeholder').text_content()
    assert tab.locator('.tip').nth(1).text_content().count(text) == 3
    assert text in tab.locator('.item').first.text_content()
    tab.get_by_role('button', name='in this run').click()
    assert tab.locator('#strip b').text_content() == text and position(tab) == '2 of 2'
    assert tab.locator('script').count() == 2 and tab.locator('img, iframe, object, [onerror], [onload]').count() == 0


def test_the_policy_refuses_any_other_script_style_and_request(visit, ordinary):
    tab, failures = visit(ordinary), {}
    tab.on('requestfailed', lambda request: failures.update({request.url: request.failure}))
    tab.evaluate("""() => {
        const script = document.createElement("script"); script.textContent = "window.__other = 1";
        document.body.append(script);
        document.body.setAttribute("onclick", "window.__other = 1"); document.body.click();
        const image = new Image(); image.src = "https://example.com/x.png"; document.body.append(image);
        return fetch("https://example.com/").catch(() => 0) }""")
    assert tab.evaluate('window.__other') is None
    refused = [text for text in tab.trouble if 'Content Security Policy' in text]
    assert all(any(f'{kind}-src' in text for text in refused) for kind in ('script', 'img', 'connect', 'default')), refused
    assert set(tab.trouble) - set(refused) <= set(failures) and set(failures.values()) <= {'csp'}, (tab.trouble, failures)
    tab.trouble.clear()


def test_control_and_bidi_characters_stay_in_their_place(visit, tmp_path):
    text = '\x00\x1b[31m \u202eabc\r\n\ud800 Wait'
    samples, _ = read_samples([('one', 'rl', write_run(tmp_path, [sample('a', response=text)]))], 10)
    write_page(tmp_path / 'index.html', {'samples': samples})
    tab = visit(tmp_path / 'index.html')
    assert tab.locator('#response').text_content() in ('␀␛[31m \u202eabc␍\n\ud800 Wait', '␀␛[31m \u202eabc␍\n\ufffd Wait')
    assert tab.locator('#response mark').text_content() == 'Wait'
    assert tab.locator('#response').evaluate('node => getComputedStyle(node).unicodeBidi') == 'plaintext'


def test_pages_that_lack_something_say_so(visit, tmp_path):
    write_page(tmp_path / 'empty.html', {'title': '', 'samples': None})
    tab = visit(tmp_path / 'empty.html')
    text = tab.locator('body').inner_text()
    for words in ('nanoMAYE report', 'No figures', 'No tables', 'No configs', 'No samples: no run has a samples.jsonl'):
        assert words in text
    assert tab.locator('#browse').is_hidden()
    values = [([], []), ([0], [None]), ([0, 1], [0, 0]), ([0, 1], [1e308, -1e308]), ([3], [0.5]), ([0, 1], [1e16, 1e16 + 2])]
    panels = [panel(series=[{'name': 'RL', 'role': 'rl', 'x': x, 'mean': mean}]) for x, mean in values] + [{}]
    samples, _ = read_samples([('one', 'rl', write_run(tmp_path / 'one', [sample('a')]))], 10)
    figures = [{'title': 'Odd', 'panels': panels}, {}]
    write_page(tmp_path / 'odd.html', {'figures': figures, 'tables': [{}], 'samples': samples})
    tab = visit(tmp_path / 'odd.html')
    assert tab.locator('.panel').count() == 7 and tab.locator('.panel').filter(has_text='No values').count() == 4
    assert position(tab) == '1 of 1' and 'NaN' not in tab.locator('main').inner_html()


def test_five_thousand_samples_and_pictures_fit_and_filter_fast(visit, tmp_path):
    rng, rows = np.random.default_rng(0), []
    words = 'the side of triangle ABC is therefore equal to the sum so we add and wait verify angle 12 35 7x+4'.split()
    for i in range(5000):
        shapes = np.full((84, 84, 3), 255, np.uint8)
        shapes[i % 60:i % 60 + 12, rng.integers(60):][:, :20] = rng.integers(0, 256, (1, 1, 3))
        shapes[20:50, 30:60] = rng.integers(0, 256, (30, 30, 1))                # a patch that does not compress
        Image.fromarray(shapes).save(tmp_path / f'{i}.png', compress_level=1)
        text = ' '.join(rng.choice(words, 120)) + rf' \boxed{{{i}}}'
        rows.append(sample(f'problem-{i % 1250}', i // 1250, text, bool(i % 3), image=str(tmp_path / f'{i}.png'),
                           split=('train', 'test')[i % 2]))
    samples, notes = read_samples([('one', 'rl', write_run(tmp_path / 'one', rows))], 5000, tmp_path)
    assert len(samples['rows']) == len(set(samples['images'].values())) == 5000 and notes == []
    write_page(tmp_path / 'index.html', {'samples': samples})
    size = os.path.getsize(tmp_path / 'index.html')
    tab = visit(tmp_path / 'index.html')
    assert position(tab) == '1 of 5,000' and tab.locator('.item').count() < 40
    timings = tab.evaluate("""async () => {
        const painted = () => new Promise(done => requestAnimationFrame(() => {     // a message after the frame is drawn
            const channel = new MessageChannel(); channel.port1.onmessage = done; channel.port2.postMessage(0); }));
        const form = document.querySelector("form.filters").elements, timings = [];
        const tries = [["search", "triangle"], ["search", "boxed{49"], ["search", ""], ["verdict", "=right"], ["verdict", ""],
                       ["split", "=test"], ["split", ""], ["reflection", "=without"], ["reflection", ""], ["from", "2"],
                       ["from", ""], ["id", "99"], ["id", ""]];
        for (let round = 0; round < 3; round++) for (const [name, value] of tries) {
            await painted();
            const start = performance.now();
            form[name].value = value;
            form[name].dispatchEvent(new Event("input", { bubbles: true }));
            await painted();
            timings.push(performance.now() - start);
        }
        return timings }""")
    print(f'5,000 samples and pictures: {size / 1e6:.1f} MB; filter to painted list: median '
          f'{statistics.median(timings):.0f} ms, longest {max(timings):.0f} ms of {len(timings)}')
    assert size < 30_000_000
    assert statistics.median(timings) < 200
    tab.locator('#list').evaluate('list => list.scrollTop = list.scrollHeight')
    tab.locator('#item-4999').wait_for()
