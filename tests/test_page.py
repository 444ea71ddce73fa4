"""The report's page: what Python puts on it, and what Chromium, offline, makes of the file."""
import base64
import io
import json
import math
import os
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from report import page
from report.figures import series
from report.page import read_samples, write_page
from report.scheme import Run

HOSTILE = ("<script>__pwned=1</script><img src=x onerror='__pwned=1'></script><script>__pwned=1</script><!--"
           "\"><svg onload=__pwned=1> {{data}}{{policy}} ${__pwned=1} \u2028\u202e😀&amp;")


def sample(id, step=1, response=r"16+4=20. \boxed{20}", correct=True, **more):
    return {"step": step, "split": "train", "id": id, "images": [], "question": f"Find {id}.", "answer": "20",
            "response": response, "correct": correct, "rewards": {"accuracy": 1.0}, "length": 12} | more


def a_run(folder, rows, name="one"):
    folder.mkdir(exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(name, "rl", str(folder), "", [], [])


def draw_page(folder, runs, **report):
    samples, images, notes = read_samples(runs, 1000, str(folder))
    empty = {"title": "toy", "notes": notes, "figures": [], "tables": [], "configs": []}
    write_page(folder / "index.html", empty | report | {"samples": samples, "images": images})
    return folder / "index.html"


def test_a_cap_keeps_whole_problems_and_first_those_with_an_aha_moment(tmp_path):
    rows = [sample(f"p{i}", step) for step in range(5) for i in range(40)]
    rows += [sample("aha", 9, r"16+4=21. Wait, 16+4=20. \boxed{20}")]
    kept = []
    for order in (rows, rows[::-1]):
        shown, _, notes = read_samples([a_run(tmp_path, order)], 83, ".")
        ids = [row["id"] for row in shown]
        assert "aha" in ids and {ids.count(i) for i in set(ids) - {"aha"}} == {5}
        assert len(ids) == 81 and notes[0].startswith("samples: 81 of 201 are in the page")
        kept.append(set(ids))
    assert kept[0] == kept[1] and not kept[0] >= {f"p{i}" for i in range(14)}  # not the first ones


def test_old_rows_new_rows_and_odd_rows_are_read(tmp_path):
    new = sample("new", image="b.png", images=["b.png", "c.png"])
    old = {key: value for key, value in sample("old", image="a.png").items() if key != "images"}
    odd = {"response": 5, "step": "1", "id": 7, "images": "x", "correct": 1, "score": math.nan, "rewards": 1}
    runs = [a_run(tmp_path, [old, new, sample("none"), odd]), a_run(tmp_path / "empty", [], "two")]
    shown, images, notes = read_samples(runs, 10, ".")
    assert [row["images"] for row in shown] == [["a.png"], ["b.png", "c.png"], [], []]
    assert images == dict.fromkeys(("a.png", "b.png", "c.png"), "no such file") and "3 of 3" in notes[1]
    assert [shown[3][key] for key in ("id", "step", "correct", "score")] == ["7", None, None, None]
    assert shown[3]["rewards"] == {} and notes[0] == "no samples.jsonl, so no samples on the page, of two"


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_pictures_are_made_small_and_come_only_from_the_folder(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    noise(30, 30).save(tmp_path / "private.png")
    noise(900, 1200).save(inside / "large.png")
    noise(50, 84).save(inside / "small.png")
    (inside / "broken.png").write_bytes((inside / "small.png").read_bytes()[:200])
    os.symlink(tmp_path / "private.png", inside / "link.png")
    os.mkfifo(inside / "pipe.png")
    names = [f"{inside}/{name}.png" for name in (
        "small", "large", "broken", "gone", "pipe", "\0", "\ud800", "link", "../private")]
    run = a_run(tmp_path / "one", [sample("p", images=names), sample("q", images=names[:1])])
    _, images, notes = read_samples([run], 10, str(inside))
    assert [re.sub(r"[,:].*", "", url) for url in images.values()] == [
        "data", "data", "cannot be read", *["no such file"] * 4, *["outside the folder of images"] * 2]
    assert "7 of 9 are not shown" in notes[0] and len(images[names[1]]) < 80_000
    small = Image.open(io.BytesIO(base64.b64decode(images[names[0]].split(",")[1]))).convert("RGB")
    assert np.array_equal(np.asarray(small), np.asarray(noise(50, 84)))  # pixel for pixel
    monkeypatch.setattr(page, "IMAGE_BYTES", len(images[names[0]]))
    assert read_samples([run], 10, str(inside))[1][names[1]] == "left out, too many pictures"


@pytest.fixture(scope="module")
def browser():
    """Chromium, one for all tests; they skip where there is none, but fail when NANOMAYE_BROWSER=required."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if os.environ.get("NANOMAYE_BROWSER") != "required" and not (path and find_spec("playwright")):
        pytest.skip("no playwright, or no chromium, chromium-browser or google-chrome on the PATH")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """visit(path, **options) -> the open page. At the end: no request but the file, no error, nothing run."""
    trouble = []

    def visit(path, fragment="", **options):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1400, "height": 900}, **options})
        url, tab = path.as_uri(), context.new_page()
        tab.set_default_timeout(5_000)
        tab.on("request", lambda request: request.url.split("#")[0] == url or request.url.startswith("data:")
               or trouble.append(request.url[:200]))
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.goto(url + fragment)
        tab.trouble = trouble
        return tab

    yield visit
    for context in browser.contexts:
        assert all(tab.evaluate("window.__pwned") is None for tab in context.pages)
        context.close()
    assert trouble == []


def figure(text):
    curve = series(text, "rl", {"one": {0: 0.24, 1: 0.5, 2: 0.92}, text: {0: 0.26, 1: None, 2: 0.93}})
    panel = {"title": text, "x": "epoch", "y": "accuracy", "percent": True, "series": [curve]}
    return {"id": "x", "title": text, "caption": text, "panels": [panel]}


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """Two runs of ten problems at four steps, one with pictures, one with a candidate aha moment."""
    folder = tmp_path_factory.mktemp("page")
    for name, size in (("a", (60, 60)), ("b", (40, 80))):
        noise(*size).save(folder / f"{name}.png")
    rows = [sample(f"p{i}", step, f"step {step}: {'yet ' * (i < 5)}\\boxed{{20}}", (i + step) % 2 == 0)
            for step in range(1, 5) for i in range(10)]
    rows[0] |= {"images": [f"{folder}/a.png", f"{folder}/b.png", f"{folder}/gone.png"]}
    more = [*rows[1:], sample("p9", 5, r"x = 7. 😀 Wait. The sum is 20. \boxed{20}", split="test")]
    runs = [a_run(folder / "one", rows), a_run(folder / "two", more, "two")]
    return draw_page(folder, runs, figures=[figure("RL")])


def position(tab):
    return tab.locator("#position").inner_text().split(" (")[0]


def test_filters_and_keys_go_through_the_samples_and_all_their_pictures(visit, ordinary):
    tab = visit(ordinary)
    for name, value, count in (("run", "one", 40), ("split", "test", 1), ("verdict", "right", 41),
                               ("verdict", "wrong", 39), ("reflection", "with", 40)):
        tab.locator(f"select[name={name}]").select_option(label=value)
        assert position(tab).split(" of ")[1] == str(count)
        tab.locator(f"select[name={name}]").select_option(label="all")
    for name, value, count in (("from", "4", 21), ("id", "P9", 9), ("search", "STEP 2: y", 10)):
        tab.locator(f"[name={name}]").fill(value)
        assert position(tab).split(" of ")[1] == str(count)
        tab.locator(f"[name={name}]").fill("")
    tab.locator("#list").evaluate("list => list.scrollTop = 0")
    tab.locator(".item").first.click()
    pictures = tab.locator("#sample .pictures > *")
    sizes = pictures.evaluate_all("all => all.map(image => [image.naturalWidth, image.naturalHeight])")
    assert sizes[:2] == [[60, 60], [80, 40]] and tab.locator(".item").first.locator("img").count() == 1
    assert pictures.count() == 3 and pictures.nth(2).inner_text().endswith("gone.png, no such file")
    tab.locator("#next").click()
    tab.keyboard.press("j")
    assert position(tab) == "3 of 80" and tab.locator("#question").inner_text() == "Find p2."
    tab.keyboard.press("k")
    tab.locator("#previous").click()
    assert position(tab) == "1 of 80"
    tab.keyboard.press("/")
    tab.keyboard.type("nj")  # typed, not obeyed
    assert tab.locator("[name=search]").input_value() == "nj" and position(tab) == "0 of 0"
    other = visit(ordinary, "#sample=79")
    assert position(other) == "80 of 80" and other.locator("#next").is_disabled()


def test_aha_moments_are_listed_and_marked_and_a_problem_is_followed_over_the_steps(visit, ordinary):
    tab = visit(ordinary)
    tab.locator("#aha").click()
    assert tab.locator(".item").inner_text().endswith("7 → 20 (Wait), step 5")
    assert tab.locator("#response mark").all_inner_texts() == ["Wait", r"\boxed{20}"]
    assert tab.locator("#response mark").first.get_attribute("class") == "word aha"
    tab.locator("#aha").click()
    tab.locator("select[name=run]").select_option(label="one")
    tab.locator(".item").nth(5).click()
    tab.get_by_role("button", name="in this run (4)").click()
    assert [text[-1] for text in tab.locator("#strip .step").all_inner_texts()] == list("✓✗✓✗")
    tab.locator("#strip .step button").nth(2).click()
    assert position(tab) == "3 of 4" and tab.locator("#response").inner_text() == r"step 3: \boxed{20}"
    tab.get_by_role("button", name="Stop following").click()
    assert tab.locator("#strip").is_hidden() and position(tab).endswith(" of 40")  # the filters from before
    tab.locator(".plot svg").first.hover(position={"x": 400, "y": 50})  # the numbers of a curve
    tip = tab.locator(".plot .tip").first.inner_text().split("\n")
    assert tip == ["epoch 2", "RL 92.5% ± 0.7", "one 92.0%, RL 93.0%"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll_and_text_has_contrast(visit, ordinary, scheme):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    tab = visit(ordinary, color_scheme=scheme, **phone)
    fits = "document.documentElement.scrollWidth <= innerWidth && innerWidth === 390"
    assert tab.evaluate(fits) and tab.locator("#detail").is_hidden()
    tab.locator("#aha").tap()
    tab.locator(".item").first.tap()
    covers = {"x": 0, "y": 0, "width": 390, "height": 844}
    assert tab.locator("#detail").bounding_box() == covers and tab.evaluate(fits)

    def luminance(color):  # WCAG 2's
        parts = np.array(re.findall(r"\d+", color)[:3], dtype=float) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for selector in ("body", ".muted", "#sample .right", "mark.box", "mark[class=word]", "nav a"):
        ink, paper = tab.locator(selector).first.evaluate("""node => {
            const paper = node => getComputedStyle(node).backgroundColor;
            let behind = node;
            while (paper(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(node).color, paper(behind)] }""")
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, ink, paper)


def test_hostile_text_is_shown_and_never_run(visit, tmp_path, text=HOSTILE):
    texts = dict.fromkeys(("question", "answer", "split", "setting", "error", "finish_reason"), text)
    row = sample(text, 1, text + r" Wait \boxed{20}", images=[text], **texts) | {"rewards": {text: 1.0}}
    table = {"title": text, "caption": text, "columns": [text], "rows": [[text, text]]}
    config = {"run": text, "text": text}
    tab = visit(draw_page(tmp_path, [a_run(tmp_path, [row, row], text)], title=text, notes=[text],
                          tables=[table], configs=[config], figures=[figure(text)]))
    tab.locator(".plot svg").first.focus()
    tab.keyboard.press("ArrowLeft")
    for selector in "#title,#notes li,figcaption,h4,th,td,summary,pre,#question,#answer,#tables p".split(","):
        assert tab.locator(selector).first.text_content() == text, selector
    assert tab.locator("#response").text_content() == text + r" Wait \boxed{20}"
    assert tab.locator("dd").all_text_contents().count(text) == 6
    assert text in tab.locator(".placeholder").text_content() and text in tab.locator(".tip").text_content()
    tab.get_by_role("button", name="in this run (2)").click()
    assert tab.locator("#strip b").text_content() == text
    assert tab.locator("script").count() == 2 and tab.locator("img, iframe, [onerror], [onload]").count() == 0


def test_an_empty_page_says_so_and_its_policy_refuses_any_other_script_and_request(visit, tmp_path):
    tab = visit(draw_page(tmp_path, []))
    text = tab.locator("body").inner_text()
    assert "No figures" in text and "No tables" in text and "No samples: no run has" in text
    tab.evaluate("""() => {
        const script = document.createElement("script"), image = new Image();
        script.textContent = "__pwned = 1"; image.src = "https://example.com/x.png";
        document.body.append(script, image);
        return fetch("https://example.com/").catch(() => 0) }""")
    refused = " ".join(text for text in tab.trouble if "Content Security Policy" in text)
    assert all(f"{kind}-src" in refused for kind in ("script", "img", "connect")), tab.trouble
    tab.trouble.clear()
