"""Tab. 3 of the paper (arXiv 2504.02587), to stand beside runs that repeat one of its settings."""

# percent: {(files' prefix, model): {setting: (validation, test)}}, five columns each, None where it has none
PAPER = {
    ("mm_math_", "Qwen2-VL-7B"): {
        "pass@8 T=1 top_p=1": ((36.0, 46.8, 48.5, 53.0, 55.7), (29.0, 25.2, 35.2, 32.0, 42.7)),
        "pass@1 T=0.6 top_p=1": ((16.0, 19.9, 23.4, 29.0, 31.0), (11.0, 8.7, 14.1, 12.0, 19.7)),
        "pass@1 T=0.01 top_p=0.001": ((16.0, 18.8, 24.1, 25.0, 31.0), (11.0, 9.6, 14.1, 16.0, 20.7))},
    ("mm_math_", "Qwen2.5-VL-7B"): {
        "pass@8 T=1 top_p=1": ((65.0, 60.6, 64.8, 66.0, 70.0), (54.0, 35.2, 54.6, 44.0, 61.8)),
        "pass@1 T=0.6 top_p=1": ((36.0, 30.8, 39.8, 39.0, 47.2), (28.0, 13.3, 29.0, 20.0, 35.2)),
        "pass@1 T=0.01 top_p=0.001": ((35.0, 31.2, 40.3, 37.0, 46.2), (28.0, 15.0, 31.8, 20.0, 38.3))},
    ("geometry3k_", "Qwen2-VL-7B"): {
        "pass@8 T=1 top_p=1": ((41.7, None, 52.5, None, 57.0), (46.6, None, 58.0, None, 62.1)),
        "pass@1 T=0.6 top_p=1": ((18.3, None, 25.2, None, 30.3), (20.3, None, 30.3, None, 34.3)),
        "pass@1 T=0.01 top_p=0.001": ((18.7, None, 26.7, None, 31.1), (23.1, None, 31.1, None, 34.1))},
    ("geometry3k_", "Qwen2.5-VL-7B"): {
        "pass@8 T=1 top_p=1": ((63.0, None, 60.8, None, 64.4), (69.4, None, 69.3, None, 71.8)),
        "pass@1 T=0.6 top_p=1": ((31.3, None, 33.4, None, 37.9), (38.6, None, 41.5, None, 44.6)),
        "pass@1 T=0.01 top_p=0.001": ((35.3, None, 34.6, None, 37.7), (40.6, None, 42.0, None, 45.0))}}


def paper_numbers(knobs, split, setting):
    """The paper's five percentages for runs with these knobs; None where they repeat no setting of its."""
    for (prefix, model), table in PAPER.items():
        files = [knobs.get(knob, "") for knob in ("train_data", "val_data", "test_data")]
        same = all(f"/{prefix}" in file for file in files) and model in knobs.get("model", "")
        same = same and "reinforce++'" in knobs.get("advantage", "'reinforce++'")
        if same and setting in table:
            return dict(zip(("validation", "test"), table[setting])).get(split)
    return None
