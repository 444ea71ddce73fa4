"""
What judging takes next to math-verify alone, used as its README shows, in one process, on labelled real responses:

    python tests/judge_speed.py responses_a.jsonl responses_b.jsonl       # rows: response, answer, correct
"""
import json
import logging
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def alone(pairs):
    from math_verify import parse, verify
    return [verify(parse(f"${answer}$"), parse(response)) for response, answer in pairs]


def judged(pairs, workers=1):
    from reward import judge_batch
    return [verdict.correct for verdict in judge_batch(pairs, workers)]


def one_by_one(pairs):
    from reward import judge
    return [judge(*pair) for pair in pairs]


if __name__ == "__main__":
    logging.disable()
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rows = [json.loads(line) for name in sys.argv[1:] for line in pathlib.Path(name).read_text(encoding="utf-8").splitlines()]
    pairs, labels = [(row["response"], row["answer"]) for row in rows], [row["correct"] for row in rows]
    ways = {"math-verify alone": alone, "judge_batch, 1 worker": judged, "judge_batch, 2 workers": lambda p: judged(p, 2),
            "judge, one by one": one_by_one}
    times = {name: [] for name in ways}
    for way in ways.values():
        way(pairs[:50])                 # imports
    for _ in range(3):
        for name, way in ways.items():
            start = time.perf_counter()
            got = way(pairs)
            times[name].append(time.perf_counter() - start)
            if len(times[name]) == 1:
                print(f"{name:>22}: {sum(a == b for a, b in zip(got, labels))}/{len(rows)} as labelled", flush=True)
    base = statistics.median(times["math-verify alone"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:>22}: {1000 * middle / len(rows):6.2f} ms a response, {middle / base:.2f} of math-verify alone "
              f"(median of {len(seconds)}; {min(seconds):.1f} to {max(seconds):.1f} s)")
