from __future__ import annotations

import math

import pytest
from scipy import stats

from drama.evidence import page
from drama.evidence.page import Column, differences, p_of, paired, table, write_page

SCIFACT = Column("SciFact", ("nDCG@10 scifact",))


@pytest.mark.parametrize(
    "gaps", [[0.1, 0.2], [0.1, 0.2, 0.35], [0.1, -0.2, 0.3, 0.4], [1, 2, 4, 3, 9]]
)
def test_p_is_students(gaps):
    assert p_of(gaps) == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, abs=1e-12)


def test_no_p_without_spread():
    assert p_of([0.1]) is None
    assert p_of([0.1, 0.1]) is None


def test_a_table_has_mean_spread_and_what_was_not_run():
    cells = {"a": {0: {"nDCG@10 scifact": 0.2}, 1: {"nDCG@10 scifact": 0.4}}}
    lines = table(cells, ["a", "b"], [SCIFACT]).splitlines()
    assert lines[2] == f"| a | 2 | 0.300 ± {math.sqrt(0.02):.3f} |"
    assert lines[3] == "| b | 0 | not run |"


def test_differences_take_the_seeds_that_both_have():
    first = {0: {"nDCG@10 scifact": 0.5}, 1: {"nDCG@10 scifact": 0.9}}
    second = {0: {"nDCG@10 scifact": 0.2}, 2: {"nDCG@10 scifact": 0.1}}
    assert paired(first, second, SCIFACT) == "+0.300"
    assert paired(first, {}, SCIFACT) == "not run"
    cells = {"+ x": first, "pairs": second}
    lines = differences(cells, [("+ *", "pairs")], ["pairs", "+ x"], [SCIFACT]).splitlines()
    assert lines[2:] == ["| + x | pairs | +0.300 |"]


def test_a_page_without_figures_says_so_everywhere(tmp_path):
    write_page(tmp_path / "none.csv", tmp_path / "evidence.md", "cpu")
    text = (tmp_path / "evidence.md").read_text()
    assert "{{" not in text
    assert "| small importance recovered | 0 | not run | not run | not run |" in text
    assert text.startswith(page.TEMPLATE.read_text()[:200])


def test_a_page_says_where_the_model_is_ahead_and_where_behind(tmp_path):
    sets = {"a": (0.5, 0.4, 0.6), "b": (0.5, 0.4, 0.6), "c": (0.5, 0.4, 0.6), "mean x": (1, 1, 1)}
    theirs = {
        "a": (0.3, 0.2, 0.39),
        "b": (0.6, 0.5, 0.7),
        "c": (0.8, 0.7, 0.9),
        "mean x": (0, 0, 0),
    }
    lines = [
        "scale,experiment,variant,seed,metric,value,low,high,examples,tokens,minutes,commit,device"
    ]
    shorter = dict.fromkeys(sets, (0.1, 0.0, 0.2))
    systems = {"9 x 64": sets, "bm25": theirs, "MiniLM": sets, "90 x 2": shorter}
    for system, figures in systems.items():
        examples = {"9 x 64": 576, "90 x 2": 180}.get(system, "")
        for name, (value, low, high) in figures.items():
            lines.append(
                f"cpu,nano,{system},0,nDCG@10 {name},{value},{low},{high},{examples},,3,x,y"
            )
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    write_page(tmp_path / "rows.csv", tmp_path / "page.md", "cpu")
    text = (tmp_path / "page.md").read_text()
    assert "| nDCG@10 | drama-nano, 90 x 2 | drama-nano, 9 x 64 | BM25 | all-MiniLM-L6-v2 |" in text
    assert "| a | 0.100 [0.000, 0.200] | 0.500 [0.400, 0.600] | 0.300 [" in text
    assert "Trained, steps x pairs: 90 x 2, 180 pairs, 3 minutes on y; 9 x 64, 576 pairs" in text
    assert "against BM25, intervals apart: ahead on a; behind on 1 sets; neither on b." in text
    assert "against all-MiniLM-L6-v2, intervals apart: ahead on no set; behind on 0 sets;" in text
