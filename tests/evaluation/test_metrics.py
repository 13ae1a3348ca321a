"""Every metric against its library or a second statement of its rules; intervals against scipy and sacrebleu."""

import random
from itertools import groupby, zip_longest
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from gqa_exp.errors import InputError
from gqa_exp.evaluation.metrics import (
    ROUGE_TYPES,
    Bleu,
    Scores,
    TextMetric,
    bootstrap_interval,
    paired_bootstrap,
    primary,
    score,
)

KINDS = ("summarization", "translation", "question answering")
SPECIALS = [*"aA.,!?\u2019`_ \n\t-—ßéü本٣", " . ", " the ", "An ", "can't", "\N{COMBINING ACUTE ACCENT}"]
# Free text alone would hardly ever overlap with its reference, so that most scores would be a trivial 0.
words = st.sampled_from(["the", "cat", "sat", "on", "mat", "a", "an", "Haus", "über", "3.5", "."])
texts = st.one_of(
    st.lists(words, max_size=12).map(" ".join),
    st.lists(st.sampled_from(SPECIALS), max_size=12).map("".join),
    st.text(max_size=12),
)
case = st.tuples(texts, st.lists(texts, min_size=1, max_size=3))
cases, many_cases = st.lists(case, min_size=1, max_size=4), st.lists(case, min_size=1, max_size=25)
plain_words = st.lists(st.sampled_from(["cat", "sat", "mat", "dog", "ran"]), min_size=4, max_size=9).map(" ".join)
plain_pairs = st.lists(st.tuples(plain_words, plain_words), min_size=1, max_size=5)
light = settings(max_examples=30, deadline=None)
fewer = settings(max_examples=10, deadline=None)  # ROUGE bootstraps its means at every call


def split(pairs: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [prediction for prediction, _ in pairs], [references for _, references in pairs]


def library_bleu(predictions: list[str], references: list[list[str]]) -> float:
    streams = [list(stream) for stream in zip_longest(*references)]
    return sacrebleu.corpus_bleu(predictions, streams, smooth_method="exp", tokenize="intl", lowercase=False).score


@fewer
@given(many_cases)
def test_rouge_is_the_library_s(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, references = split(pairs)
    scores = score("summarization", predictions, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    for i, (prediction, accepted) in enumerate(pairs):
        alone = [scorer.score(text.replace(" . ", " .\n"), prediction.replace(" . ", " .\n")) for text in accepted]
        for name in ROUGE_TYPES:
            assert scores.per_example[name][i] == pytest.approx(100 * max(entry[name].fmeasure for entry in alone))
    for name in ROUGE_TYPES:
        assert scores.metrics[name] == pytest.approx(sum(scores.per_example[name]) / len(pairs))


def test_rouge_lsum_reads_sentences_and_nothing_is_stemmed() -> None:
    # The sentences are swapped: as one line the longest common subsequence is 3 of 6 tokens, by sentence all 6.
    swapped = score("summarization", ["dogs ran fast . cats sat down"], [["cats sat down . dogs ran fast"]])
    assert swapped.metrics["rougeLsum"] == pytest.approx(100)
    assert score("summarization", ["dogs running"], [["dog runs"]]).metrics["rouge1"] == 0


def test_rouge_mid_is_the_aggregator_s_under_the_seed_and_leaves_numpy_s_generator_alone() -> None:
    predictions = ["the cat sat", "dogs ran away", "a mat", "", "one two three"]
    references = [["the cat sat down"], ["the dogs ran"], ["a mat"], ["nothing"], ["three two one"]]
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    metrics = score("summarization", predictions, references).metrics
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(0)
    aggregator, scorer = BootstrapAggregator(), RougeScorer(ROUGE_TYPES)
    for prediction, [reference] in zip(predictions, references, strict=True):
        aggregator.add_scores(scorer.score(reference, prediction))
    for name, entry in aggregator.aggregate().items():
        assert metrics[f"{name}_mid"] == pytest.approx(100 * entry.mid.fmeasure)


@light
@given(cases)
def test_bleu_is_the_library_s(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, references = split(pairs)
    assert score("translation", predictions, references).metrics["bleu"] == pytest.approx(
        library_bleu(predictions, references)
    )


def test_bleu_is_cased_and_uses_international_tokens() -> None:
    reference = [["Das Haus kostet 100€ im Monat"]]
    assert score("translation", ["das haus kostet 100€ im monat"], reference).metrics["bleu"] < 50
    # "intl" splits the currency sign from the number; the default tokenizer does not and sees other tokens.
    spaced = "Das Haus kostet 100 € im Monat"
    assert score("translation", [spaced], reference).metrics["bleu"] == pytest.approx(100)
    assert sacrebleu.corpus_bleu([spaced], [["Das Haus kostet 100€ im Monat"]]).score < 100


def restated_normal_form(text: str) -> str:
    """TriviaQA's rules once more, by runs of word characters in place of a regular expression."""
    marks = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2018\u2019\u00b4")
    spaced = "".join(" " if character in marks else character for character in text.lower())
    runs = ("".join(run) for _, run in groupby(spaced, key=str.isalnum))
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


def restated_f1(answer: list[str], reference: list[str]) -> float:
    left, shared = list(reference), 0
    for token in answer:
        if token in left:
            left.remove(token)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


@light
@given(cases)
def test_trivia_qa_is_its_rules_restated(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, references = split(pairs)
    scores = score("question answering", predictions, references)
    for i, (prediction, accepted) in enumerate(pairs):
        answer, forms = restated_normal_form(prediction), [restated_normal_form(text) for text in accepted]
        exact = any(answer == form for form in forms)
        assert scores.per_example["exact_match"][i] == 100 * exact
        best = max(restated_f1(answer.split(), form.split()) for form in forms)
        assert scores.per_example["f1"][i] == pytest.approx(100 * best)


@pytest.mark.parametrize(
    ("prediction", "accepted", "exact_match", "f1"),
    [
        ("The Beatles!", ["beatles"], 100, 100),
        ("a Rock\u2019n\u2019Roll band", ["Rock 'n' Roll"], 0, 100 * 6 / 7),  # precision 3/4, recall 1
        ("new york city", ["NYC", "New York"], 0, 80),  # the better alias: precision 2/3, recall 1
        ("ha ha ha", ["ha"], 0, 50),  # a token matches once: precision 1/3, recall 1
        ("snake_case", ["snake  case"], 100, 100),
        ("Theatre", ["atre"], 0, 0),  # an article only as a word
        ("U.S.A.", ["USA"], 0, 0),  # punctuation becomes a space: "u s" + the article "a", which goes
        ("U.S.A.", ["u s"], 100, 100),
        ("Paris", ["London", "paris."], 100, 100),
        ("", ["Paris"], 0, 0),
        ("the", ["The"], 100, 0),  # TriviaQA's own oddity: equal, but no token to share
        ("", ["Paris", "The"], 100, 0),  # the same with nothing said
    ],
)
def test_trivia_qa_worked_by_hand(prediction: str, accepted: list[str], exact_match: float, f1: float) -> None:
    metrics = score("question answering", [prediction], [accepted]).metrics
    assert metrics == pytest.approx({"exact_match": exact_match, "f1": f1})


@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_depend_on_order_and_perfect_is_100_and_empty_is_0(kind: str) -> None:
    @fewer
    @given(plain_pairs, st.randoms(use_true_random=False))
    def check(pairs: list[tuple[str, str]], shuffler: random.Random) -> None:
        predictions, references = [p for p, _ in pairs], [[r] for _, r in pairs]
        order = list(range(len(pairs)))
        shuffler.shuffle(order)
        straight = score(kind, predictions, references)
        shuffled = score(kind, [predictions[i] for i in order], [references[i] for i in order])
        own = set(straight.metrics) - {f"{name}_mid" for name in ROUGE_TYPES}
        assert {n: shuffled.metrics[n] for n in own} == pytest.approx({n: straight.metrics[n] for n in own})
        for name, values in straight.per_example.items():
            assert shuffled.per_example[name] == [values[i] for i in order]
        perfect = score(kind, predictions, [["something else", p] for p in predictions]).metrics
        assert perfect == pytest.approx(dict.fromkeys(perfect, 100.0))
        empty = score(kind, [""] * len(pairs), references).metrics
        assert empty == dict.fromkeys(empty, 0.0)
        assert primary(kind) in empty

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind: str) -> None:
    for predictions, references, message in [
        ([], [], "no examples"),
        (["a", "b"], [["a"]], "2 examples but 1 lists"),
        (["a"], [[]], "example 0"),
        (["a"], ["a"], "example 0"),
    ]:
        with pytest.raises(InputError, match=message):
            score(kind, predictions, references)  # type: ignore[arg-type]


def test_unknown_kind_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match='did you mean "summarization"'):
        score("summarisation", ["a"], [["a"]])


def test_works_as_an_evaluate_metric_batch_by_batch(tmp_path: Path) -> None:
    metric = Bleu(keep_in_memory=True, cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    assert isinstance(metric, TextMetric)
    metric.add_batch(predictions=["the cat sat on the mat"], references=[["the cat sat on a mat"]])
    metric.add_batch(predictions=["dogs"], references=[["the dogs", "dogs"]])
    expected = library_bleu(["the cat sat on the mat", "dogs"], [["the cat sat on a mat"], ["the dogs", "dogs"]])
    assert metric.compute()["bleu"] == pytest.approx(expected)
    with pytest.raises(InputError, match="no examples"):
        metric.compute(predictions=[], references=[])


def test_nothing_is_left_in_evaluate_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache))
    score("translation", ["a"], [["a"]])
    assert not cache.exists()


def random_translations(seed: int, count: int = 60) -> tuple[list[str], list[list[str]]]:
    """References of 8 to 14 words, and copies of them in which a share of the words, different for each, is wrong."""
    generator = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(count):
        reference = generator.integers(50, size=generator.integers(8, 15))
        kept = generator.random(len(reference)) < generator.uniform(0.5, 1.0)
        predictions.append(" ".join(f"w{word}" if keep else "x" for word, keep in zip(reference, kept, strict=True)))
        references.append([" ".join(f"w{word}" for word in reference)])
    return predictions, references


def test_interval_of_a_mean_is_scipy_s() -> None:
    values = np.random.default_rng(0).beta(0.5, 0.8, size=80) * 100
    scores = Scores({"f1": float(values.mean())}, {"f1": values.tolist()})
    ours = bootstrap_interval(scores, "f1", confidence=0.9, resamples=5000, seed=1)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=5000, method="percentile", rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx(tuple(theirs), abs=0.05 * width)
    assert bootstrap_interval(scores, "f1", confidence=0.9, resamples=5000, seed=1) == ours


def test_interval_of_bleu_is_sacrebleu_s() -> None:
    predictions, references = random_translations(0)
    scores = score("translation", predictions, references)
    low, high = bootstrap_interval(scores, "bleu", resamples=2000)
    sacre = sacrebleu.BLEU(tokenize="intl")
    theirs = sacre.corpus_score(predictions, [[text for [text] in references]], n_bootstrap=2000)
    assert low < scores.metrics["bleu"] < high
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    assert (high + low) / 2 == pytest.approx(theirs._mean, abs=0.1 * theirs._ci)


@light
@given(cases)
def test_bleu_statistics_add_up_to_corpus_bleu(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, references = split(pairs)
    scores = score("translation", predictions, references)
    assert scores.bleu_stats is not None
    assert scores.num_examples == len(pairs)
    total = [sum(column) for column in zip(*scores.bleu_stats, strict=True)]
    recomputed = sacrebleu.BLEU.compute_bleu(total[2:6], total[6:], total[0], total[1], smooth_method="exp")
    assert recomputed.score == pytest.approx(library_bleu(predictions, references))
    # One example can only be drawn as itself.
    one = score("translation", predictions[:1], references[:1])
    assert bootstrap_interval(one, "bleu", resamples=3) == pytest.approx((one.metrics["bleu"],) * 2)


def test_paired_bootstrap_of_means_is_scipy_s() -> None:
    generator = np.random.default_rng(3)
    hard = generator.uniform(0, 80, size=70)
    a, b = hard + generator.normal(6, 4, size=70), hard + generator.normal(4, 4, size=70)
    wrapped = [Scores({}, {"rouge1": values.tolist()}) for values in (a, b)]
    difference, low, high = paired_bootstrap(wrapped[0], wrapped[1], "rouge1", resamples=5000)
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y: x.mean() - y.mean(), paired=True, vectorized=False, method="percentile",
        n_resamples=5000, rng=4,
    ).confidence_interval  # fmt: skip
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.05 * (theirs.high - theirs.low))


def test_paired_bootstrap_cancels_what_both_share() -> None:
    values = np.linspace(0, 90, 40)
    a, b = Scores({}, {"f1": (values + 5).tolist()}), Scores({}, {"f1": values.tolist()})
    assert paired_bootstrap(a, b, "f1", resamples=50) == pytest.approx((5, 5, 5))


def test_paired_bootstrap_of_bleu() -> None:
    (worse, references), (better, same) = random_translations(5), random_translations(5)
    assert references == same
    better[:20] = [text for [text] in references[:20]]
    a, b = score("translation", better, references), score("translation", worse, references)
    difference, low, high = paired_bootstrap(a, b, "bleu")
    assert difference == pytest.approx(library_bleu(better, references) - library_bleu(worse, references))
    assert 0 < low < difference < high
    assert paired_bootstrap(a, a, "bleu", resamples=20) == (0, 0, 0)


def test_intervals_name_what_they_lack() -> None:
    short, long = Scores({}, {"f1": [1.0]}), Scores({}, {"f1": [1.0, 2.0]})
    with pytest.raises(InputError, match="same examples"):
        paired_bootstrap(short, long, "f1")
    with pytest.raises(InputError, match=r'"bleu".*known: f1'):
        bootstrap_interval(short, "bleu")
