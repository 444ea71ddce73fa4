r"""
Hostile texts for the judge, always the same ones: each would hang, crash, fill the memory of, run
in, or reach the disk through a judge that trusts it, and none is the answer to a problem here (GOLDS).
"""
import random

GOLDS = "20", r"5\sqrt{3}", r"\frac{\pi a^2}{4}", "x^2+y^2=4", "(3,-4)", "B"
BIG = 10**6

# what responses hold to have it run: text for the judge, which evaluates none of it (HERE is a canary)
CODE = r"""__import__('os').system('touch HERE') | ().__class__.__bases__[0].__subclasses__() | eval('1')
exec('x=1') | open('HERE','w').write('x') | lambda: 3 | f'{open("HERE","w")}' | 20;import os | S('open(1)')
sympify('__import__("os").mkdir("HERE")') | Symbol('x').subs(1, 2) | parse_expr('1') | $(touch HERE) | exit()
`touch HERE` | ; touch HERE # | <script>alert(1)</script> | {{7*7}} | '; DROP TABLE x; -- | while True: pass
globals()['__builtins__'] | 1 if open('HERE','w') else 2 | \text{__import__('os').system('touch HERE')}
\operatorname{eval}(1) | \operatorname{__import__}(os) | \variable{__import__('os')} | \input{/etc/passwd}
\write18{touch HERE} | \immediate\write18{touch HERE} | \openout\f=HERE | \def\x{\x\x}\x
\newcommand{\a}{\a\a}\a | \includegraphics{/dev/zero} | ../../../../etc/passwd | a.__class__"""
SLOW = r"""9^{9^{9^{9}}} | 2^{2^{2^{2^{2^{2}}}}} | 10^{10^{10}} | (9^{99})^{(9^{99})} | 9**9**9**9 | 0^0
\sqrt{9^{9^{9}}} | ((9^{99})^{99})^{99} | (((9^{99})^{99})^{99})^{99} | 7^{7^{7^7}} \mod 10 | \frac{1}{0}
x^{9^{9^9}} | e^{e^{e^{e^{9}}}} | \pi^{\pi^{\pi^{\pi}}} | (1+\sqrt{2})^{9999} | (x+y+z)^{999}
(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{99} | 1000000000! | 99999! | 9999! | 9!!!! | (9!)! | ((3!)!)!
\frac{9999!}{9998!} | \binom{10^9}{5^9} | \binom{99999}{9999} | 1e999999999 | 10^{999999999} | 10^{-99999}
0.1^{99999} | \sum_{n=1}^{\infty} n! | \sqrt[9999]{2} | \sum_{n=1}^{9999} \sin(n)^{n} | \prod_{n=1}^{99999} n
\int_0^{\infty} e^{-x^{x^{x}}} dx | \int \sin(\sin(x)) dx | \lim_{x \to 0} \frac{\sin(\tan x)-\tan x}{x^7}
\frac{d^{99}}{dx^{99}} \sin(x^2) | x^{99}+x^{98}+x+1=0 | x^5-x+1=0 | \sin(x)=x | x^2+y^2 \le 4^{4^4}
\cos(\frac{\pi}{9999}) | \tan(\frac{\pi}{65537}) | \arctan(\tan(9^{999})) | |9^{9^9}|
\gcd(9^{9^9}, 3) | \operatorname{zeros}(9999,9999) | \operatorname{eye}(9999) | (-1)^{9^9}
\lfloor 9^{9^{9}} \rfloor | \begin{pmatrix}1&2\\3&4\end{pmatrix}^{9999} | \{x | x^{99} = 1\} | i^{i^{i^i}}
\infty^{\infty} | \infty - \infty | \sqrt{-1}^{99999} | 9999^{9999} | 9999^{9999} + x | \log(9^{9^{9^9}})
\frac{9999^{9999}}{9998^{9999}} | (9999^{9999})^{9999} | ((x+1)^{999})^{999}"""
CODE, SLOW = (text.replace("\n", " | ").split(" | ") for text in (CODE, SLOW))
SLOW += [text * 150 + "3" for text in ("1/", "-", "+", "2^", "2^{", "((", "\\sqrt")] + ["9" * 399, "." * 300]
WORDS = ["\x00", "\x1b[2J", "\u202e02\u202c", "\u200d" * 50, "\ufeff20", "\ud800", "\udfff\ud800", "\ud83d"]
WORDS += ["٢٠x", "二十", "e" + "\u0301" * 300, "\x85\u2028\u2029", "\x7f" * 50]
WORDS += [char * 390 for char in "½π⁹√²∠İ\t\xa0\r🤖\ufdfa"]
BRACKETS = {r"\sqrt{": "}", r"\frac{1}{": "}", "{": "}", "(": ")", "[": "]", r"\{": r"\}", "|": "|",
            "-(": ")", r"\text{": "}", r"\left(": ")", r"\boxed{": "}", "^{": "}", r"\sin(": ")", "!(": ")"}


def box(text):
    return rf"so the answer is \boxed{{{text}}}."


# (response, gold): a right answer in it, and something else
LURES = [(box(text.replace("GOLD", gold)), gold) for gold in GOLDS[:-1] for text in (
    "GOLD, GOLD, 1", r"GOLD \text{ or not}", "GOLD +", "not GOLD", r"\frac{GOLD}{0}", r"GOLD} \boxed{7",
    "GOLD; 0.123456")]


def responses():
    """[response, ...]: code and slow ones first, the short and those cut at random last."""
    made = [box(text) for text in CODE + SLOW + WORDS] + CODE
    made += [
        box("9" * BIG), "9" * BIG, box("x" * BIG), "\\" * BIG, "{" * BIG, "\\boxed{" * 150_000,
        "\\boxed" + " " * BIG, "\\boxed{" + "{" * BIG, box("中" * BIG), " " * BIG + box(""), box("1," * BIG),
        box("(" * BIG), "\\boxed 9" + "9" * BIG, "\\boxed{20}" * 10**5 + "\\boxed{"]
    for opening, closing in BRACKETS.items():
        for depth in (7, 9, 40, 300):
            made += [box(opening * depth + "2" + closing * depth), box(opening * depth + "2")]
    made += [
        "", " ", r"\boxed", r"\boxed{", r"\boxed{}", r"\boxed{ }", r"\boxed{{}}", r"\boxed{\text{}}",
        r"\boxed{\}", r"\boxed{$$}", r"\boxed{\\}", r"\boxed}{", "\\boxed{\n}", r"\boxed{.}"]
    draw = random.Random(0)
    for _ in range(100):  # halves that do not fit
        first, second = draw.sample(CODE + SLOW, 2)
        made.append(box(first[:draw.randrange(30)] + second[-draw.randrange(1, 30):]))
    return made
