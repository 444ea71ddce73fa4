"""Bad rows and pictures: what a user sees of each, and that nothing else can happen. data.py's docstring has the list."""
import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from test_data import complaint, load, peak_mb, processor, write  # noqa: F401 (processor is a fixture)

IMAGES = "broken, or no JPEG, PNG, WEBP, GIF, BMP"
UNPACKED = "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"
LATEX = "(LaTeX in JSON needs two backslashes)"


def good(**keys):
    """A good row as bytes, with other values for some of its keys."""
    row = dict(question="<image>What is 1+1?", answer="2", solution="It is 2.", id="a", image="a.png") | keys
    return json.dumps(row).encode()


# ---- rows: (the row, its line of output after `rows.jsonl:2: `; FOLDER stands for the folder of the file)
ROWS = {
    "no JSON": (b"{'id': 1}", "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
    "a list": (b"[1]", "not a JSON object but a list"),
    "a number": (b"NaN", "not a JSON object but a float"),
    "two objects": (b"{}{}", "not valid JSON (Extra data, column 3)"),
    "raw control character": (good().replace(b"What", b"\0"), "not valid JSON (Invalid control character at, column 22)"),
    "Latin-1": (b'{"question": "\xe9"}', "not UTF-8 (invalid continuation byte, byte 15)"),
    "deep lists": (b"[" * 100_000, "not valid JSON (nested too deeply)"),
    "deep objects": (b'{"a":' * 100_000, "not valid JSON (nested too deeply)"),
    "long": (good(x="x" * 1_000_000), "longer than 1000000 bytes"),
    "key twice": (good().replace(b'"id"', b'"answer": "3", "id"'),
                  "key 'answer' is there twice"),
    "missing": (dict(answer=None), "no answer"),
    "null": (good(id=None, image=None), "no id; no image"),
    "NaN": (dict(answer=float("nan")), "answer is nan"),
    "Infinity": (dict(answer=float("-inf")), "answer is -inf"),
    "1e400": (good().replace(b'"2"', b"1e400"), "answer is inf"),
    "5000 digits": (good().replace(b'"2"', b"9" * 5000), "answer is inf"),
    "300 digits as id": (good().replace(b'"a"', b"9" * 300), "id is inf"),
    "bool": (dict(answer=True, id=False), "answer is a bool; id is a bool"),
    "float id": (dict(id=1.5), "id is a float"),
    "list": (dict(answer=["2"], question=3), "question is a int; answer is a list"),
    "NaN as solution": (dict(solution=float("nan")), "solution is nan"),
    "surrogates": (dict(question="<image>\ud800", answer="\udfff", id="\udc00"), "question has half of a surrogate pair; "
                   "answer has half of a surrogate pair; id has half of a surrogate pair"),
    "escaped surrogate": (good().replace(b"2.", b"\\ud800."), "solution has half of a surrogate pair"),
    "one backslash": (dict(answer="\frac{1}{2}"), f"answer has a control character, '\\x0c' {LATEX}"),
    "a tab": (dict(answer="\theta"), f"answer has a control character, '\\t' {LATEX}"),
    "NUL in image": (dict(image="a\0.png"), f"image has a control character, '\\x00' {LATEX}"),
    "escape in id": (dict(id="\x1b[2J"), f"id has a control character, '\\x1b' {LATEX}"),
    "form feed behind id": (dict(id="a\f"), f"id has a control character, '\\x0c' {LATEX}"),
    "empty": (dict(answer=" ", id="", image=""), "empty answer; empty id; empty image"),
    "no <image>": (dict(question="What?"), "question must have one <image>, has 0"),
    "two <image>": (dict(question="<image><image>What?"), "question must have one <image>, has 2"),
    "image token": (dict(question="<image>What is <|image_pad|>?"), "special token <|image_pad|> in the text"),
    "two special tokens": (dict(question="What is <|image_pad|><|im_end|>?"), "question must have one <image>, has 0; "
                           "special token <|im_end|> in the text; special token <|image_pad|> in the text"),
    "unreadable": (dict(answer="what?? \\frac{"), "the judge cannot read the answer 'what?? \\\\frac{'"),
    "long prompt": (dict(question="<image>" + "long " * 500), None),
    "absolute": (dict(image="/etc/passwd"), "path '/etc/passwd' leaves the folder of its file"),
    "climbs": (dict(image="../a.png"), "path '../a.png' leaves the folder of its file"),
    "climbs later": (dict(image="x/../../a.png"), "path 'x/../../a.png' leaves the folder of its file"),
    "climbs, Windows": (dict(image="..\\a.png"), "path '..\\\\a.png' leaves the folder of its file"),
    "drive": (dict(image="C:\\a.png"), "path 'C:\\\\a.png' leaves the folder of its file"),
    "drive, relative": (dict(image="c:a.png"), "path 'c:a.png' leaves the folder of its file"),
    "share": (dict(image="\\\\server\\a.png"), "path '\\\\\\\\server\\\\a.png' leaves the folder of its file"),
    "home": (dict(image="~/a.png"), "no image FOLDER/~/a.png"),
    "address": (dict(image="https://a.b/c.png"), "no image FOLDER/https://a.b/c.png"),
    "base64": (dict(image="data:image/png;base64," + "A" * 9000), None),
}


@pytest.mark.parametrize("case", ROWS)
def test_what_a_user_sees_of_a_bad_row(tmp_path, processor, case):  # noqa: F811
    row, line = ROWS[case]
    path = write(tmp_path, [{}, row, dict(id="fine")])
    message = complaint(path, processor)
    title, _, seen = message.partition("\n")
    assert title == f"{path}: 1 of 3 rows are bad, mend or remove them:"
    if case == "long prompt":
        assert seen.startswith(f"{path}:2: the prompt has ")
        assert seen.endswith(" tokens, over max_prompt_tokens=2000: raise it, or lower max_pixels")
    elif case == "base64":
        assert seen == f"{path}:2: no image {tmp_path}/data:image/png;base64,{'A' * 9000}"[:len(f"{path}:2: no image ") + 300]
    else:
        assert seen == f"{path}:2: {line.replace('FOLDER', str(tmp_path))}"
        assert seen.isprintable()


def test_bad_rows_are_named_together_but_at_most_twenty(tmp_path, processor):  # noqa: F811
    cases = [ROWS[case] for case in list(ROWS)[:20]]
    path = write(tmp_path, [{}, *(row for row, _ in cases), dict(id="fine")])
    assert complaint(path, processor).split("\n") == [
        f"{path}: 20 of 22 rows are bad, mend or remove them:",
        *(f"{path}:{i}: {line}" for i, (_, line) in enumerate(cases, start=2))]
    many = write(tmp_path, [dict(answer="")] * 33)
    assert complaint(many, processor).endswith(f"{many}:20: empty answer\n... and 13 more")


def test_files_that_are_no_rows_at_all(tmp_path, processor, monkeypatch):  # noqa: F811
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n\r\n \n", b"\xef\xbb\xbf\n"):
        path.write_bytes(content)
        assert complaint(str(path), processor) == f"{path}: the file has no rows"
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        path.write_bytes((good().decode() + "\n").encode(encoding) if encoding != "utf-16-be" else
                         b"\xfe\xff" + good().decode().encode(encoding))
        message = complaint(str(path), processor)
        assert message == f"{path}:1: the file is in UTF-16, save it as UTF-8" or encoding == "utf-32"
    write(tmp_path, [])
    path.write_bytes(b"[\r\n" + good() + b"\r\n]\r\n")
    assert "2 of 3 rows are bad" in complaint(str(path), processor)
    path.unlink()
    path.mkdir()
    assert complaint(str(path), processor) == f"{path}: no such file; give the path of a jsonl file"
    path = write(tmp_path, [{}], "mine.jsonl")
    monkeypatch.setattr(os, "access", lambda *_: False)  # to root, chmod forbids nothing
    assert complaint(path, processor) == f"{path}: cannot be read, its permissions forbid it"


def test_byte_order_marks_crlf_and_unused_keys_are_taken(tmp_path, processor):  # noqa: F811
    rows = [b"\xef\xbb\xbf" + good(id=1, answer=12, question="<image>\u4e2d\u6587 \U0001f600\u2028 Fu\u0308r?"), b"",
            b"\xef\xbb\xbf" + good(id=2, answer=-2.5, x=float("nan"), y=[{"id": 1}, {"id": "\ud800"}]),
            good(id=3, answer="\\frac{1}{2}\n").replace(b'"id"', b'"n": ' + b"9" * 5000 + b', "id"')]
    path = write(tmp_path, [row + b"\r" for row in rows])
    dataset = load(path, processor)
    assert [(s.id, s.answer) for s in dataset.samples] == [("1", "12"), ("2", "-2.5"), ("3", "\\frac{1}{2}")]
    assert dataset.lines == [1, 3, 4] and dataset.samples[0].question == "<image>\u4e2d\u6587 \U0001f600\u2028 Fu\u0308r?"


def test_a_line_without_end_needs_little_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(good() + b"\n")
        file.truncate(1_000_000_000)  # a hole: zeros that take no disk
        file.seek(0, 2)
        file.write(b"\n" + good())
    code = ("import re, sys, data; print([(n, len(line)) for n, line in data.read_rows(sys.argv[1])]);"
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])")
    lines, peak = run_python(code, path)
    assert lines == str([(1, len(good()) + 1), (2, 1_000_001), (3, len(good()))])
    assert int(peak) / 1024 < 100


def run_python(code, *arguments):
    """The lines that a process of its own prints."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_many_keys_do_not_cost_the_square_of_their_number():
    start = time.monotonic()
    with pytest.raises(ValueError, match="key '59999' is there twice"):
        data.parse_row(json.dumps(dict.fromkeys(range(60_000), 1)).replace("}", ', "59999": 1}').encode(), "", False, [])
    assert time.monotonic() - start < 5  # 0.1 s on one core; the square takes minutes


# ---- pictures

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width=28, height=28, bits=8, color=2, row=b"\0" + b"\x12" * 84, extra=b""):
    """The bytes of a PNG that Pillow would not write."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)) + extra
            + chunk(b"IDAT", zlib.compress(row * min(height, 30))) + chunk(b"IEND", b""))


def encoded(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 84, 3), dtype=np.uint8))
PACKED = zlib.compress(bytes(50_000_000))
CANNOT = "image FOLDER/bad.png cannot be read "
PICTURES = {  # the file's bytes, its line of output
    "missing": (None, "no image FOLDER/bad.png"),
    "zero bytes": (b"", "image FOLDER/bad.png is empty, 0 bytes"),
    "text": (b"<html>404</html>", f"{CANNOT}({IMAGES})"),
    "only a signature": (b"\x89PNG\r\n\x1a\n nothing more", CANNOT + "(Truncated File Read)"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:2000], CANNOT + "(image file is truncated (N bytes not processed))"),
    "truncated PNG": (encoded(NOISE, "PNG")[:9000], CANNOT + "(image file is truncated)"),
    "truncated GIF": (encoded(NOISE, "GIF")[:3000], CANNOT + "(image file is truncated (N bytes not processed))"),
    "truncated WEBP": (encoded(NOISE, "WEBP")[:1000], CANNOT + "(could not create decoder object)"),
    "truncated BMP": (encoded(NOISE, "BMP")[:9000], CANNOT + "(image file is truncated (N bytes not processed))"),
    "no width": (png(width=0), f"{CANNOT}({IMAGES})"),
    "TIFF": (encoded(NOISE, "TIFF"), f"{CANNOT}({IMAGES})"),
    "EPS": (encoded(NOISE, "EPS"), f"{CANNOT}({IMAGES})"),
    "PDF": (encoded(NOISE, "PDF"), f"{CANNOT}({IMAGES})"),
    "PPM": (encoded(NOISE, "PPM"), f"{CANNOT}({IMAGES})"),
    "ICO": (encoded(NOISE, "ICO"), f"{CANNOT}({IMAGES})"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', f"{CANNOT}({IMAGES})"),
    "PSD": (b"8BPS\0\1" + bytes(40), f"{CANNOT}({IMAGES})"),
    "201:1": (encoded(Image.new("L", (2010, 10)), "PNG"), "the image is too long and thin, 2010x10, at most 200:1"),
    "1:201": (encoded(Image.new("L", (10, 2010)), "PNG"), "the image is too long and thin, 10x2010, at most 200:1"),
    "bomb, all there": (encoded(Image.new("1", (20_000, 6000)), "PNG"),
                        CANNOT + "(20000x6000, more than 100 million pixels)"),
    "bomb, declared": (png(width=65_000, height=65_000), CANNOT + "(Image size (4225000000 pixels) exceeds limit of "
                       "200000000 pixels, could be decompression bomb DOS attack.)"),
    "bomb, GIF": (b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;", CANNOT + "(Image size "
                  "(4294836225 pixels) exceeds limit of 200000000 pixels, could be decompression bomb DOS attack.)"),
    "declared, not there": (png(width=9000, height=9000), CANNOT + "(image file is truncated (N bytes not processed))"),
    "bomb, zTXt": (png(extra=chunk(b"zTXt", b"a\0\0" + PACKED)), f"{CANNOT}({UNPACKED})"),
    "bomb, iTXt": (png(extra=chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)), f"{CANNOT}({UNPACKED})"),
    "bomb, iCCP": (png(extra=chunk(b"iCCP", b"a\0\0" + PACKED)), f"{CANNOT}({UNPACKED})"),
    "bomb, late": (png()[:-12] + chunk(b"zTXt", b"a\0\0" + PACKED) + png()[-12:], f"{CANNOT}({UNPACKED})"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest drops the filter that images.py sets
@pytest.mark.parametrize("case", PICTURES)
def test_what_a_user_sees_of_a_bad_picture(tmp_path, processor, case):  # noqa: F811
    content, line = PICTURES[case]
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    path = write(tmp_path, [{}, dict(image="bad.png")])
    seen = re.sub(r"\(\d+ bytes not", "(N bytes not", complaint(path, processor))  # how many is up to the decoder's buffers
    assert seen == (f"{path}: 1 of 2 rows are bad, mend or remove them:\n"
                    f"{path}:2: {line.replace('FOLDER', str(tmp_path))}")


def test_folders_pipes_and_devices_are_no_images_and_are_not_waited_for(tmp_path, processor):  # noqa: F811
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to("nothing")
    (tmp_path / "itself.png").symlink_to("itself.png")
    names = ["folder.png", "pipe.png", "zero.png", "nowhere.png", "itself.png", "."]
    path, seen = write(tmp_path, [dict(image=name) for name in names]), []
    thread = threading.Thread(target=lambda: seen.append(complaint(path, processor)), daemon=True)
    thread.start()
    thread.join(60)
    assert seen and seen[0].split("\n")[1:] == [f"{path}:{i}: no image {tmp_path}/{name}" for i, name in enumerate(names, 1)]


def test_links_are_followed_also_out_of_the_folder(tmp_path, processor):  # noqa: F811
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    Image.new("RGB", (84, 84)).save(tmp_path / "disk" / "b.png")
    (tmp_path / "here" / "images").symlink_to("../disk")
    (tmp_path / "here" / "b.png").symlink_to(tmp_path / "disk" / "b.png")
    rows = [dict(image="images/b.png"), dict(image="b.png"), dict(image="x/../b.png"), dict(image="./images/../a.png")]
    write(tmp_path / "here", rows[:2])
    (tmp_path / "link").symlink_to("here")
    assert len(load(str(tmp_path / "link" / "rows.jsonl"), processor)) == 2


def exif(orientation, late=b""):
    """EXIF of an orientation, as a camera would write it; late: bytes that are no EXIF, behind it."""
    return b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0" + struct.pack("<H", orientation) + b"\0\0\0\0\0\0" + late


def drawn(mode="RGB"):
    """112x56, the left upper quarter red, the rest white."""
    image = Image.new("RGB", (112, 56), "white")
    image.paste("red", (0, 0, 56, 28))
    return image.convert(mode)


BLUE = Image.new("RGB", (112, 56), "blue")
GOOD = {  # pictures that are shown as drawn() shows, whatever they are
    "palette": encoded(drawn("P"), "PNG"), "RGBA": encoded(drawn("RGBA"), "PNG"),
    "CMYK": encoded(drawn("CMYK"), "JPEG", quality=95),
    "animated GIF": encoded(drawn(), "GIF", save_all=True, append_images=[BLUE]),
    "animated PNG": encoded(drawn(), "PNG", save_all=True, append_images=[BLUE]),
    "animated WEBP": encoded(drawn(), "WEBP", save_all=True, append_images=[BLUE], lossless=True),
    "two JPEGs in one": encoded(drawn(), "MPO", save_all=True, append_images=[BLUE], quality=95),
    "BMP": encoded(drawn(), "BMP"), "progressive": encoded(drawn(), "JPEG", progressive=True, quality=95),
    "no end": encoded(drawn(), "PNG")[:-12],  # the pixels are all there
    "EXIF 1": encoded(drawn(), "JPEG", exif=exif(1), quality=95),
    "EXIF 0": encoded(drawn(), "JPEG", exif=exif(0), quality=95),
    "EXIF 99": encoded(drawn(), "JPEG", exif=exif(99), quality=95),
    "no EXIF but says so": encoded(drawn(), "JPEG", exif=b"Exif\0\0nonsense", quality=95),
    "no EXIF in PNG": encoded(drawn(), "PNG", exif=b"nonsense"),
    "EXIF ends early": encoded(drawn(), "PNG", exif=b"II*\0\xff\xff\xff\xff"),
}
for number, how in {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
                    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
                    8: Image.Transpose.ROTATE_270}.items():  # drawn as a camera would have that was turned so
    for kind in ("JPEG", "PNG", "WEBP"):
        GOOD[f"EXIF {number} {kind}"] = encoded(drawn().transpose(how), kind, exif=exif(number), quality=95)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("case", GOOD)
def test_every_kind_of_picture_is_shown_upright_in_rgb(tmp_path, case):
    (tmp_path / "any.name").write_bytes(GOOD[case])
    assert data.check_image(str(tmp_path / "any.name")) == (112, 56)
    image = data.read_image(tmp_path / "any.name", 28, 784, 10**6)
    assert image.mode == "RGB" and image.size == (112, 56)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(drawn())).mean() < 3


TRANSPARENT = {  # each is 28x28 and shows nothing
    "LA": encoded(Image.new("LA", (28, 28), (9, 0)), "PNG"),
    "RGBA": encoded(Image.new("RGBA", (28, 28), (9, 9, 9, 0)), "WEBP"),
    "1 bit": png(bits=1, color=0, row=bytes(5), extra=chunk(b"tRNS", b"\0\0")),
    "8 bits": png(color=0, row=b"\0" + b"\x12" * 28, extra=chunk(b"tRNS", b"\0\x12")),
    "RGB": png(extra=chunk(b"tRNS", b"\0\x12" * 3)),
    "palette": png(color=3, row=b"\0" + b"\1" * 28, extra=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\xff\0")),
}


@pytest.mark.parametrize("case", TRANSPARENT)
def test_transparent_parts_are_white(tmp_path, case):
    (tmp_path / "a").write_bytes(TRANSPARENT[case])
    assert data.check_image(str(tmp_path / "a")) == (28, 28)
    assert np.asarray(data.read_image(tmp_path / "a", 28, 784, 10**6)).min() == 255


def test_16_bit_grey_is_scaled_also_where_a_grey_is_called_transparent(tmp_path):
    for extra in (b"", chunk(b"tRNS", b"\x12\x34")):  # Pillow shows no transparency of these
        (tmp_path / "a").write_bytes(png(bits=16, color=0, row=b"\0" + b"\x12\x34" * 28, extra=extra))
        assert (np.asarray(data.read_image(tmp_path / "a", 28, 784, 10**6)) == 18).all()


def test_the_smallest_and_the_longest_pictures_are_taken(tmp_path, processor):  # noqa: F811
    rows = []
    for i, size in enumerate([(1, 1), (1, 200), (2000, 10), (28, 5600), (28 * 200, 28)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        rows.append(dict(image=f"{i}.png"))
    dataset = load(write(tmp_path, rows), processor)
    for i in range(len(rows)):
        width, height = dataset.inputs(i).image.size
        assert 56 * 56 <= width * height <= 256 * 28 * 28


@pytest.mark.parametrize("name, limit", [("a.jpg", 60), ("a.png", 190)])  # MB; measured 43 and 142
def test_30_million_pixels_need_the_memory_that_is_said(tmp_path, name, limit):
    Image.new("RGB", (6000, 5000), "red").save(tmp_path / name)
    Image.new("RGB", (60, 50)).save(tmp_path / f"small{name}")
    assert peak_mb(tmp_path / name) - peak_mb(tmp_path / f"small{name}") < limit


# ---- warnings

def test_what_is_there_twice_is_warned_of_with_counts(tmp_path, processor, capsys):  # noqa: F811
    for name, shade in dict(b=1, c=2).items():
        Image.new("RGB", (84, 84), (shade, 0, 0)).save(tmp_path / f"{name}.png")
    train = write(tmp_path, [dict(id=1), "", dict(id="1", image="b.png"), dict(id="1"), dict(id="\u00e9"),
                             dict(id="\u00e9", question="<image>What is \frac 12?")], "train.jsonl")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    test = write(tmp_path, [dict(image="copy.png"), dict(question="<image>What is   1+1?\n"), dict(image="c.png"),
                            dict(question="<image>And this?")], "test.jsonl")
    sound = write(tmp_path, [dict(image="c.png"), dict(image="c.png", question="<image>Other?")], "val.jsonl")
    sets = {name: load(path, processor) for name, path in dict(train=train, validation=sound, test=test).items()}
    data.print_warnings(sets)
    shared = "they share seeds in sampling, and count as one problem in the report's browser"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {train}: 3 of 5 rows have the id of an earlier row (first line 3: '1' as on line 1); {shared}",
        f"warning: {train}: 1 of 5 rows have a control character in question or solution (first line 6: '\\x0c'); "
        "LaTeX in JSON needs two backslashes",
        "warning: 2 of 4 problems of test are also in train (same image and question); accuracy on test counts them",
        "warning: 1 of 4 problems of test have an image of train with another question"]
    data.print_warnings({"train": sets["validation"], "test": sets["train"]})
    assert capsys.readouterr().out.count("\n") == 2
    data.print_warnings({"validation": sets["validation"]})
    data.print_warnings({"train": sets["validation"]})
    assert capsys.readouterr().out == ""


# ---- fuzzing: whatever comes is a Sample or a ValueError, a size or a text

def check_row(line):
    try:
        sample = data.parse_row(line, "folder", False, ["<|im_end|>"])
    except ValueError:
        return
    assert isinstance(sample, data.Sample) and all(isinstance(value, str) for value in sample)
    json.dumps(sample._asdict(), ensure_ascii=False).encode("utf-8")
    assert sample.id.strip() and sample.answer and sample.question.count("<image>") == 1
    assert os.path.abspath(sample.image).startswith(os.path.abspath("folder") + os.sep) or sample.image == "folder/."


TEXTS = st.sampled_from(["2", "<image>", "a.png", "../a", "\ud800", "<|im_end|>"]) | st.text()
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
                      lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)


@settings(deadline=None, max_examples=300)
@given(st.binary())
@example(b"\xef\xbb\xbf{}")
@example(b'{"id":"\\ud83d"}')
def test_any_bytes_are_a_row_or_a_value_error(line):
    check_row(line)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(list(data.KINDS)), VALUES), st.booleans())
def test_any_values_are_a_row_or_a_value_error(keys, raw):
    row = dict(question="<image>What?", answer="2", id="a", image="a.png") | keys
    with contextlib.suppress(UnicodeEncodeError):
        check_row(json.dumps(row, ensure_ascii=not raw).encode("utf-8"))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 100), st.sampled_from([*range(256), None])), max_size=4))
def test_a_good_row_with_bytes_changed_is_a_row_or_a_value_error(changes):
    line = bytearray(good())
    for at, byte in changes:
        line[at % len(line):at % len(line) + 1] = [] if byte is None else [byte]
    check_row(bytes(line))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"\xef\xbb\xbf", b" ", b"{}", b"x" * 50, b"\0", b"\xc3"])))
def test_reading_keeps_every_line_that_is_not_blank_with_its_number(tmp_path_factory, pieces):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content := b"".join(pieces))
    wanted = []
    for i, line in enumerate(content.split(b"\n"), start=1):  # the slow way
        line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
        if line.strip():
            wanted.append((i, line[:60]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MAX_ROW", 10**6)
        assert [(i, line.rstrip(b"\n")[:60]) for i, line in data.read_rows(path)] == wanted
        patch.setattr(data, "MAX_ROW", 60)  # long lines are cut, their numbers stay
        assert [i for i, _ in data.read_rows(path)] == [i for i, _ in wanted]
        assert all(len(line) <= 61 for _, line in data.read_rows(path))


@settings(deadline=None, max_examples=1000)
@given(st.integers(1, 10**5), st.integers(1, 10**5), st.sampled_from([14, 28, 32]), st.integers(1, 10**6),
       st.integers(0, 10**7))
def test_any_size_becomes_one_that_fits_and_stays(width, height, factor, low, more):
    high = low + more
    try:
        w, h = data.final_size(width, height, factor, low, high)
    except ValueError as error:
        assert max(width, height) > 200 * min(width, height) or high < 4 * max(low, factor**2) or "200:1" in str(error)
        return
    assert low <= w * h <= high and w % factor == h % factor == 0 and min(w, h) > 0
    assert data.final_size(w, h, factor, low, high) == (w, h)


SMALL = NOISE.resize((40, 30))
SEEDS = [encoded(SMALL.convert(mode), kind) for mode, kind in (
    ("RGB", "JPEG"), ("RGB", "PNG"), ("RGB", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP"), ("L", "PNG"), ("LA", "PNG"),
    ("P", "PNG"), ("I;16", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("P", "BMP"))]
SEEDS += [encoded(SMALL, "JPEG", progressive=True, exif=exif(6, bytes(40))), GOOD["animated GIF"], GOOD["animated PNG"],
          GOOD["EXIF 5 WEBP"], GOOD["two JPEGs in one"], TRANSPARENT["palette"], TRANSPARENT["8 bits"]]


def mend(content):
    """A PNG with the check sums of its chunks set right, so that what was changed in them is read."""
    out, at = bytearray(content), 8
    while content.startswith(b"\x89PNG") and at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        out[end:end + 4] = struct.pack(">I", zlib.crc32(content[at + 4:end])) if end + 4 <= len(content) else out[end:end + 4]
        at = end + 4
    return bytes(out)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=500)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6),
       st.integers(0, 10**4), st.booleans(), st.booleans())
def test_any_damage_gives_a_size_or_a_text_and_what_is_taken_can_be_read(tmp_path_factory, content, changes, keep, cut,
                                                                           early):
    damaged = bytearray(content)
    for at, byte in changes:
        damaged[at % (min(len(damaged), 120) if early else len(damaged))] = byte  # early: in the headers
    path = tmp_path_factory.getbasetemp() / "fuzz.image"
    path.write_bytes(mend(bytes(damaged[:keep % len(damaged)] if cut else damaged)))
    start = time.monotonic()
    size = data.check_image(str(path))
    if isinstance(size, str):
        assert size.startswith(f"image {path} ") and "\n" not in size
    else:
        with contextlib.suppress(ValueError):
            final = data.final_size(*size, 28, 784, 10**6)
            assert final == data.read_image(path, 28, 784, 10**6).size
    assert time.monotonic() - start < 10
