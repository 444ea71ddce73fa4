"""The toy: small geometry problems in the manner of Geometry3K, drawn with Pillow, without a network.

    python -m toy.draw     # data/toy: train, val, test, hard (vision-dominant) and text_* (text-dominant)

A picture has 84 x 84 pixels, 9 image tokens. The numbers stand in it and the text names the figure; in text_*
the question has the numbers too. A picture's numbers, sorted, are its tuple; a hash puts a tuple of three or
more into one split, whatever the family. (11+5=16 is a fact, not a tuple: all facts are practised, since so
small a model knows the sums that it was shown and no others.) What is new in each split:
  train  six families; every stage of the base draws from these tuples too, the reading drills included
  val    the same families, layouts and wordings; the tuples were in no training of any kind
  test   new tuples in four families that no stage has shown. quadrilateral: a new figure, four numbers;
         closed: a triangle asked as a path; spokes: a new figure and question; vertical: a known question,
         standing up. (The train family loose has numbers in any cells, so the places alone are not new.)
  hard   test's families, its tuples too, and the first number has two digits. Each sum on the way is a fact
         that the base was shown, but in training such a number came first only where one had to subtract.
"""
import json
import os
import random
import shutil
import uuid
import zlib
from collections import namedtuple

from PIL import Image, ImageDraw, ImageFont

SIDE = 84  # pixels
MIDDLES = (14, 42, 70)  # of cells of patch 14 x merge 2 = 28 pixels: one image token sees a whole number
SIZES = {"train": 4096, "val": 240, "test": 240, "hard": 240}
TRAIN_FAMILIES = ("triangle", "segment", "part", "area", "path", "loose")
TEST_FAMILIES = ("quadrilateral", "vertical", "spokes", "closed")
LETTERS = ("ABCDE", "PQRST", "KLMNO", "UVWXY")  # a picture's corners have the first letters of one of these
NUMBER_FONT, LETTER_FONT = ImageFont.load_default(15), ImageFont.load_default(10)  # embedded in Pillow
CONCLUSION = "The answer is \\boxed{{{}}}."  # .format(answer)
Equation = namedtuple("Equation", "x op y result")  # op: '+', '-' or '*'


# ---- numbers and solutions
def split_of(numbers):
    """'train', 'val' or 'test' (60, 20, 20%) by a hash of the sorted numbers; a fact is always 'train'."""
    if len(numbers) < 3:  # a fact
        return "train"
    bucket = zlib.crc32(",".join(map(str, sorted(numbers))).encode()) % 10
    return "val" if bucket < 2 else "test" if bucket < 4 else "train"


def draw_numbers(family, rng):
    """The numbers of one problem in reading order: row by row, from left to right."""
    if family == "area":
        return [rng.randint(2, 9), rng.randint(2, 6), rng.randint(2, 6)]  # height, the two parts of the base
    if family == "part":
        first, second, missing = (rng.randint(2, 9) for _ in range(3))
        return [first + second + missing, first, second]  # the whole, two of its three parts
    if family == "loose":
        count = rng.randint(3, 4)
    else:
        count = 4 if family in ("path", "quadrilateral") else 3
    return [rng.randint(2, 9) for _ in range(count)]


def calculate(x, op, y):
    """The Equation with its right result."""
    return Equation(x, op, y, {"+": x + y, "-": x - y, "*": x * y}[op])


def steps(family, numbers):
    """The Equations from the numbers, in reading order, to the answer: the result of the last one."""
    if family == "area":
        height, left, right = numbers
        return [calculate(left, "+", right), calculate(left + right, "*", height)]
    op = "-" if family == "part" else "+"
    equations = [calculate(numbers[0], op, numbers[1])]
    for y in numbers[2:]:
        equations.append(calculate(equations[-1].result, op, y))
    return equations


def comma_list(numbers):
    return ", ".join(map(str, numbers))


def write(equations):
    return " ".join(f"{x}{op}{y}={result}." for x, op, y, result in equations)


def solution(family, numbers):
    """The golden solution: `I read 9, 2, 5. 9+2=11. 11+5=16. The answer is \\boxed{16}.`"""
    equations = steps(family, numbers)
    return f"I read {comma_list(numbers)}. {write(equations)} {CONCLUSION.format(equations[-1].result)}"


# ---- pictures; a point is (x, y) in pixels, y downwards
def figure(family, count, rng):
    """(corners, cells, question, strokes, turns) of a picture with count numbers, before it is turned.
    corners: points that get a letter each; cells: points that get a number each; question: {0} stands for
    the first corner's letter; strokes: '0120' are lines from corner 0 to 1, on to 2 and back to 0, a space
    lifts the pen; turns: quarter turns of corners and cells."""
    if family in ("triangle", "closed"):
        asked = "perimeter of triangle {0}{1}{2}" if family == "triangle" else "length of path {0}{1}{2}{0}"
        corners, cells = [(42, 6), (78, 78), (6, 78)], [(14, 42), (70, 42), (42, 70)]
        return corners, cells, f"Find the {asked}.", "0120", rng.randrange(4)
    if family in ("segment", "vertical", "part"):  # three parts in a row, each with its number above it
        y = rng.choice(MIDDLES[1:] if family == "part" else MIDDLES)
        corners, cells = [(x, y + 11) for x in (6, 30, 54, 78)], [(x, y) for x in MIDDLES]
        if family != "part":
            return corners, cells, "Find the length of {0}{3}.", "0123", 1 if family == "vertical" else 0
        missing = rng.choice([0, 2])
        cells[missing] = (42, 14)  # the whole's number above all, instead of this part's
        asked = "{0}{1}" if missing == 0 else "{2}{3}"
        return corners, cells, "The whole is {0}{3}. Find " + asked + ".", "0123", 0
    if family == "area":
        corners = [(30, 6), (78, 6), (78, 56), (30, 56)]
        cells = [(14, rng.choice(MIDDLES[:2])), (42, 70), (70, 70)]
        return corners, cells, "Find the area of rectangle {0}{1}{2}{3}.", "01230", 0
    if family == "path":
        if rng.random() < .5:  # three parts above, one at the side
            corners = [(6, 28), (28, 28), (56, 28), (78, 28), (78, 78)]
            cells = [(14, 14), (42, 14), (70, 14), (70, 42)]
        else:  # one part at the side, three below
            corners = [(6, 6), (6, 56), (28, 56), (56, 56), (78, 56)]
            cells = [(14, 42), (14, 70), (42, 70), (70, 70)]
        return corners, cells, "Find the length of path {0}{1}{2}{3}{4}.", "01234", rng.choice([0, 2])
    if family == "quadrilateral":
        corners, cells = [(6, 6), (78, 6), (78, 78), (6, 78)], [(42, 14), (14, 42), (70, 42), (42, 70)]
        return corners, cells, "Find the length of path {0}{1}{2}{3}{0}.", "01230", 0
    if family == "spokes":
        corners, cells = [(42, 42), (28, 5), (79, 56), (5, 79)], [(42, 14), (14, 70), (70, 70)]
        return corners, cells, "Find {0}{1}+{0}{2}+{0}{3}.", "01 02 03", rng.randrange(4)
    assert family == "loose", family  # numbers in any cells, stray lines
    corners = [(rng.randint(4, 79), rng.randint(4, 79)) for _ in range(rng.randint(2, 5))]
    cells = rng.sample([(x, y) for x in MIDDLES for y in MIDDLES], count)
    return corners, cells, "Add the numbers.", "01234"[:len(corners)], 0


def layout(family, count, rng):
    """(lines, corners, cells, question) of a new picture; lines: pairs of points; cells: in reading order."""
    corners, cells, question, strokes, turns = figure(family, count, rng)
    for _ in range(turns):
        corners, cells = [(SIDE - y, x) for x, y in corners], [(SIDE - y, x) for x, y in cells]
    wobble = 1 if family in ("segment", "vertical", "part") else 3  # a straight line stays nearly straight
    corners = [tuple(min(max(value + rng.randint(-wobble, wobble), 3), SIDE - 4) for value in corner)
               for corner in corners]
    cells = sorted(cells, key=lambda cell: (cell[1], cell[0]))
    lines = []
    for stroke in strokes.split():
        lines += [(corners[int(a)], corners[int(b)]) for a, b in zip(stroke, stroke[1:])]
    if family == "part":  # the whole's measure, above
        lines += [((6, 26), (78, 26)), ((6, 22), (6, 30)), ((78, 22), (78, 30))]
    if family == "area":  # what divides the base
        middle = (corners[0][0] + corners[1][0]) // 2
        lines.append(((middle, corners[0][1]), (middle, corners[3][1])))
    return lines, corners, cells, question


def picture(lines, letters, numbers):
    """An 84 x 84 RGB image. letters, numbers: [(text, (x, y) of its middle)]; a number stands on white."""
    image = Image.new("L", (SIDE, SIDE), 255)
    draw = ImageDraw.Draw(image)
    for start, end in lines:
        draw.line([start, end], fill=170)
    for text, (x, y) in numbers:
        draw.rectangle([x - 9, y - 7, x + 9, y + 7], fill=255)
        draw.text((x, y), text, fill=0, font=NUMBER_FONT, anchor="mm")
    for text, (x, y) in letters:
        inside = min(max(x, 5), SIDE - 6), min(max(y, 5), SIDE - 6)
        draw.text(inside, text, fill=120, font=LETTER_FONT, anchor="mm")
    return image.convert("RGB")


def problem(family, split, rng):
    """(numbers, question, image) of a new problem whose tuple belongs to the split, test's for hard."""
    numbers = []
    while not numbers or split_of(numbers) != ("test" if split == "hard" else split):
        numbers = draw_numbers(family, rng)
        if split == "hard":
            largest = 9 if len(numbers) == 3 else 5  # the sum before the last number is at most 16 + 5 + 5
            numbers = [rng.randint(10, 16), *(rng.randint(2, largest) for _ in numbers[1:])]
    letters = rng.choice(LETTERS)
    lines, corners, cells, question = layout(family, len(numbers), rng)
    image = picture(lines, zip(letters, corners), zip(map(str, numbers), cells))
    return numbers, question.format(*letters), image


# ---- files
def in_text(question, numbers):
    """The text-dominant question: the numbers of the picture too."""
    return f"{question} The labels are {comma_list(numbers)}."


def save_rows(folder, name, rows):
    """Writes [(question, answer, solution, image)] as name.jsonl; an image, or the path of a saved one."""
    os.makedirs(f"{folder}/images", exist_ok=True)
    with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as file:
        for i, (question, answer, text, image) in enumerate(rows):
            if not isinstance(image, str):
                image.save(f"{folder}/images/{name}-{i:06d}.png")
                image = f"images/{name}-{i:06d}.png"
            file.write(json.dumps({"question": "<image>" + question, "answer": str(answer), "solution": text,
                                   "id": f"toy-{name}-{i:06d}", "image": image}) + "\n")


def make_toy(folder):
    """Draws train, val, test, hard and the same as text_* in folder, unless it is there already."""
    if os.path.isdir(folder):
        return
    draft = f"{folder}.{uuid.uuid4().hex}"  # renamed when whole, since several processes may draw at once
    for split, size in SIZES.items():
        families = TEST_FAMILIES if split in ("test", "hard") else TRAIN_FAMILIES
        rng, rows, text_rows = random.Random(f"toy {split}"), [], []
        for i in range(size):
            family = families[i % len(families)]
            numbers, question, image = problem(family, split, rng)
            answer, text = steps(family, numbers)[-1].result, solution(family, numbers)
            rows.append((question, answer, text, image))
            text_rows.append((in_text(question, numbers), answer, text, f"images/{split}-{i:06d}.png"))
        save_rows(draft, split, rows)
        save_rows(draft, f"text_{split}", text_rows)
    try:
        os.rename(draft, folder)
    except OSError:  # another process was first, with the same files
        shutil.rmtree(draft)


if __name__ == "__main__":
    make_toy("data/toy")
