r"""reward.py on a table of strings and (NANOMAYE_REAL_DATA set) on labelled real responses.
Hostile ones are in test_judge_hostile.py."""
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import answers
import reward
from reward import Verdict, format_reward, judge, judge_batch, language_reward, last_boxed, readable, readable_batch

ROOT = Path(reward.__file__).parent

# gold answer: (boxes that are right, boxes that are wrong)
TABLE = {
    "20": (
        ["20", " 20 ", "20.", "20.0", "020", "+20", r"\$20", "$20$", "**20**", r"\text{20}", r"\mathbf{20}",
         r"\textbf{20}", "{20}", "\n20\n", "x=20", "BC = 20", r"m\angle ABC = 20", "∠B = 20°",
         r"AB = 4 \cdot 5 = 20", "20 = x", r"\text{Area} = 20", "f(3) = 20", r"\text{The answer is } 20",
         r"\text{approximately } 20", r"\approx 20", r"20 \text{ cm}", r"20\,\text{cm}^2", r"20 \, \mathrm{cm}^2",
         r"20\mathrm{~cm}^{2}", "20 cm^2", "20cm", "20 m", r"20 \text{ m}", r"20\ \text{square units}", "20 apples",
         r"20 \text{ minutes}", r"20\ \frac{\text{m}}{\text{s}}", r"20 \text{ km/h}", r"20 \text{ (approx.)}",
         r"20^\circ", r"20^{\circ}", "20°", "20º", "20 degrees", r"20\degree", r"20^\circ \text{C}", r"20\%",
         r"20 \text{ percent}", "20 dollars", "€20", r"2 \times 10", r"2 \times 10^1", r"\frac{40}{2}",
         r"\dfrac{40}{2}", "40/2", r"\sqrt{400}", "√400", r"2^2 \cdot 5", r"4 \times 5", "4 × 5", "(20)",
         r"\left(20\right)", "B. 20", "(C) 20", r"\text{(B) } 20", r"\textbf{(B)}\ 20", r"\boxed{20}", r"\fbox{20}",
         r"\color{red}{20}", r"{\bf 20}", "２０", r"20\text{ feet}.", r"\{20\}", r"\text{twenty} = 20", "19.995",
         "20\u200b"],
        ["", "?", ".", "2", "0", "200", "-20", "20.01", "20.5", "20,30", "20, 30", r"20 \text{ or } 30",
         "20 and 30", "20 or 30", r"20 \text{ cm and } 30 \text{ cm}", "x=20, y=30", r"20\pm 1", r"\pm 20",
         r"20 \text{ or more}", r"\text{more than } 20", r"\text{not } 20", "at least 20", r"20 \text{ million}",
         r"20 \text{ thousand}", r"20\pi", "20x", "20 + x", "20^2", r"\sqrt{20}", "20!", "<20", "x > 20",
         r"x \ge 20", r"20 \neq 20", "(20, 30)", "[20, 30]", r"\{20, 30\}", "1:20", "20 = 30", "3020", "10 10", "B",
         r"\text{twenty-five}", r"0.2\%", r"2000\%x", r"20 \text{ or so, maybe } 25", "Cannot be determined",
         "20 (30)", "2 0"]),
    "-5": (
        ["-5", "−5", "–5", "- 5", "x = -5", "-5.0", r"-\frac{10}{2}", r"\text{-}5", "(-5)", r"-5^\circ"],
        ["5", "--5", "|-5|", "-0.5"]),
    "0": (
        ["0", "0.0", "-0", r"\frac{0}{3}", r"0^\circ", "zero", r"\text{zero}"],
        ["0.005", "0.001", "", "O", r"\emptyset", "1"]),
    "5": (
        ["five", r"\text{five}", r"5 \text{ m}", r"5\text{th}"],
        [r"5 \text{ million}", "4.99", "4", "1/5"]),
    "1000": (
        ["1,000", "1{,}000", r"1\,000", r"1\ 000", "1 000", "10^3", "10^{3}", r"1 \times 10^3", r"1.0\times10^{3}",
         "1e3", r"1,\!000", r"\$1,000.00", r"1 \text{ thousand}"],
        ["1", "1,00", "1, 000", "1000,000", "(1,000)", "10^4"]),
    "1234567": (
        ["1,234,567", r"1\,234\,567", "1{,}234{,}567"],
        ["1,234", "1.234567", "1234568"]),
    "120000": (
        [r"1.2 \times 10^{5}", r"1.2\cdot 10^5", "120,000", "1.2e5", "1.2E+5"],
        [r"1.2 \times 10^{4}", "1.2", "120"]),
    r"\frac{1}{2}": (
        [r"\frac12", r"\frac 1 2", r"\frac{1}2", r"\dfrac{1}{2}", r"\tfrac{1}{2}", r"\cfrac12", "1/2", "0.5", ".5",
         "½", r"50\%", r"\frac{2}{4}", "1:2", "2^{-1}", r"1 \div 2", r"\frac{1}{2} \text{ cm}",
         r"\frac { 1 } { 2 }", r"-\frac{-1}{2}", r"{1 \over 2}", r"\sin 30^\circ", r"\cos(60^\circ)",
         r"\left(\frac{1}{2}\right)", r"\frac{\sqrt{1}}{2}", r"P = \frac{1}{2}", r"\frac{1}{2} = 0.5"],
        ["2", "1", r"-\frac{1}{2}", "0.51", r"0.5\%", "12", r"\frac{1}{2}x", "1, 2", r"\frac{1}{3}", "2:1"]),
    r"\frac { 1 } { 2 }": (
        [r"\frac{1}{2}", "0.5"],
        ["2", "1"]),
    r"\frac{1}{3}": (
        ["0.333", "0.33", r"33.3\%", r"0.\overline{3}", r"0.\bar{3}", r"33\frac{1}{3}\%",
         r"\frac{1}{3} \approx 0.333"],
        ["0.3", "3", "0.35"]),
    r"5\sqrt{3}": (
        ["8.66", "8.660", "8.6603", r"5 \sqrt { 3 }", r"\sqrt{75}", "5√3", r"5 \cdot \sqrt{3}", r"5\sqrt3",
         r"5\sqrt(3)", r"5 \times 3^{1/2}", r"\frac{15}{\sqrt{3}}", r"5\sqrt{3} \approx 8.66",
         r"x = 5\sqrt{3} \text{ cm}", r"5\sqrt{3}\text{ units}^2", r"5 \cdot 3^{\frac{1}{2}}", "5sqrt(3)",
         "5 sqrt{3}", r"\sqrt3\cdot5"],
        ["8.7", "8.65", "5", "3", "15", r"5\sqrt{2}", r"5+\sqrt{3}", r"\sqrt{15}", r"\sqrt[5]{3}", "9"]),
    r"3 \sqrt { 3 }": (
        [r"3\sqrt{3}", r"\sqrt{27}", "5.196", "5.2"],
        ["3", r"\sqrt{3}", "9"]),
    r"4\sqrt{2}": (
        [r"4\sqrt{2}", r"\sqrt{32}", r"4\sqrt(2)"],
        ["4", r"4\cdot2"]),
    "4": (
        ["4", r"\sqrt{16}", r"\sqrt(16)", r"\sqrt[3]{64}", "2^2"],
        [r"4\sqrt(2)", r"4 \sqrt{2}", r"4/\sqrt(2)"]),
    r"36 \pi": (
        [r"36\pi", "36π", r"36 \pi \text{ cm}^3", "113.10", "113.1", r"\pi \cdot 36", "36pi", r"36 \cdot \pi",
         r"\frac{72\pi}{2}", r"36 \times \pi", r"V = \frac{4}{3}\pi r^3 = 36\pi"],
        ["113", "36", r"36\pi^2", r"\frac{36}{\pi}", "113.04"]),
    "3.14": (
        [r"\pi", "3.14", r"\frac{22}{7}", "3.1416"],
        ["3", "3.1", "3.15"]),
    "8.66": (
        [r"5\sqrt{3}", "8.66", "8.660"],
        ["8.67", "9", "8.6", "866"]),
    "7.5": (
        [r"\frac{15}{2}", r"7\frac{1}{2}", r"7 \frac{1}{2}", "7½", "7 1/2", "15/2", "7.50", r"7.5 \text{ cm}^2"],
        ["7", "8", "75", "7, 5", "7.6"]),
    "0.005": (
        ["0.005", r"\frac{1}{200}", r"5 \times 10^{-3}", r"0.5\%", ".005"],
        ["0", "0.01", "0.004", "0.006", "0.014", "-0.004", "0.5"]),
    r"\frac{1}{60}": (
        ["0.0167", "0.017", "1/60"],
        ["0.02", "0.01", "0"]),
    "17": (
        [r"17\%", r"17 \%", "17%", "17"],
        ["0.17", r"1.7\%"]),
    "0.17": (
        [r"17\%", "0.17", r"\frac{17}{100}"],
        [r"0.17\%", "17"]),
    r"25\%": (
        ["25", r"25\%", "0.25", r"\frac{1}{4}", r"25 \text{ percent}"],
        ["2.5", r"0.25\%", r"75\%"]),
    r"\frac{7}{3}": (
        [r"2\frac{1}{3}", "2.333", "2 1/3", r"\frac{7}{3}", r"2 + \frac{1}{3}"],
        ["2", r"\frac{2}{3}", r"\frac{3}{7}", "2.3"]),
    r"60^\circ": (
        ["60", "60°", r"60^\circ", r"60 \text{ degrees}", r"60\text{°}", "60 deg", r"\frac{\pi}{3}",
         r"\angle A = 60^{\circ}", "60.0", r"180^\circ - 120^\circ"],
        ["120", r"60 \text{ radians}", "6", r"\frac{\pi}{6}"]),
    r"\frac{\pi}{3}": (
        [r"\frac{\pi}{3}", r"\pi/3", r"\frac{\pi}{3} \text{ radians}", r"60^\circ", "1.047", r"\frac{1}{3}\pi",
         r"\tfrac{\pi}{3}\text{ rad}"],
        ["60", r"\pi", r"30^\circ", r"\frac{\pi}{3}, \frac{2\pi}{3}"]),
    r"\frac{3}{4}\pi": (
        [r"\frac{3\pi}{4}", r"3/4\pi", r"3\pi/4", r"0.75\pi", r"\frac{3}{4} \cdot \pi \text{ inches}", "2.356"],
        [r"\frac{3}{4\pi}", r"\frac{3}{4}", r"\pi"]),
    "12 cm": (
        ["12", r"12 \text{ cm}", r"12\text{cm}", r"12 \text{ centimeters}", "12 cm."],
        [r"12 \text{ m}", r"12 \text{ mm}", "1.2"]),
    "1:2": (
        ["1:2", "1 : 2", r"\frac{1}{2}", r"1 \text{ to } 2", "0.5", "2:4", "1/2", r"1\colon 2"],
        ["2:1", "2", "1:3", "1, 2", "12"]),
    "2:3:4": (
        ["2:3:4", "2 : 3 : 4"],
        ["4:3:2", "2:3", r"\frac{2}{3}"]),
    "3:30": (
        ["3:30", "3{:}30", r"3:30 \text{ PM}"],
        ["3:31", "3", "30"]),
    "x=9": (
        ["9", "x=9", "x = 9.0", r"x = \sqrt{81}"],
        ["y=9", "x=8", "x>9", "9x", r"x = \pm 9"]),
    "B": (
        ["B", "(B)", "B.", r"\text{B}", r"\mathrm{B}", r"\textbf{B}", r"\textbf{(B)}", r"\text{(B)}", "B) 12",
         "B. 12", r"\text{B. } 12", r"(B)\ 12", r"\text{Option B}", "option B", r"\mathbf{B}", "b", r"\text{B}.",
         "**B**", "B: 12"],
        ["A", "C", "A, B", "AB", "BC", "12", "A and B", "B or C", r"\text{Both}", "Bob"]),
    "(3,-4)": (
        ["(3,-4)", "(3, -4)", r"\left(3, -4\right)", "(x, y) = (3,-4)", "(3.0, -4)",
         r"\left( \frac{6}{2}, -4 \right)", "A = (3, -4)", "3, -4"],
        ["(-4,3)", "(3,0)", "(3,4)", "3", "-4", "-4, 3", "[3,-4]", "(3,-4,0)"]),
    "1, 2": (
        ["1, 2", "2, 1", "1,2", r"1 \text{ and } 2", r"1 \text{ or } 2", "x = 1, x = 2", r"x=2 \text{ or } x=1",
         r"\{1, 2\}", r"\{2,1\}", r"x \in \{1,2\}", "1; 2", "x_1 = 1, x_2 = 2", r"\left\{1,2\right\}"],
        ["1", "2", "1, 3", "1, 2, 3", "1, 1", "12", "1.2", "3"]),
    r"\{1,2,3\}": (
        [r"\{3,1,2\}", "1,2,3", r"\{1, 2, 3\}"],
        [r"\{1,2\}", "(1,2,3,4)", "6"]),
    r"\pm 2": (
        [r"\pm 2", "2, -2", "-2, 2", "±2", r"x = \pm 2", r"x = 2 \text{ or } x = -2"],
        ["2", "-2", "2, 2", r"\pm 3"]),
    r"2 \pm \sqrt{3}": (
        [r"2 \pm \sqrt{3}", r"2+\sqrt{3}, 2-\sqrt{3}"],
        [r"2+\sqrt{3}", "2"]),
    "[1,2)": (
        ["[1,2)", "[1, 2)", r"\left[1, 2\right)", r"x \in [1,2)", r"1 \le x < 2"],
        ["(1,2)", "[1,2]", "(1,2]", "1,2", "[1,3)"]),
    r"(5, \infty)": (
        [r"(5, \infty)", "x > 5", r"(5,+\infty)", "(5,∞)", "5 < x"],
        [r"[5, \infty)", r"x \ge 5", "5", "x < 5"]),
    "x > 5": (
        ["x > 5", "5 < x", "x>5.0", r"(5, \infty)"],
        ["5", "x < 5", r"x \ge 5", "x = 5"]),
    r"x \le 3": (
        [r"x \leq 3", "x ≤ 3", r"3 \geq x", r"x \leqslant 3", r"(-\infty, 3]", "x <= 3"],
        ["x < 3", "3", r"x \ge 3"]),
    "y=2x+1": (
        ["y=2x+1", "y = 1 + 2x", "2x+1", "y - 2x = 1", "y = 2 x + 1"],
        ["y=2x", "y=2x-1", "1", "3"]),
    "x^2+y^2=4": (
        ["x^2+y^2=4", "x^2 + y^2 - 4 = 0", "y^2+x^2=4", "2x^2+2y^2=8", "x² + y² = 4"],
        ["4", "x^2+y^2=2", "x^2-y^2=4", "x+y=2", "x^2+y^2"]),
    "3x-y+13=0": (
        ["3x-y+13=0", "y = 3x+13", "3x - y = -13"],
        ["3*x-2*y+13=0", "0", "0=0", "3x+y+13=0"]),
    "x^2=-1": (
        ["x^2=-1", "x^2+1=0"],
        ["x^2=-2", "x^2+y^2=-3", "-1"]),
    "2x+1": (
        ["2x+1", "1+2x", "2x + 1", r"2(x+\frac{1}{2})"],
        ["2x", "2y+1", "3", "2x-1"]),
    "x": (
        ["x", r"\mathit{x}", "$x$"],
        ["y", "2x", "1"]),
    r"\frac{1}{2004!}": (
        [r"\frac{1}{2004!}", "1/2004!"],
        [r"\frac{1}{2006!}", "0"]),
    r"\frac{3^{1008}-1}{3^{1009}}": (
        [r"\frac{3^{1008}-1}{3^{1009}}", r"\frac{1}{3}-\frac{1}{3^{1009}}"],
        [r"\frac{1}{3}"]),
    "2^{100}": (
        ["2^{100}", "4^{50}", "1267650600228229401496703205376"],
        ["2^{101}", "1267650600228229401496703205377"]),
    r"-\frac{24}{25}": (
        [r"-\frac{24}{25}", r"\frac{-24}{25}", r"\frac{24}{-25}", "-0.96", "-24/25"],
        [r"\frac{24}{25}", "0.96"]),
    r"\frac{90}{23}^{\circ}": (
        [r"\frac{90}{23}", r"\frac{90}{23}^\circ", r"\left(\frac{90}{23}\right)^{\circ}", "3.913"],
        ["90", r"\frac{90}{23}\pi"]),
    r"$\boxed{\frac{16}{7}}$": (
        [r"\frac{16}{7}", "16/7"],
        ["16", "7"]),
    "\x0crac{36}{13}": (
        [r"\frac{36}{13}"],
        [r"\frac{1}{13}", "36", "13"]),
    "69{degrees}": (
        ["69", r"69^\circ"],
        ["70"]),
    r"8\sqrt{3}{squareinches}": (
        [r"8\sqrt{3}", r"8\sqrt{3} \text{ square inches}", r"8\sqrt{3} \text{ in}^2"],
        ["8", r"8\sqrt{2}"]),
    r"\frac{360}7": (
        [r"\frac{360}{7}", "360/7", r"51\frac{3}{7}", "51.43"],
        ["360", "51"]),
    r"6\sqrt{3}+4\pi": (
        [r"6\sqrt{3}+4\pi", r"4\pi + 6\sqrt{3}", r"2(3\sqrt{3}+2\pi)", "22.96"],
        [r"6\sqrt{3}", r"4\pi", r"6\sqrt{3}-4\pi", "23"]),
    r"\pi-\tan ^{-1}\left(\frac{1}{d}\right)": (
        [r"\pi-\arctan\left(\frac{1}{d}\right)", r"\pi - \arctan \frac{1}{d}", r"\pi - \tan^{-1}\frac{1}{d}"],
        [r"\pi", r"\pi-\arctan d", r"\arctan\frac{1}{d}"]),
    "3+4i": (
        ["3+4i", "4i+3"],
        ["3-4i", "3", "5"]),
    r"\log_2 3": (
        [r"\log_2 3", r"\log_{2}{3}", r"\frac{\ln 3}{\ln 2}", "1.585"],
        [r"\log_3 2", "3", "2"]),
    r"\begin{pmatrix}1\\2\end{pmatrix}": (
        [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", "1"]),
    "Monday": (
        ["Monday", r"\text{Monday}", "monday", r"\text{Monday}."],
        ["Tuesday", r"\text{Mon}", "1"]),
    "Cannot be determined": (
        [r"\text{Cannot be determined}", "cannot be determined."],
        [r"\text{determined}", "0"]),
    r"\text{even}": (
        ["even", r"\text{even}"],
        ["odd", "2"]),
    "5!": (
        ["120", "5!"],
        ["5", "100"]),
    r"\binom{5}{2}": (
        ["10", r"\binom{5}{2}", r"{5 \choose 2}"],
        ["5", "2"]),
    "12": (
        [r"12\ \text{cm}^{2}", r"12 \text{ sq. units}", r"12 \text{ cm}^2 \text{ (square centimeters)}",
         r"\text{12 cm}", r"\text{Perimeter} = 12 \text{ cm}", r"\text{Area: } 12", r"\text{Answer: 12}", "A = 12",
         r"S_{\triangle ABC} = 12", "S_{ABCD} = 12", "|AB| = 12", r"\overline{AB} = 12", r"\frac{a}{b} = 12",
         r"\sin A = 12", r"n = 12, \text{since it is even}", r"12\text{ }cm", r"12 ~\mathrm{m}", "12~m",
         r"12\,\mathrm{m/s}", r"12 \text{ m/s}^2", r"12 \mathrm{~m} / \mathrm{s}", r"\mathrm{12}", r"\large 12",
         r"\Large{12}", r"\underline{12}", r"\textcolor{red}{12}", r"12.0 \text{ units}", "12 units",
         "12 square centimeters", "12 sq cm", "12 in", "12 inches", "12 in^2", r"12\text{in}^2", "12 km/h",
         r"12 \text{ years old}", r"12^{\circ} \mathrm{C}", "12 kg", r"12 \text{ ways}", r"12\text{ hours}",
         "12 hours", r"12\;", "{12}", r"\text{Length of } AB = 12", r"\text{Therefore, } x = 12",
         "the answer is 12", "Answer: 12", r"12 \checkmark", r"\text{A) 12}", r"\$12", r"12\$", r"\$ 12 \$",
         r"12\text{¢}", r"12 \text{cm}^3", "12cm^3", r"12 \mathrm{cm^2}", r"12 \, \text{cm²}", "12 cm²",
         r"12 \text{ square cm}", r"12\text{ dm}^2", r"\mathbf{12 \text{ cm}}", r"\mathrm{BD}=12",
         r"\text{m}\angle ABC = 12^\circ", r"\angle 1 = 12", "x_1 = 12", "a_{10} = 12", "f(2)=12", r"\Delta = 12",
         r"\text{Total} = 5 + 7 = 12", "5+7", r"12 \; \mathrm{units}^2", r"12\text{ u}^2", "R=12",
         r"12 \text{ (units)}", r"12\quad", r"\boldsymbol{12}", r"\bf 12", r"\textbf{12}", r"\emph{12}", "12",
         r"\dfrac{36}{3}", r"12\%", r"3\cdot 4", "3(4)", "(3)(4)", "|{-12}|", r"\lfloor 12.5 \rfloor", "-(-12)",
         r"12 \, (\text{cm}^2)", r"12 \text{ faces}, \text{ as shown}", "12\\\\", r"12 \\ ", r"12\text{.}"],
        ["12, 13", "12x", r"12 \text{ hundred}", "12a", r"12\sqrt{2}", "12, x = 3", r"1\,2", r"12 \div 2", "12 : 5",
         r"\text{no } 12", r"12 \text{ or none}", "12 - 1", "AB12", r"\text{twelve and a half}", r"12\frac{1}{2}",
         "12.5", "12 1/2", "12e2", "1.2", "12^3", "12_5", "12!", r"\frac{1}{12}", "0.12", "12 < x", r"12 \to 13",
         r"12 \ldots 15", r"12 \text{ to } 15", r"12\sim15", "12-15", "10-12", "(12)(2)", "a=12, b=13",
         "a = 12, b = 12", r"\begin{cases} 12 \\ 13 \end{cases}", "12; 13", r"12 \text{ cm}, 13 \text{ cm}",
         "12/13", r"12 \mod 5", r"12\\13", r"12 \; 13", r"\sin 12"]),
    r"\frac{\sqrt{2}}{2}": (
        [r"\sqrt{2}/2", r"\frac{\sqrt2}2", r"\frac{1}{\sqrt{2}}", r"\sqrt{\frac{1}{2}}", "2^{-1/2}", r"\sqrt{0.5}",
         "0.7071", "0.71", r"\cos 45^\circ", r"\sin(\frac{\pi}{4})", r"\frac{\sqrt{2}}{2} \text{ units}",
         r"\displaystyle\frac{\sqrt{2}}{2}", r"\textcolor{blue}{\frac{\sqrt{2}}{2}}",
         r"\frac{\sqrt{2}}{2}\approx 0.707", "√2/2", "sqrt(2)/2", r"1/\sqrt{2}", "1/sqrt(2)", r"\frac12\sqrt2",
         r"\text{$\frac{\sqrt{2}}{2}$}", r"\mathbf{\frac{\sqrt{2}}{2}}", r"\sin A = \frac{\sqrt{2}}{2}"],
        [r"\sqrt{2}", "2", r"\frac{\sqrt{2}}{2}a", r"-\frac{\sqrt{2}}{2}"]),
    r"\frac{\pi a^2}{4}": (
        [r"\frac{1}{4}\pi a^2", r"\pi\left(\frac{a}{2}\right)^2", r"\frac{\pi}{4}a^2", r"S = \frac{\pi a^{2}}{4}"],
        [r"\frac{\pi}{4}", r"\frac{\pi b^2}{4}", r"\pi a^2", "0.785"]),
    "a^2b": (
        ["ba^2", "a^{2} b", r"a \cdot a \cdot b"],
        ["ab", "a^2", "ab^2"]),
    r"12\pi": (
        [r"\text{(C) } 12\pi", r"\textbf{(C) }12\pi", r"12\pi \text{ cm}^2", r"12 \pi\, \mathrm{cm}", r"12\pi cm",
         r"12\pi \approx 37.7", "37.70", r"\approx 37.70", "12 pi", r"12\mathrm{\pi}", r"12\cdot\pi",
         r"12\times\pi", r"12\text{π}", r"\pi\times 12", r"12 \text{ pi}"],
        ["12", r"37.7\pi", r"12\pi^2", "37", "37.68"]),
    "12.5": (
        [r"\$12.50", "12.50", r"12\frac12", "12½", r"12 \frac{1}{2}", r"\frac{25}{2}", r"12.5\%", r"12.5^\circ",
         "25/2", r"12 + \frac{1}{2}"],
        ["12", "13", "12,5", "125", r"12\cdot\frac12"]),
    r"\{(1,2),(3,4)\}": (
        ["(1,2), (3,4)", "(3,4), (1,2)", r"(1,2) \text{ and } (3,4)", r"\{(3,4),(1,2)\}"],
        ["(1,2)", "(2,1),(3,4)", "1,2,3,4"]),
    r"(-\infty,1)\cup(2,\infty)": (
        [r"(-\infty, 1) \cup (2, \infty)", r"(2,\infty)\cup(-\infty,1)", r"x \in (-\infty, 1) \cup (2, \infty)",
         r"x<1 \text{ or } x>2"],
        [r"(-\infty,1]\cup(2,\infty)", "(1,2)", "x < 1"]),
    "(1,2)": (
        ["1<x<2", "(1, 2)", r"x \in (1,2)", "(1.0,2.0)", r"\langle 1, 2 \rangle", r"(\frac{2}{2}, 2)", "P(1,2)"],
        ["(2,1)", "1", "[1,2]", r"1 \le x \le 2", "1.2"]),
    r"45^\circ, 135^\circ": (
        [r"135^\circ, 45^\circ", "45, 135", r"45^\circ \text{ and } 135^\circ", r"x=45^\circ \text{ or } 135^\circ"],
        ["45", r"135^\circ"]),
    r"\arccos\frac{1}{3}": (
        [r"\cos^{-1}(1/3)", r"\arccos(1/3)", r"\cos^{-1}\left(\frac{1}{3}\right)", "arccos(1/3)",
         r"\arccos \frac13"],
        [r"\frac{1}{3}", r"\arcsin\frac{1}{3}"]),
    "45^2": (
        ["2025", "45^2", "45^{2}"],
        ["45", "90"]),
    r"\sqrt{34}": (
        [r"\sqrt{34}", "√34", "5.83", "5.831", r"\sqrt{25+9}", r"\sqrt{34} \text{ m}", r"\sqrt{34}m"],
        ["34", "6", "5.8", r"\sqrt{34}x"]),
    "100": (
        ["100", "10^2", r"100 \text{ cm}^2"],
        ["100,200", "10"]),
    "0.5": (
        [r"\frac12", r"50\%", ".5", "0.50", "1:2", r"\frac{1}{2}"],
        ["5", "0,5", "0.6", r"0.5\%"]),
    "Yes": (
        [r"\text{Yes}", "yes", r"\textbf{Yes}"],
        ["No", "1"]),
    r"2+\sqrt{10}": (
        [r"\sqrt{10}+2", "5.16", r"2+\sqrt{10} \text{ cm}"],
        [r"\sqrt{10}", "2", r"2\sqrt{10}"]),
    "-3": (
        ["-3", "−3", r"\text{-3}", "y=-3", "-3.0", r"-3^\circ", "- 3", r"-\frac{6}{2}", "(-3)", "{-3}",
         r"-\sqrt{9}"],
        ["3", "0.3", "--3"]),
    "C": (
        [r"\text{The answer is C}", r"\text{C}", "C)", r"(\text{C})", r"\textbf{C}", "[C]", r"\mathbf{(C)}",
         r"\text{choice C}", r"C.\ 5", "c", r"\textbf{(C) } 45"],
        ["D", "CD", "C + D", "C = 5", r"\text{Can't}", "", "ABC"]),
    "24": (
        ["4!", r"24 \text{ cubic units}", r"2^3 \cdot 3", r"24,\!", r"24 \text{ people}"],
        ["2.4", "42", r"24 \text{ dozen}", "24,000"]),
    "10000000000000000000001": (
        ["10000000000000000000001", "10^{22}+1"],
        ["10000000000000000000000", "10^{22}"]),
}


def boxed(text):
    return rf"so the answer is \boxed{{{text}}}."


@pytest.mark.parametrize("gold", TABLE)
def test_table(gold):
    right, wrong = TABLE[gold]
    assert readable(gold)
    got = judge_batch([(boxed(text), gold) for text in right + wrong])
    assert [(text, verdict) for text, verdict in zip(right, got) if not verdict.correct] == []
    assert [(text, verdict) for text, verdict in zip(wrong, got[len(right):]) if verdict.correct] == []
    assert [text for text, verdict in zip(right + wrong, got) if verdict.error == "timeout"] == []


@pytest.mark.parametrize("response, content", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{80}}", "80"),
    (r"\boxed {3}", "3"), (r"\boxed 5", "5"), (r"$\boxed 12.$", "12"), (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{}", ""),
    (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."), ("\\boxed{a\nb}", "a\nb"),
    ("20", None), (r"\boxed{20", None), (r"\boxed{20} or \boxed{30", None), (r"\boxed{20}, in \boxed", None),
    (r"\boxedtext{20}", None), (r"boxed{20}", None), (r"\boxed{\frac{1}{2}", None), ("", None)])
def test_last_boxed(response, content):
    assert last_boxed(response) == content


@pytest.mark.parametrize("response, correct", [
    ("the answer is 20", False), (r"\boxed{20", False), (r"\boxed{20} no: \boxed{30", False), (r"\boxed{}", False),
    (r"\boxed{20} and \boxed{}", False), (r"First \boxed{5}, no, \boxed{20}", True), (r"\boxed{20}, \boxed{5}", False),
    ("$$\n\\boxed{20}\n$$", True), (r"\boxed 20", True), (r"\fbox{20}", False)])
def test_the_last_box_counts(response, correct):
    assert judge(response, "20") is correct


def test_an_unreadable_box_is_wrong_and_said_so():
    assert judge_batch([(boxed("20"), "20"), (boxed("?"), "20"), (boxed(r"\foo{2}"), "20"), ("no box", "20"),
                        (boxed("21"), "20"), (boxed(""), "20"), (boxed("9" * 500), "20"), (boxed("2 + "), "20")]) == [
        Verdict(True, ""), Verdict(False, "unreadable"), Verdict(False, "unreadable"), Verdict(False, ""),
        Verdict(False, ""), Verdict(False, "unreadable"), Verdict(False, "unreadable"), Verdict(False, "unreadable")]


def test_gold_answers_that_cannot_be_read():
    golds = ["", " ", "?", r"\frac{1}{2", r"\foo{2}", "2 +", "}{", "3 4", "1" * 500, "$$", r"\boxed{}"]
    assert [gold for gold, ok in zip(golds, readable_batch(golds)) if ok] == []
    assert [readable(gold) for gold in golds] == readable_batch(golds)


def test_equal_formulas_are_judged_once(monkeypatch):
    asked = []
    monkeypatch.setattr(reward._pool, "ask", lambda questions, workers: (
        asked.extend(questions), [Verdict(gold == r"\sqrt{3}", "") for gold, _ in questions])[1])
    pairs = [(boxed(r"3^{1/2}"), gold) for gold in (r"\sqrt{3}", r"\sqrt{5}", "20", r"$\boxed{\sqrt{3}}$", r"\sqrt{3}")]
    assert [verdict.correct for verdict in judge_batch(pairs)] == [True, False, False, True, True]
    assert asked == [(r"\sqrt{3}", r"3^{1/2}"), (r"\sqrt{5}", r"3^{1/2}"), ("20", r"3^{1/2}")]


def test_formulas_are_parsed_not_compared_as_strings():
    """the same unparsable formula twice is not an answer."""
    assert not judge(boxed(r"\foo{2} + \bar"), r"\foo{2} + \bar")


def test_long_responses_take_linear_time():
    for text in ("\\boxed{" * 150_000, "{" * 10 ** 6, "\\boxed{5}" * 100_000, "\\" * 10 ** 6, "\\boxed" + " " * 10 ** 6,
                 "\\boxed{" + "{" * 10 ** 6, "中" * 10 ** 6):
        start = time.process_time()
        judge(text, "20"), format_reward(text), language_reward(text)
        assert time.process_time() - start < 5


def test_reading_never_takes_long_in_this_process():
    """what does not go to the worker has no time limit, so its regular expressions must not explode."""
    pieces = r"\ { } ( ) [ _ ^ , = a Ab \frac \text{ \left \circ 12 . % or cm".split() + [" "]
    pieces = [a + b + c for a in pieces for b in pieces for c in ("", "=", "}")]
    texts = [piece * (answers.MAX_CHARS // len(piece) - 1) + end for piece in pieces for end in ("", "= 3")]
    start = time.process_time()
    for text in texts:
        slow = time.process_time()
        try:        # Unreadable is the only way out
            answers.compare("(20, x = 9)", text, lambda gold, box, decimal: False)
        except answers.Unreadable:
            pass
        assert time.process_time() - slow < 1, text[:40]
    assert time.process_time() - start < 60


def test_nothing_heavy_is_imported_here():
    code = (r"import sys, reward; assert reward.judge(r'\boxed{20}', '20');"
            "print([m for m in ('torch', 'sympy', 'math_verify') if m in sys.modules], reward._pool.process)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert run.stdout.strip() == "[] None"


@pytest.mark.parametrize("response, reward_", [
    ("The answer is 5.", 0), ("", 0), ("12 + 3 = 15", 0), ("α and β, Ω", 0), ("naïve café", 0), ("ab中文", -0.5),
    ("Ответ", -1), ("中 = x", -0.5), ("𝑥 = ５ ａ", 0),
    ("12中", -1), ("日本語 abc", -0.5), ("한글", -1), ("90° ± 5²", 0)])
def test_language_reward(response, reward_):
    assert language_reward(response) == reward_


@pytest.mark.parametrize("response, reward_", [
    (r"So \boxed{5}", 1), (r"So \boxed{5}.", 1), (r"$\boxed{5}$.", 1), ("\\[\\boxed{5}\\]\n", 1), (r"**\boxed{5}**", 1),
    (r"\( \boxed{\frac{1}{2}} \)", 1), (r"$$\boxed{5} \text{ cm}$$", 0), (r"\boxed{5} is it", 0),
    (r"\boxed{5} \boxed{5}", 0), (r"\boxed{}", 0), (r"\boxed{5", 0), ("5", 0), ("", 0), (r"\boxed{5}" + " " * 1000, 0),
    (r"\boxed{5} \boxedx", 0), (r"\boxedx \boxed{5}", 1), (r"\boxed 5.", 1), (r"\boxed5, no", 0)])
def test_format_reward(response, reward_):
    assert format_reward(response) == reward_


def test_rewards_of_odd_boxes_never_fail():
    for length in range(6):
        for pieces in itertools.product((r"\boxed", "{", "}", "5", ".", "x "), repeat=length):
            text = "".join(pieces)
            assert format_reward(text) in (0, 1) and (last_boxed(text) is None or last_boxed(text) in text)


@pytest.mark.skipif("NANOMAYE_REAL_DATA" not in os.environ, reason="NANOMAYE_REAL_DATA names no folder")
@pytest.mark.parametrize("name, wanted", [("pairs", 1.0), ("responses_a", 0.999), ("responses_b", 0.999)])
def test_real_responses(name, wanted):
    path = Path(os.environ["NANOMAYE_REAL_DATA"]) / "judge" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    got = judge_batch([(row["response"], row["answer"]) for row in rows])
    agree = sum(verdict.correct == row["correct"] for verdict, row in zip(got, rows))
    assert agree >= wanted * len(rows)
    assert not any(verdict.error == "timeout" for verdict in got)
    # golds of this set that no judge can read: none
    golds = sorted({row["answer"] for row in rows})
    assert [gold for gold, ok in zip(golds, readable_batch(golds)) if not ok] == []
