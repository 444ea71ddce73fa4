r"""
Hostile texts for the judge, the same ones for the same seed.

    python tests/hostile.py            # judge 1,000 of them; print what each kind costs

Each is a response whose last box, where it has one, is not the answer to any problem here (GOLDS),
and which would hang, crash, fill the memory of, run in, or reach the disk through a judge that trusts it.
"""
import random
import sys

GOLDS = "20", r"5\sqrt{3}", r"\frac{\pi a^2}{4}", "x^2+y^2=4", "(3,-4)", "B"

CODE = [
    "__import__('os').system('touch HERE')", "().__class__.__bases__[0].__subclasses__()", "eval('1')", "exec('x=1')",
    "open('HERE','w').write('x')", "lambda: 3", "f'{open(\"HERE\",\"w\")}'", "20;import os",
    "import os\nos.mkdir('HERE')", "[c for c in ().__class__.__mro__[1].__subclasses__()]",
    "sympify('__import__(\"os\").mkdir(\"HERE\")')", "Symbol('x').subs(1, 2)", "S('open(1)')",
    "Integer(20).__class__", "parse_expr('1')", "$(touch HERE)", "`touch HERE`", "; touch HERE #", "|| touch HERE",
    "<script>alert(1)</script>", "{{7*7}}", "${7*7}", "%(x)s%n%n", "'; DROP TABLE x; --", "@eval",
    "globals()['__builtins__']", "while True: pass", "1 if open('HERE','w') else 2", "exit()", "print(20)",
    r"\text{__import__('os').system('touch HERE')}", r"\operatorname{eval}(1)", r"\operatorname{exec}(x)",
    r"\operatorname{__import__}(os)", r"\mathrm{os.system}(1)", r"\variable{__import__('os')}",
    r"\input{/etc/passwd}", r"\include{/etc/shadow}", r"\write18{touch HERE}", r"\immediate\write18{touch HERE}",
    r"\openout\f=HERE", r"\csname input\endcsname{/etc/passwd}", r"\def\x{\x\x}\x", r"\newcommand{\a}{\a\a}\a",
    r"\catcode`\@=11", r"\url{http://localhost/}", r"\href{http://localhost/}{20}", r"\includegraphics{/dev/zero}",
    "file:///etc/passwd", "../../../../etc/passwd", "/dev/zero", "\\\\localhost\\c$", "x_{__class__}", "a.__class__",
    "E.__class__"]

SLOW = [
    r"9^{9^{9^{9}}}", r"9^{9^{9^{9^{9^{9}}}}}", r"2^{2^{2^{2^{2^{2}}}}}", r"10^{10^{10}}", r"(9^{99})^{(9^{99})}",
    "9**9**9**9", r"7^{7^{7^7}} \mod 10", r"\sqrt{9^{9^{9}}}", r"\log(9^{9^{9^9}})", r"\sin(10^{10^{10}})",
    r"x^{9^{9^9}}", r"e^{e^{e^{e^{9}}}}", r"\pi^{\pi^{\pi^{\pi}}}", r"(1+\sqrt{2})^{9999}", r"(x+y+z)^{999}",
    r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{99}", "1000000000!", "99999!", "9999!", "9!!!!", "(9!)!",
    "((3!)!)!", r"\frac{9999!}{9998!}", r"\binom{10^9}{5^9}", r"\binom{99999}{9999}", r"\Gamma(99999)", "1e999999999",
    "1E+999999999", "1e-999999999", r"10^{999999999}", r"10^{-99999}", r"0.1^{99999}", r"\sum_{n=1}^{\infty} n!",
    r"\sum_{n=1}^{\infty} \frac{1}{n^{n}}", r"\sum_{n=1}^{9999} \sin(n)^{n}", r"\sum_{n=1}^{99999} \frac{1}{n}",
    r"\sum_{n=1}^{9^9} \frac{1}{n^2+1}", r"\prod_{n=1}^{99999} n", r"\prod_{n=1}^{\infty} (1+\frac{1}{n^3})",
    r"\int_0^{\infty} e^{-x^{x^{x}}} dx", r"\int_0^1 x^x dx", r"\int \sin(\sin(\sin(x))) dx",
    r"\int_0^1 \int_0^1 \frac{1}{1-xy} dx dy", r"\lim_{x \to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^7}",
    r"\lim_{n \to \infty} \sqrt[n]{n!}", r"\frac{d^{99}}{dx^{99}} \sin(x^2)", r"x^{99}+x^{98}+x+1=0", r"x^5-x+1=0",
    r"\sin(x)=x", r"x^2+y^2 \le 4^{4^4}", r"\cos(\frac{\pi}{9999})", r"\tan(\frac{\pi}{65537})",
    r"\arctan(\tan(9^{999}))", r"\sqrt[9999]{2}", r"\sqrt[3]{2+\sqrt[3]{2+\sqrt[3]{2}}}", r"\gcd(9^{9^9}, 3)",
    r"\operatorname{zeros}(9999,9999)", r"\operatorname{ones}(99999,99999)", r"\operatorname{eye}(9999)",
    r"\operatorname{diag}(" + ",".join("12345678") + ")", r"\max(9^{9^9}, 1)", r"\lfloor 9^{9^{9}} \rfloor",
    r"|9^{9^9}|", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{9999}", r"\{x | x^{99} = 1\}", r"\frac{1}{0}",
    r"\frac{0}{0}", r"0^0", r"\infty - \infty", r"\infty^{\infty}", r"i^{i^{i^i}}", r"\sqrt{-1}^{99999}",
    r"(-1)^{9^9}", r"0.\overline{" + "9" * 300 + "}", "9" * 399, r"\frac{" + "9" * 190 + "}{" + "7" * 190 + "}",
    "." * 300, "1/" * 150 + "3", "-" * 300 + "3", "+" * 300 + "3", "2^" * 150 + "3"]

WORDS = ["\x00", "\x01\x02\x03", "\x1b[2J", "\u202e02\u202c", "\u200d" * 50, "\ufeff20", "\ud800", "\udfff\ud800",
         "\ud83d", "e" + "\u0301" * 300, "Z̸̢͎̲" * 30, "\ufdfa" * 300, "\u3300" * 300, "½" * 300, "π" * 399,
         "⁹" * 399, "√" * 399, "∠" * 399, "\x0crac" * 90, "٢٠x", "二十", "²⁰²", "\U0001d7d0" * 300, "\r\n" * 150,
         "\t" * 399, "\x85\u2028\u2029", "\u0000}" * 20, "\ufffe\uffff", "🤖" * 100, "\x7f" * 50, "\xa0" * 399,
         "ﬀ" * 390, "㍿" * 390, "İ" * 300, "ß" * 399]

# what a regular expression may take for long: pieces that are repeated, and ends that do not fit
PIECES = ["a", "A", "_a", "1", "1,", ",", ".", " ", "\\", "\\\\", "\\a", "\\ab", "{", "}", "{}", "{{", "(", ")", "()",
          "[", "]", "([", "<", "=", "= ", "x=", "==", '"', '""', "'", "$", "\\$", "\\text{", "\\text{a}", "\\frac",
          "\\frac{1}", "\\sqrt", "\\sqrt[", "\\left(", "\\right)", "\\begin{aligned}", "\\pm", "\\cup", "\\in ",
          "\\approx", "\\le", "\\circ", "^", "^{", "_", "_{", "!", "|", "/", ":", "1/", "1:", "%", "\\%", "1 ", "1e5",
          "e", "cm", "cm^2", " and ", " or ", "one ", "million ", "\\{", "\\}", "\\langle", "\\color{a}", "\\boxed",
          "-", "+", "&", "\\\\&", "~", "x_1,", "(1,2),", "[1,2)", "\\begin{pmatrix}", "{,}", "\\,", "\\;", "°", "1.",
          "1.5.", "\\overline{", "\\over", "\\choose", "°C", "m/s", "\\text{m}/\\text{s}", "f(", "A)."]
ENDS = ["", "!", "= 3", "}", "x", " ", "\\", "21", "$"]


def nested(command, depth, inside="2"):
    return command * depth + inside + "}" * command.count("{") * depth


def box(text):
    return rf"so the answer is \boxed{{{text}}}."


def responses(count=1000, seed=0):
    """[(kind, response), ...]."""
    draw = random.Random(seed)
    made = [("code", box(text)) for text in CODE] + [("code", text) for text in CODE[:20]]
    made += [("slow", box(text)) for text in SLOW] + [("words", box(text)) for text in WORDS]
    big = 10 ** 6
    made += [("long", text) for text in (
        box("9" * big), box("1" + "0" * big), "9" * big, box("x" * big), "\\" * big, "{" * big, "\\boxed{" * 150_000,
        "}" * big, "\\boxed" + " " * big, "\\boxed{" + "{" * big, "中" * big, box("中" * big), "\x00" * big,
        " " * big + box(""), "$" * big, box("1," * (big // 2)), box("(" * big),
        box("\\frac{1}{" * 10 ** 5 + "2" + "}" * 10 ** 5), "\\boxed 9" + "9" * big, box(nested(r"\sqrt{", 10 ** 5)),
        box(nested("{", big // 2)), nested(r"\boxed{", 10 ** 4), nested(r"\boxed{", 10 ** 4, ""),
        box(r"\begin{pmatrix}" + (r"1&" * 999 + r"1\\") * 1000 + r"\end{pmatrix}"),
        box(r"\{" + "1,2," * 10 ** 5 + r"3\}"), box("[1,2]\\cup" * 10 ** 5 + "[3,4]"), box("+".join(["1"] * 10 ** 5)),
        "\ud800" * big, box("!" * big), box("20 " * 10 ** 5), "\\boxed{20}" * 10 ** 5 + "\\boxed{",
        "\\boxed{" + "a" * big, box("\\text{" * 10 ** 5 + "20" + "}" * 10 ** 5), box("\u0301" * big))]
    opening = {r"\sqrt{": "}", r"\frac{1}{": "}", "{": "}", "(": ")", "[": "]", r"\{": r"\}", "|": "|", r"\text{": "}",
               r"\left(": ")", r"\boxed{": "}", "^{": "}", "-(": ")", r"\sin(": ")", "2^{": "}", "!(": ")"}
    for command, close in opening.items():
        for depth in (9, 40, 300):
            made.append(("nested", box(command * depth + "2" + close * depth)))
            made.append(("unbalanced", box(command * depth + "2")))
    made += [("list", box(text)) for text in (
        "(" * 150 + "1" + ",2)" * 80, "((1,2),(3,4))" * 25, "(" * 60 + "1,2" + ")" * 60, "1,2;" * 90,
        "[1,2)\\cup" * 30 + "(3,4)", ",".join(f"({i},{i})" for i in range(10)) + ",(1," * 40, "\\pm" * 90,
        "2\\pm 3\\pm 4", "{" + ",".join("0123456789" * 15) + "}")]
    made += [("empty", text) for text in (
        "", " ", r"\boxed", r"\boxed{", r"\boxed{}", r"\boxed{ }", r"\boxed{{}}", r"\boxed{\text{}}", r"\boxed{$$}",
        r"\boxed{\}", r"\boxed{\\}", r"\boxed}{", "\\boxed{\n}", r"\boxed{.}")]
    seen = {text for _, text in made}
    while len(made) < count:
        kind = draw.choice(("regex", "regex", "soup", "tower", "lure"))
        if kind == "regex":
            a, b = draw.choice(PIECES), draw.choice(PIECES + [""] * len(PIECES))
            text = (a + b) * (draw.choice((30, 395)) // len(a + b)) + draw.choice(ENDS)
        elif kind == "soup":
            text = "".join(draw.choice(PIECES + ["2", "x", "3", "\\pi"]) for _ in range(draw.choice((5, 20, 80))))
        elif kind == "tower":
            step = draw.choice(("2^{", "x^{", r"\frac{x}{", r"\sqrt{", r"\sqrt[3]{1+", r"\sin{", "e^{", r"\frac{1}{1+"))
            text = nested(step, draw.randrange(2, 30), draw.choice(("9", "x", "y", "\\pi")))
        else:       # a right answer in it, and something else
            gold = draw.choice(GOLDS)
            text = draw.choice((rf"{gold}, {gold}, 1", rf"{gold} \text{{ or not}}", rf"{gold} \ne {gold}", rf"{gold} +",
                                rf"\frac{{{gold}}}{{0}}", rf"{gold}}} \boxed{{7", rf"not {gold}",
                                rf"{gold}; {gold}; {draw.random():.6f}"))
        if (text := box(text)) not in seen:
            seen.add(text)
            made.append((kind, text))
    return made[:count]


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 2)[0])
    import collections
    import resource
    import time
    from judge_pool import default_workers
    from reward import _pool, judge_batch, readable_batch
    kinds = collections.defaultdict(list)
    for kind, text in responses():
        kinds[kind].append(text)
    total = time.perf_counter()
    for kind, texts in kinds.items():
        start = time.perf_counter()
        got = judge_batch([(text, GOLDS[i % len(GOLDS)]) for i, text in enumerate(texts)])
        errors = collections.Counter(verdict.error for verdict in got)
        print(f"{kind:>10}: {len(texts):4} in {time.perf_counter() - start:5.1f} s; {errors['timeout']} timeouts, "
              f"{errors['unreadable']} unreadable, {sum(verdict.correct for verdict in got)} right", flush=True)
        for text, verdict in zip(texts, got):
            if verdict.correct or (verdict.error == "timeout" and "-v" in sys.argv):
                print("   ", verdict, ascii(text)[:100])
    total = time.perf_counter() - total
    print(f"{sum(map(len, kinds.values()))} responses in {total:.1f} s, {default_workers()} workers")
    start = time.perf_counter()
    golds = [text[24:-2] for texts in kinds.values() for text in texts]
    print(f"as gold answers: {sum(readable_batch(golds))} readable, {time.perf_counter() - start:.1f} s")
    _pool.close()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
    print(f"largest process of the pool: {peak:.2f} GB")
