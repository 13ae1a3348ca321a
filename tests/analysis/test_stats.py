"""Intervals against scipy, BLEU against sacrebleu, and the paper's own gap closure."""

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis import paper
from analysis.stats import (
    RESAMPLES,
    Draws,
    ExampleScores,
    example_scores,
    gap_closure,
    mean_draws,
    paired_draws,
    resample_weights,
    seed_deviations,
)


def scores(values: np.ndarray, metric: str = "f1") -> ExampleScores:
    return example_scores(pd.DataFrame({"id": range(len(values)), metric: values}), metric)


def correlated(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    difficulty = generator.normal(40, 15, count)
    return difficulty + generator.normal(1, 3, count), difficulty + generator.normal(0, 3, count)


def test_paired_interval_agrees_with_scipy_and_is_narrower_than_unpaired() -> None:
    a, b = correlated()
    left, right = paired_draws([{0: scores(a)}, {0: scores(b)}], "task")
    found = (left - right).estimate()
    theirs = scipy_stats.bootstrap(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), paired=True, method="percentile", n_resamples=4000, rng=0
    )
    assert found.value == pytest.approx(np.mean(a - b))
    assert found.low is not None
    assert found.high is not None
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.15 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.15 * width)
    single = left.estimate()
    assert single.low is not None
    assert single.high is not None
    assert found.high - found.low < 0.5 * (single.high - single.low)


def test_interval_is_the_same_every_time_and_whatever_the_order_of_examples() -> None:
    a, b = correlated(50)
    shuffled = example_scores(pd.DataFrame({"id": range(50), "f1": a}).sample(frac=1, random_state=1), "f1")
    one = [entry.estimate() for entry in paired_draws([{0: scores(a)}, {0: scores(b)}], "task")]
    two = [entry.estimate() for entry in paired_draws([{0: shuffled}, {0: scores(b)}], "task")]
    assert one == two


def test_only_common_examples_and_seeds_are_compared() -> None:
    a, b = correlated(60)
    short = example_scores(pd.DataFrame({"id": range(20, 80), "f1": b}), "f1")
    left, right = paired_draws([{0: scores(a), 5: scores(a + 50)}, {0: short, 7: short}], "task")
    assert left.value == pytest.approx(a[20:].mean())
    assert right.value == pytest.approx(b[:40].mean())
    with pytest.raises(ValueError, match="seed"):
        paired_draws([{0: scores(a)}, {1: scores(a)}], "task")
    with pytest.raises(ValueError, match="example"):
        paired_draws([{0: scores(a)}, {0: example_scores(pd.DataFrame({"id": ["z"], "f1": [1.0]}), "f1")}], "task")


def test_seeds_that_disagree_widen_the_interval() -> None:
    a, b = correlated()
    steady = paired_draws([dict.fromkeys(range(3), scores(a)), dict.fromkeys(range(3), scores(b))], "task")
    unsteady = paired_draws(
        [{seed: scores(a + shift) for seed, shift in enumerate((-4, 0, 4))}, dict.fromkeys(range(3), scores(b))], "task"
    )
    narrow, wide = ((pair[0] - pair[1]).estimate() for pair in (steady, unsteady))
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high is not None
    assert wide.low is not None
    assert narrow.high is not None
    assert narrow.low is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_where_seeds_differ_and_points_do_not_few_intervals_say_that_they_do(seeds: int) -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(40, 10, 300)
    missed = 0
    for _ in range(300):
        runs = [
            {seed: scores(difficulty + generator.normal(0, 2, 300) + generator.normal(0, 1)) for seed in range(seeds)}
            for _ in range(2)
        ]
        left, right = paired_draws(runs, "task")
        found = (left - right).estimate()
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 0 <= found.high
    assert missed / 300 == pytest.approx(0.05, abs=0.03)


def test_the_mean_of_seeds_is_off_by_students_t() -> None:
    values = np.array([30.0, 31.0, 35.0])
    off = seed_deviations(3) @ (values - values.mean())
    expected = scipy_stats.t(2, scale=values.std(ddof=1) / np.sqrt(3))
    assert scipy_stats.kstest(off, expected.cdf).pvalue > 0.01
    assert seed_deviations(1).tolist() == [[0.0]] * RESAMPLES


def test_examples_are_the_same_if_their_references_are() -> None:
    frame = pd.DataFrame({"id": ["a", "b", "c"], "f1": [10.0, 20.0, 60.0], "references": [["x"], ["y", "z"], ["w"]]})
    other = frame.assign(references=[["x"], ["yz"], ["w"]], f1=[0.0, 0.0, 0.0])
    left, right = paired_draws([{0: example_scores(frame, "f1")}, {0: example_scores(other, "f1")}], "task")
    assert (left - right).value == pytest.approx((10 + 60) / 2)


def test_mean_over_tasks_has_the_variance_of_independent_parts() -> None:
    a, b = correlated()
    parts = [paired_draws([{0: scores(values)}], stream)[0] for values, stream in ((a, "one"), (b, "two"))]
    mean = mean_draws(parts)
    assert mean.value == pytest.approx((a.mean() + b.mean()) / 2)
    # a and b are strongly correlated by example: were the tasks' resamples shared, this would be far off.
    expected = np.sqrt(np.var(a) / len(a) + np.var(b) / len(b)) / 2
    assert mean.draws.std() == pytest.approx(expected, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.text(max_size=5))
def test_every_resample_draws_as_many_units_as_there_are(count: int, stream: str) -> None:
    weights = resample_weights(count, stream)
    assert (weights.sum(axis=1) == count).all()
    assert weights.min() >= 0


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "."]), min_size=0, max_size=12).map(" ".join)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=8))
def test_bleu_of_the_full_sample_is_sacrebleus_corpus_score(pairs: list[tuple[str, str]]) -> None:
    rows = []
    for prediction, reference in pairs:
        one = sacrebleu.corpus_bleu([prediction], [[reference]], tokenize="intl")
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    found = example_scores(pd.DataFrame({"id": range(len(rows)), "bleu_stats": rows}), "bleu")
    predictions, references = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize="intl").score
    assert found.score == pytest.approx(expected, abs=1e-9)
    assert paired_draws([{0: found}], "task")[0].value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (pd.DataFrame({"id": [1], "rouge1": [1.0]}), '"f1" is missing'),
        (pd.DataFrame({"f1": [1.0]}), '"id" is missing'),
        (pd.DataFrame({"id": [1, 1], "f1": [1.0, 2.0]}), "twice"),
        (pd.DataFrame({"id": [1], "f1": [float("nan")]}), "not finite"),
        (pd.DataFrame({"id": [], "f1": []}), "no examples"),
    ],
)
def test_malformed_examples_are_refused(frame: pd.DataFrame, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        example_scores(frame, "f1")


def test_malformed_bleu_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="10 numbers"):
        example_scores(pd.DataFrame({"id": [1], "bleu_stats": [[1, 2, 3]]}), "bleu")


def test_the_papers_gap_closure_comes_out_of_its_table_by_our_function() -> None:
    assert paper.closure_by_printed_averages() == pytest.approx(83.3, abs=0.05)
    assert paper.closure_by_row_means() == pytest.approx(87.5, abs=0.05)
    assert paper.TABLE_1["MQA-XXL"].average == pytest.approx(46.76, abs=0.005)
    assert paper.speedup("MQA-XXL") == pytest.approx(6.3, abs=0.05)
    assert paper.speedup("GQA-8-XXL") == pytest.approx(5.4, abs=0.05)


def test_gap_closure_works_on_draws() -> None:
    assert gap_closure(np.array([10.0, 20.0]), np.array([0.0, 10.0]), np.array([5.0, 20.0])).tolist() == [50.0, 100.0]


def test_draws_interval_is_the_percentile_interval() -> None:
    estimate = Draws(0.5, np.linspace(0, 1, 1001)).estimate()
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.025, 0.975))
