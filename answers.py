r"""
Whether two answers to a mathematical problem are one: compare(gold, box, formulas), on LaTeX, unicode or prose.

Three stages: clean brings all spellings to one; structure and value find lists, intervals, the side of an equation and the
words around a number; compare decides by exact arithmetic on plain numbers, letter by letter on words, and hands formulas
to its caller, who lets compare_formulas (math-verify) look at them in a process that can be killed (reward.py).

What counts as right, beside equal values written differently:
1. Units, degree signs, currency, `x =` in front and words around the one value are ignored; two known units must agree.
2. When one of the two is written as a decimal, |box - gold| < min(0.01, |gold| / 10) will do. 0.01 is the paper's code;
   the second term is ours, for golds under 0.1: 0 and -0.004 lie within 0.01 of 0.005. Without a decimal on either
   side only equal values are right.
3. 17% is right for 17 and for 0.17; for a gold under 1 only the fraction is: 0.5 takes 50%, not 0.5%.
4. Lists and sets in any order, points and intervals in theirs. A list where one number is asked is wrong.
5. A letter A to E in any of the usual wrappings; other words letter by letter, whatever their case.
"""
import re
import unicodedata
from fractions import Fraction

MAX_CHARS = 400         # of an answer; a longer one is none
MAX_DEPTH = 10          # of brackets in brackets; the deepest of 3,016 real answers has 3, and parsers take exponential time
MAX_ITEMS = 10          # of a list; pairing up is quadratic


class Unreadable(ValueError):
    """a text that is no number, formula or word."""


# -----------------------------------------------------------------------------
# one spelling for LaTeX, unicode and prose. Words end up in quotes: 12\,\text{cm}^2 and 12 cm² both become 12 "cm"

CHARS = {"×": r"\times ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
         "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "⟨": "(", "⟩": ")", "∶": ":",
         "\f": r"\f", "\b": r"\b", "\v": r"\v"}         # \frac, unescaped in somebody's JSON, is a form feed and rac
CHARS |= dict.fromkeys("−–—‐‑", "-") | dict.fromkeys("⋅·∙", r"\cdot ") | dict.fromkeys("°º˚", r"^\circ ")
CHARS |= dict.fromkeys("“”\"`€£¥¢\u200b", "") | dict.fromkeys("∠△", " ")
CHARS |= {c: rf"\{name} " for c, name in
          zip("αβγδθλμρφω", "alpha beta gamma delta theta lambda mu rho phi omega".split())}
CHARS |= {c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {c: f"_{{{i}}}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
CHARS |= {c: rf"\frac{{{a}}}{{{b}}}" for c, (a, b) in
          zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅛⅜⅝⅞", "12 13 23 14 34 15 25 35 45 16 18 38 58 78".split())}
CHARS = str.maketrans(CHARS)

# unit -> its one name, to tell two different ones apart; powers, and words that are not here, are not compared
UNITS = dict(mm="millimeter", cm="centimeter", dm="decimeter", m="meter", km="kilometer", ft="foot", feet="foot",
             yd="yard", mi="mile", inches="inch", deg="degree", rad="radian", g="gram", kg="kilogram", s="second",
             sec="second", min="minute", mins="minute", h="hour", hr="hour", hrs="hour") | {"in": "inch"}
UNITS |= {form: name for name in set(UNITS.values()) for singular in (name, name.replace("meter", "metre"))
          for form in (singular, singular + "s")}
FUNCTIONS = set("sqrt sin cos tan cot csc arcsin arccos arctan ln log exp pi frac infty cdot times".split())
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SCALES = dict(hundred=2, thousand=3, million=6, billion=9)
# words that change what the number next to them says: with one of these a text is not its number
CHANGES = set("""not no cannot never neither none more less least most greater fewer over under than between to through
                 from except half third quarter twice double dozen minus plus times negative root undefined""".split())
SHORT = set("is are the an of and or at if by all any yes so as ml mg mph kmh kph am pm sq cu usd eur th nd rd".split())
SHORT |= UNITS.keys() | CHANGES | set(NUMBERS)


def _words(text):
    """text as quoted words, lower case unless it is one letter; what an `and` or `or` joins becomes items of a list."""
    text = text.strip(" ~.,:;").replace('"', "")
    return f' "{text}" ' if len(text) == 1 else ' "%s" ' % re.sub(r"\b(and|or)\b", '" , "', text.lower())


def _text(match):
    r"""what \text{...} or its like says: words, or a formula if there are digits or commands in it."""
    font, text = match[1], match[2].strip(" ~")
    if text.lower() in FUNCTIONS:
        return f"\\{text.lower()} "
    if len(text) == 1 and font.startswith("math"):      # 12 \mathrm{~m} is metres, \mathrm{m} = 3 is not
        return _words(text) if text in UNITS and re.search(r"[\d}]\s*$", match.string[:match.start()]) else text
    return f" {text} " if re.search(r"[\d\\]", text) or not re.search(r"\w", text) else _words(text)


def _bare(match):
    r"""a token outside \text: sqrt gets its backslash; units and English become words; x, AB and \pi stay."""
    token = match.group()
    if token[0] in '"\\' or len(token) == 1 or token.endswith("matrix"):
        return token
    if token.lower() in FUNCTIONS:
        return f"\\{token.lower()} "
    return _words(token) if token.lower() in SHORT or (len(token) > 3 and not token.isupper()) else token


BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"                          # {...} with up to two more inside
FONTS = r"fbox|text\w*|math(?:rm|bf|it|sf|tt)|mbox|hbox|boldsymbol|bm|operatorname\*?|underline|emph"
TEXT = (rf"\\({FONTS})\s*{BRACED}", _text)
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\t(?=ext|frac|imes|heta|an\b)", r"\\t"),                                 # unescaped, as \f above
    (r"\\\\(?=[A-Za-z])(?!\\begin|\\end)", r"\\"),                              # escaped twice
    (r"^\s*\*\*|\*\*[\s.]*$|\\!|\\[()\[\]]|\\?\$", ""),                         # **bold**, $math$
    (r"\*\*", "^"), (r"\*", r"\\cdot "), (r"\\%", "%"),
    (r"\\(left|right|[bB]igg?[lrm]?|displaystyle|textstyle|[lL]arge|small|bf|rm|it)(?![A-Za-z])", " "),
    (r"\\(begin|end)\s*\{(aligned|align\*?|equation\*?|gathered)\}|\\(text)?color\s*\{[a-z]+\}", " "),
    (r"\\(quad|qquad|angle|triangle|checkmark)(?![A-Za-z])|(?<!\\)\\[,;:> ]|[~\s]", " "),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\{\s*([,:])\s*\}", r"\1"), (r"\\colon(?![a-z])", ":"),
    (r"\\(\{|lbrace)", "«"), (r"\\(\}|rbrace)", "»"), (r"\\langle", "("), (r"\\rangle", ")"),       # «a set»
    (r"<=|\\leq?(slant)?(?![a-z])", r"\\le "), (r">=|\\geq?(slant)?(?![a-z])", r"\\ge "),
    (r"\\not\s*=|\\neq?(?![a-z])", r"\\ne "), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    # degrees are a unit like others, but not in a sine
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*)([\d.]+)\s*\^\s*(\{\s*\\circ\s*\}|\\circ)",
     r"\1{(\2\\frac{\\pi}{180})}"),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ)|\\degrees?(?![a-z])|(?<=\d)\s*\^\s*(\{o\}|o\b)", ' "degree" '),
    TEXT, TEXT, TEXT,                                                           # \textbf{\text{...}}, outside first
    (r"(?<=[\d.])[eE]([+-]?\d{1,3})(?![\d.])", r"\\times 10^{\1}"),             # 1.2e5
    (r'"[^"]*"|\\[A-Za-z]+|[A-Za-z]+', _bare),
    (r"(?<=[\d}])(?:\s+([ghslL])|\s*(m))(?=[\s.,;]*$|\s*\^\s*\{?[23])", r' "\1\2" '),           # 12 m, 12m^2
    (r'\{\s*("[^"]*")\s*\}', r" \1 "),                                          # 69{degrees}
    (r'("[^"]*")\s*\^\s*(\{\s*-?\d\s*\}|-?\d)', r"\1 "),                        # cm^2
    (r'\\frac\s*"[^"]*"\s*"[^"]*"|"[^"]*"\s*/\s*("[^"]*"|[a-z]\b)', ' "per" '), # m/s
    (r'"degree"\s*[CF]\b', '"degree"'),
    (r'"\s*(is )?to\s*"(?=\s*\d)', ":"),                                        # 1 to 2 is a ratio
    (r'"([^"]*)"', lambda m: str(NUMBERS.index(m[1])) if m[1] in NUMBERS else m[0]),
    (rf'"({"|".join(SCALES)})\b([^"]*)"', lambda m: rf'\times 10^{{{SCALES[m[1]]}}} "{m[2]}"'),
    (r'"percent(age)?\b[^"]*"', "%"), (r'"\s*"', " "),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])", lambda m: m[0].replace(" ", "")),               # 1\,000
    (r"\s+", " "), (r"^[ ;:,]+|[ .;:,\\]+$", "")]]


def clean(raw):
    """raw in the spelling that the rest of this file reads. Raises Unreadable when too long or deep for an answer, or
    empty."""
    if len(raw) > MAX_CHARS or _depth(raw) > MAX_DEPTH:
        raise Unreadable("too long or deep")
    text = unicodedata.normalize("NFKC", re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", raw).translate(CHARS))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not text:
        raise Unreadable("empty")
    return text


# -----------------------------------------------------------------------------
# structure: lists, points and intervals; the sides of an equation; the words around a value

EQUALS = r"(?<![<>!])=(?!=)"
ORDER = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")


def _split(text, separator):
    """text cut at the separators (a regex) outside all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf'"[^"]*"|([(\[{{«])|([)\]}}»])|(?P<cut>{separator})', text):
        if match[1] or match[2]:
            depth += 1 if match[1] else -1
        elif match["cut"] and depth == 0:
            parts, start = parts + [text[start:match.start()].strip()], match.end()
    return parts + [text[start:].strip()]


def structure(text, thousands=True):
    """('one', [text]), ('list', items), or ('(]', items) with the outer brackets of a point or an interval.
    text is cleaned; thousands: 1,000 in it is one number, not a list of two."""
    names = r"^[^,«(\[]*\\in(?![a-z])\s*|^[^=]*=\s*(?=[(\[«][^=]*,[^=]*[)\]»]$)|^[A-Z](?=\([^()]*,[^()]*\)$)"
    text = re.sub(names, "", text) or text  # x \in [1, 2), (x, y) = (3, 4), P(3, 4)
    bracketed = text[0] in "([«" and text[-1] in ")]»" and _closes(text)
    if thousands and not bracketed:
        text = re.sub(r"(?<![\d.,])\d{1,3}(,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    parts = [part for part in _split(text[1:-1] if bracketed else text, r"[,;]|\\cup(?![a-z])") if part.strip(' "')]
    said = [part for part in parts if not re.fullmatch(r'"[^"]*"', part) or CHANGES & set(re.findall("[a-z]+", part))]
    parts = said or parts                   # 12, "as shown"
    if bracketed and text[0] != "«":
        return (text[0] + text[-1], parts) if len(parts) > 1 else ("one", [text])
    if len(parts) == 1 and parts[0].count(r"\pm") == 1:
        parts = [parts[0].replace(r"\pm", sign) for sign in "+-"]
    return ("list" if len(parts) > 1 else "one"), parts or [text]


def _depth(text):
    """how many brackets are open at most."""
    depth = deepest = 0
    for char in text:
        depth = max(0, depth + (char in "([{") - (char in ")]}"))
        deepest = max(deepest, depth)
    return deepest


def _closes(text):
    """whether the bracket that text opens with is closed by its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{«") - (char in ")]}»")
        if depth == 0:
            return i == len(text) - 1
    return False


def value(text):
    """(formula, unit) of one cleaned item: the last side of an equation, without the words around it.
    Words alone, and numbers in words that change them, come back in quotes."""
    sides = _split(text, EQUALS)
    text = next((side for side in reversed(sides) if side and not re.fullmatch("[A-Za-z]", side)), sides[-1])   # 20 = x
    sides = [side for side in _split(text, r"\\approx(?![a-z])|\\simeq") if side]
    if sides:               # 5\sqrt{3} \approx 8.66: the first side that is a number, which is the exact one
        letters = [re.search(r"[A-Za-z]", re.sub(r'\\[A-Za-z]+|"[^"]*"', "", side)) for side in sides]
        text = next((side for side, letter in zip(sides, letters) if not letter), sides[-1])
    text = re.sub(r'\(\s*("[^"]*")\s*\)', r" \1 ", text)
    words = set(re.findall(r"[a-z]+", " ".join(re.findall(r'"([^"]*)"', text)).lower()))
    rest = re.sub(r'("[^"]*"[\s.:]*)+$', "", re.sub(r'^("[^"]*"[\s:]*)+', "", text)).rstrip(" .:")
    if words <= UNITS.keys():
        rest = re.sub(r'"[^"]*"', "", rest)                             # 180^\circ - 30^\circ
    if '"' in text and (not rest or '"' in rest or words & CHANGES):
        if re.search(r"[\\_^{}]", text):
            raise Unreadable(text)          # neither a formula nor words
        return '"' + re.sub(r"[^\w%$+-]+", " ", text).casefold().strip() + '"', ""
    return rest, next((UNITS[word] for word in sorted(words) if word in UNITS), "")


def _is_name(side):
    r"""whether this left side of an equation only names what follows: x, AB, x_1, m\angle ABC, f(x), "area"."""
    # each character can be read in one way only, or this would take exponential time on hostile text
    name = re.fullmatch(r'([A-Za-z0-9|()\s\',"{}]|_|\\[A-Za-z]+(?![A-Za-z]))+', side)
    value = re.search(r"\\(frac|sqrt|sin|cos|tan|log|ln|pi)|\d[A-Za-z(]", side)
    return bool(name and re.match(r'\W*[A-Za-z\\"]', side) and not value)


# -----------------------------------------------------------------------------
# comparing

DIGITS = r"(?:\d+\.?\d*|\.\d+)"
PLAIN = re.compile(rf"""(?P<sign> [+-]?) \ ? (?:
    (?P<whole> \d+) (?: \ ? \\frac\{{(?P<a>\d+)\}}\{{(?P<b>\d+)\}} | \ (?P<c>\d+)\ ?/\ ?(?P<d>\d+) )            # 2 1/3
    | \\frac\{{(?P<e>-?{DIGITS})\}}\{{(?P<f>-?{DIGITS})\}} | (?P<g>{DIGITS}) \ ?[/:]\ ? (?P<h>{DIGITS})   # 1/3, 1:3
    | (?P<n>{DIGITS}) (?: \ ?\\(?:times|cdot)\ ?10\ ?\^\ ?\{{?\ ?(?P<power>[+-]?\d{{1,3}})\ ?\}}? )?
    | (?P<head>\d+)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\ ?\{{?(?P<period>\d+)\}}? )""", re.VERBOSE)     # 0.333...


def plain(text):
    """text as a Fraction if it is a plain number, else None. int() and Fraction() see at most MAX_CHARS digits."""
    text = re.sub(r"\\frac ?(?:\{ ?([^{} ]*) ?\}|(\d)) ?(?:\{ ?([^{} ]*) ?\}|(\d))",
                  lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)              # \frac12, \frac 1 {2}
    match = PLAIN.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    top = Fraction(part["a"] or part["c"] or part["e"] or part["g"] or part["n"] or 0)
    bottom = Fraction(part["b"] or part["d"] or part["f"] or part["h"] or 1)
    if bottom == 0 or (part["whole"] and top >= bottom):        # 2\frac{3}{2} is a product, if anything
        return None
    number = int(part["whole"] or 0) + top / bottom * Fraction(10) ** int(part["power"] or 0)
    if part["period"]:
        tail = Fraction(int(part["period"]), 10 ** len(part["period"]) - 1)
        number = (int(part["head"] + part["fixed"]) + tail) / 10 ** len(part["fixed"])
    return -number if part["sign"] == "-" else number


OPTION = r'["(\[\s]*(?:(?:the )?(?:option|choice|answer)(?: is)?["\s:(]*)?([A-Ea-e])'


def compare(gold, box, formulas):
    """whether the box says what the gold answer says. Raises Unreadable when one of the two makes no sense.
    formulas(gold, box, decimal) -> bool is asked about what is more than numbers and words."""
    gold, box = clean(gold), clean(box)
    letter = re.fullmatch(r'["(\[\s]*([A-Ea-e])[")\]\s.:]*', gold)
    if letter:              # (B), B., "option b", B. 12
        found = re.match(OPTION + r'(?:[")\]\s.:]*$|["\s]*[).:]|"\s*(?=[\d\\]))', box)
        return bool(found) and found[1].upper() == letter[1].upper()
    box = re.sub(r'^["(\s]*[A-E]["\s]*[).:]+["\s]*(?=\S)|^"[A-E]"\s*(?=[\d\\])', "", box)      # B. 12 where 12 is asked
    readings = (True, False) if "," in gold + box else (True,)
    return any(_compare(structure(gold, thousands), structure(box, thousands), formulas) for thousands in readings)


def _compare(gold, box, formulas):
    (kind, golds), (box_kind, boxes) = gold, box
    if kind == box_kind == "one":
        return _one(golds[0], boxes[0], formulas)
    if "one" in (kind, box_kind):           # (5, \infty) may be x > 5; a list is not one number
        texts = [",".join(items) if k in ("one", "list") else k[0] + ",".join(items) + k[1] for k, items in (gold, box)]
        return bool(ORDER.search("".join(texts))) and formulas(*texts, False)
    if len(golds) != len(boxes) or len(golds) > MAX_ITEMS:
        return False
    if kind != box_kind and {kind, box_kind} != {"()", "list"}:         # 3, -4 will do for (3, -4)
        return False
    if kind != "list" or box_kind != "list":
        return all(_compare(structure(g), structure(b), formulas) for g, b in zip(golds, boxes))
    for g in golds:
        found = next((b for b in boxes if _compare(structure(g), structure(b), formulas)), None)
        if found is None:
            return False
        boxes = [b for i, b in enumerate(boxes) if i != boxes.index(found)]
    return True


def _one(gold, box, formulas):
    left, box_left = _split(gold, EQUALS)[:-1], _split(box, EQUALS)[:-1]
    if left and box_left and left != box_left and re.fullmatch("[A-Za-z]{2}", left[0] + box_left[0]):
        return False                        # x = 9 is not y = 9
    if left and any(not _is_name(side) and re.search("[A-Za-z]", side) for side in left[:1] + box_left[:1]):
        return formulas(gold, box, False)   # equations, not a name and its value
    (gold, unit), (box, box_unit) = value(gold), value(box)
    if not gold or not box:
        raise Unreadable("no value")
    if '"' in gold + box or re.fullmatch("[A-Za-z]", gold):
        return gold.strip('"') == box.strip('"')
    if unit and box_unit and unit != box_unit:
        return False
    percent, box_percent = gold.endswith("%"), box.endswith("%")
    gold, box = gold.rstrip("% "), box.rstrip("% ")
    decimal, a, b = bool(re.search(r"\.\d", gold + " " + box)), plain(gold), plain(box)
    scales = [1] if percent == box_percent else [1, 100] if percent else [1, Fraction(1, 100)]
    if box_percent and not percent and a is not None and abs(a) < 1:
        scales = [Fraction(1, 100)]
    if a is not None and b is not None:
        return any(close(a, b * scale, decimal) for scale in scales)
    if "degree" in (unit, box_unit) and r"\pi" in gold + box:           # 60^\circ for \pi/3
        gold, box = (text if r"\pi" in text else rf"({text}) \cdot \frac{{\pi}}{{180}}" for text in (gold, box))
    scaled = [box if scale == 1 else rf"({box}) \cdot \frac{{{scale * 100}}}{{100}}" for scale in scales]
    return any(formulas(gold, text, decimal) for text in scaled)


def close(gold, box, decimal):
    """whether two numbers (Fractions or sympy's) are one answer: equal, or, with a decimal, as near as rule 2 says."""
    return gold == box or bool(decimal and abs(gold - box) < min(Fraction(1, 100), abs(gold) / 10))


def compare_formulas(gold, box, decimal):
    """whether two cleaned formulas are equal, by math-verify. In the worker only: it may take for ever."""
    import sympy
    from math_verify import verify
    gold, box = parse(gold), parse(box)
    a, b = constant(gold), constant(box)
    if a is not None and b is not None:     # not by verify, whose test is absolute: 1/2004! is 1/2006! (Math-Verify#14)
        exact = a.is_Rational and b.is_Rational
        return bool(not exact and abs(a - b) <= 1e-25 * max(abs(a), abs(b))) or close(a, b, decimal)
    if isinstance(gold, sympy.Expr) and isinstance(box, sympy.Expr) and bool(gold.free_symbols) != bool(box.free_symbols):
        return False                        # a number is no formula in x; simplify would think about it for long
    if isinstance(gold, sympy.Eq) and isinstance(box, sympy.Eq):    # verify: any two without solutions are equal
        ratio = sympy.simplify((gold.lhs - gold.rhs) / (box.lhs - box.rhs))
        return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)
    return verify(gold, box, timeout_seconds=None, allow_set_relation_comp=True)


UNSURE = r'["?@#$\']|[^ -~«»]|(?<!_)\d\s+\d|(?<![A-Za-z])\d_|\d\.\d*\.|\^\s*\{?\s*-?\d{5}|\d{5}\s*!|!\s*!'
MENDS = [       # what math-verify would misread
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\sqrt\s*(\[[^\]]*\])\s*(\d)", r"\\sqrt\1{\2}"),     # Math-Verify#41
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"), (r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?<![\d.{^/])(\d+) ?\\frac ?\{ ?(\d+) ?\}\{ ?(\d+) ?\}", r"(\1+\\frac{\2}{\3})"),            # 2\frac{1}{3}\pi
    (r"(?<![\d./^])(\d+) ?/ ?(\d+)(?![\d./^!])", r"\\frac{\1}{\2}"), (r"^([^:]+):([^:]+)$", r"(\1)/(\2)"),     # 3/4\pi
    (r"((?<![_^])\d|\))\s*\(", r"\1\\cdot ("),                          # it reads 3(4) as 3 + 4
    ("«", r"\\{"), ("»", r"\\}")]


def parse(text):
    """the sympy expression that math-verify reads in a cleaned formula. Raises Unreadable. In the worker only."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as math_verify_parse
    from math_verify.parser import NormalizationConfig
    if re.search(UNSURE, text):             # it reads 3 4 as 3 + 4; huge powers and factorials are not tried
        raise Unreadable(text)
    for pattern, new in MENDS:
        text = re.sub(pattern, new, text)
    # LaTeX only: math-verify's other reader, of plain expressions, is sympy's parse_expr, which runs Python
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last", equations=False))
    found = math_verify_parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        raise Unreadable(text)
    return found[0]


def constant(expression):
    """the number that a sympy expression stands for, or None: exact when rational, else to 40 digits.
    To 40 digits, (3^{1008} - 1) / 3^{1009} would be 1/3."""
    import sympy
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    if expression.has(sympy.oo, sympy.nan, sympy.zoo):
        return None
    exact = expression.doit()
    number = exact if exact.is_Rational else exact.evalf(40)
    return number if number.is_real else None
