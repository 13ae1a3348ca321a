"""What an output is worth: ROUGE, BLEU and TriviaQA's scores, each with what later comparisons need.

The scoring choices are the defaults of the paper's authors' public T5 code; the paper itself names none, and ROUGE and
BLEU values mean little without them. Every metric keeps, beside its value, a record per example, so that two systems
can be compared on the same examples long after their models are gone.

The metrics are `evaluate.Metric` subclasses defined here, not fetched from a hub: nothing needs a network.
"""

import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from sacrebleu.metrics.bleu import BLEU

from gqa_exp.errors import InputError, suggest

ROUGE_TYPES = ("rouge1", "rouge2", "rougeLsum")
BLEU_SMOOTHING = "exp"
NGRAM_ORDER = 4
TRIVIA_QA_PUNCTUATION = string.punctuation + "‘’´`"  # noqa: RUF001
"""Turned to spaces: TriviaQA's own scorer and T5's (google-research/text-to-text-transfer-transformer, qa_utils.py)."""


@dataclass(frozen=True)
class Scores:
    """The scores of one set of predictions; values are percentages, 0 to 100.

    Attributes:
        metrics: metric name to value over all examples.
        per_example: metric name to one value per example, in the order of the predictions; BLEU has none, since it is
            not a mean over examples.
        bleu_stats: per example, sacrebleu's sufficient statistics: [output length, reference length, matching n-grams
            for n = 1..4, output n-grams for n = 1..4]; None where the task has no BLEU.
    """

    metrics: dict[str, float]
    per_example: dict[str, list[float]]
    bleu_stats: list[list[int]] | None = None

    @property
    def num_examples(self) -> int:
        """Number of examples that were scored."""
        return len(self.bleu_stats if self.bleu_stats is not None else next(iter(self.per_example.values())))


def check_examples(count: int, references: Sequence[Sequence[str]]) -> None:
    """Check that there is something to score, and that every output has references.

    Args:
        count: number of predictions (or of the inputs they will be made from).
        references: the accepted texts of each example.

    Raises:
        InputError: no examples, different counts, or an example whose references are missing or a bare string.
    """
    if count != len(references):
        raise InputError(f"{count} examples but {len(references)} lists of references; give one list per example")
    if count == 0:
        raise InputError("there are no examples to score; give at least one prediction with its references")
    for index, texts in enumerate(references):
        # A bare string would pass for a list of one-letter references.
        if isinstance(texts, str) or not texts:
            raise InputError(f"references of example {index} are {texts!r}; give a list of at least one text")


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of texts against one or more reference texts each; what the metrics below share.

    `compute` returns the metric's values by name and, under "per_example" and "bleu_stats", what `Scores` documents.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: list of str; references: list of lists of str",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        check_examples(len(predictions), references)
        return self.score_texts(predictions, references)

    def score_texts(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The metric itself, on checked input."""
        raise NotImplementedError


class Rouge(TextMetric):
    """ROUGE-1, -2 and -Lsum: F-measure of rouge_score without stemmer, the best reference counting for each type.

    The value is the plain mean over examples. Beside it stands, as NAME_mid, the median of bootstrapped means that T5's
    code reports; the metric's seed fixes it, where rouge_score alone draws from numpy's unseeded global generator.
    """

    def score_texts(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """See the class."""
        scorer, aggregator = RougeScorer(ROUGE_TYPES, use_stemmer=False), BootstrapAggregator()
        per_example: dict[str, list[float]] = {name: [] for name in ROUGE_TYPES}
        for prediction, texts in zip(predictions, references, strict=True):
            best = scorer.score_multi([split_sentences(text) for text in texts], split_sentences(prediction))
            aggregator.add_scores(best)
            for name in ROUGE_TYPES:
                per_example[name].append(100.0 * float(best[name].fmeasure))
        mids = {f"{name}_mid": 100.0 * float(entry.mid.fmeasure) for name, entry in aggregator.aggregate().items()}
        return {**means(per_example), **mids, "per_example": per_example}


class Bleu(TextMetric):
    """Corpus BLEU of sacrebleu: "intl" tokens, cased, exponential smoothing of empty n-gram orders."""

    def score_texts(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """See the class."""
        # effective_order touches only the sentence score, which is not used; unset, every call would log a warning.
        counter = BLEU(tokenize="intl", smooth_method=BLEU_SMOOTHING, effective_order=True)
        stats = []
        for prediction, texts in zip(predictions, references, strict=True):
            counts = counter.sentence_score(prediction, texts)
            stats.append([counts.sys_len, counts.ref_len, *counts.counts, *counts.totals])
        return {"bleu": bleu_of(np.sum(stats, axis=0)), "per_example": {}, "bleu_stats": stats}


class TriviaQa(TextMetric):
    """Exact match and token F1 of TriviaQA's normalised answers, each the maximum over the accepted answers.

    As in T5's code, its oddity included: where an accepted answer is made of nothing but punctuation or articles, an
    empty prediction matches it exactly, with an F1 of 0.
    """

    def score_texts(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """See the class."""
        per_example: dict[str, list[float]] = {"exact_match": [], "f1": []}
        for prediction, texts in zip(predictions, references, strict=True):
            answer, accepted = normalize_answer(prediction), [normalize_answer(text) for text in texts]
            per_example["exact_match"].append(100.0 * (answer in accepted))
            per_example["f1"].append(100.0 * max(token_f1(answer, text) for text in accepted))
        return {**means(per_example), "per_example": per_example}


METRIC_OF_KIND: dict[str, tuple[type[TextMetric], str]] = {
    "summarization": (Rouge, "rouge1"),
    "translation": (Bleu, "bleu"),
    "question answering": (TriviaQa, "f1"),
}
"""Task kind to its metric class and the name of its primary value (the paper's choices, Table 1)."""


def split_sentences(text: str) -> str:
    """The text with line breaks between sentences, which ROUGE-Lsum reads: T5's literal replacement, no more."""
    return text.replace(" . ", " .\n")


def normalize_answer(text: str) -> str:
    """TriviaQA's normal form: lower case, punctuation to spaces, no a/an/the, single spaces."""
    text = text.lower().translate({ord(mark): " " for mark in TRIVIA_QA_PUNCTUATION})
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, reference: str) -> float:
    """F1 (0 to 1) between the bags of tokens of two normalised answers; 0 when they share none."""
    answer_tokens, reference_tokens = answer.split(), reference.split()
    shared = (Counter(answer_tokens) & Counter(reference_tokens)).total()
    return 2.0 * shared / (len(answer_tokens) + len(reference_tokens)) if shared else 0.0


def bleu_of(stats: npt.NDArray[np.int64]) -> float:
    """Corpus BLEU from summed sufficient statistics (laid out as in `Scores.bleu_stats`), by sacrebleu."""
    output_length, reference_length, *counts = stats.tolist()
    result = BLEU.compute_bleu(
        counts[:NGRAM_ORDER], counts[NGRAM_ORDER:], output_length, reference_length, smooth_method=BLEU_SMOOTHING
    )
    return float(result.score)


def means(per_example: dict[str, list[float]]) -> dict[str, float]:
    """The plain mean of each column."""
    return {name: float(np.mean(values)) for name, values in per_example.items()}


def metric_of_kind(kind: str) -> tuple[type[TextMetric], str]:
    """The entry of `METRIC_OF_KIND`.

    Raises:
        InputError: the kind is unknown.
    """
    if kind not in METRIC_OF_KIND:
        raise InputError(f'task kind "{kind}" is unknown; {suggest(kind, METRIC_OF_KIND)}')
    return METRIC_OF_KIND[kind]


def primary(kind: str) -> str:
    """Name of the value that stands for a task of this kind: rouge1, bleu or f1.

    Raises:
        InputError: the kind is unknown.
    """
    return metric_of_kind(kind)[1]


def score(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score predictions with the metric of their task's kind.

    Args:
        kind: "summarization", "translation" or "question answering".
        predictions: one text per example; it may be empty.
        references: the accepted texts of each example, at least one.

    Raises:
        InputError: unknown kind, no examples, different counts, an example without references.
    """
    metric_class, _ = metric_of_kind(kind)
    check_examples(len(predictions), references)
    # Even in memory, `evaluate` makes a cache folder; a passing one keeps it out of the user's home. The seed is what
    # `evaluate` sets numpy's global generator to while computing, and restores afterwards.
    with tempfile.TemporaryDirectory() as folder:
        metric = metric_class(keep_in_memory=True, cache_dir=folder, seed=0)
        values = metric.compute(predictions=list(predictions), references=[list(texts) for texts in references])
    return Scores(per_example=values.pop("per_example"), bleu_stats=values.pop("bleu_stats", None), metrics=values)


def bootstrap_interval(
    scores: Scores, metric: str, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric over the evaluated examples (Efron 1979; for BLEU, Koehn 2004).

    It tells how far the value may lie from that of other examples of the same kind, for this one trained model; what
    another seed or another base would change is not in it.

    Args:
        scores: what `score` returned.
        metric: a name in `scores.per_example`, or "bleu".
        confidence: probability that the interval is to cover.
        resamples: sets of examples drawn with replacement.
        seed: fixes the draws.

    Returns:
        The low and high end, in the metric's unit.

    Raises:
        InputError: `scores` has no record per example for the metric.
    """
    table = _table(scores, metric)
    return _interval([_value(metric, drawn) for drawn in _resampled(table, resamples, seed)], confidence)


def paired_bootstrap(
    a: Scores, b: Scores, metric: str, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two systems on the same examples, with its paired bootstrap interval (Koehn 2004).

    Both systems are scored on the same drawn examples, so that what makes an example hard for both cancels.

    Args:
        a: scores of one system.
        b: scores of the other, for the same examples in the same order.
        metric: a name in `per_example` of both, or "bleu".
        confidence: probability that the interval is to cover.
        resamples: sets of examples drawn with replacement.
        seed: fixes the draws.

    Returns:
        a minus b on all examples, and the low and high end of its interval.

    Raises:
        InputError: different numbers of examples, or no record per example for the metric.
    """
    table_a, table_b = _table(a, metric), _table(b, metric)
    if len(table_a) != len(table_b):
        raise InputError(
            f"a paired test needs the same examples, but one side has {len(table_a)}, other {len(table_b)}"
        )
    width = table_a.shape[1]

    def difference(rows: npt.NDArray[Any]) -> float:
        return _value(metric, rows[:, :width]) - _value(metric, rows[:, width:])

    table = np.hstack([table_a, table_b])
    low, high = _interval([difference(drawn) for drawn in _resampled(table, resamples, seed)], confidence)
    return difference(table), low, high


def _table(scores: Scores, metric: str) -> npt.NDArray[Any]:
    """(examples, columns): what `_value` needs of each example."""
    if metric == "bleu" and scores.bleu_stats is not None:
        return np.asarray(scores.bleu_stats, dtype=np.int64)
    if metric not in scores.per_example:
        known = [*scores.per_example, *(["bleu"] if scores.bleu_stats is not None else [])]
        raise InputError(f'there are no scores per example for metric "{metric}"; {suggest(metric, known)}')
    return np.asarray(scores.per_example[metric], dtype=np.float64)[:, None]


def _value(metric: str, rows: npt.NDArray[Any]) -> float:
    """The metric over a set of examples, given as rows of `_table`."""
    return bleu_of(rows.sum(axis=0)) if metric == "bleu" else float(rows.mean())


def _resampled(table: npt.NDArray[Any], resamples: int, seed: int) -> Iterator[npt.NDArray[Any]]:
    """Sets of as many rows as the table has, drawn with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield table[generator.integers(len(table), size=len(table))]


def _interval(values: list[float], confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)
