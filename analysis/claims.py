"""What the rows let one say, each sentence with its evidence and a verdict, and never more than the data carry.

A claim is a one-sided statement. "supported": its interval lies wholly on the claim's side. "not supported": wholly on
the other side, or, for times, within the noise floor, which counts as no difference. "cannot tell": the interval holds
both, or there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.stats import Estimate
from analysis.study import Point, Study, Task, number
from analysis.tables import markdown, with_interval

Verdict = Literal["supported", "not supported", "cannot tell"]
SECTIONS = (
    "Time",
    "Quality against MHA",
    "Uptraining",
    "The gap between MQA and MHA",
    "MHA against trivial baselines",
)


@dataclass(frozen=True)
class Claim:
    """A statement, what the rows say about it, and whether they bear it out."""

    section: str
    statement: str
    evidence: str
    verdict: Verdict


def side(estimate: Estimate, threshold: float = 0.0) -> int:
    """Which side of the threshold the whole interval lies on: 1 above, -1 below, 0 if it holds it or there is none."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > threshold) - int(estimate.high < threshold)


def verdict(found: int, claimed: int) -> Verdict:
    """Verdict on a claim about a side (1 or -1), given the side that was found (0: neither)."""
    if found == 0:
        return "cannot tell"
    return "supported" if found == claimed else "not supported"


def ratio_verdict(ratio: Estimate, noise_floor: float | None) -> tuple[Verdict, str]:
    """Verdict on "the ratio of two times is above 1".

    Args:
        ratio: with its interval.
        noise_floor: the A/A run's deviation of a ratio from 1; None if it was not measured.

    Returns:
        The verdict, and the reason to show behind the number.
    """
    if noise_floor is None:
        return "cannot tell", "noise floor not measured"
    if abs(ratio.value - 1) <= noise_floor:
        return "not supported", f"no difference: within the noise floor of {100 * noise_floor:.1f} %"
    return verdict(side(ratio, 1.0), 1), f"noise floor {100 * noise_floor:.1f} %"


def time_claims(study: Study) -> list[Claim]:
    """Each architecture against MHA, each GQA against MQA; once per architecture, since time knows no proportion."""
    claims: list[Claim] = []
    timed: dict[tuple[object, ...], Point] = {}
    for point in study.points:
        if point.time_estimate("speedup") is not None:
            variant = point.variant
            timed[(variant.model, variant.base, variant.num_kv_heads)] = point
    for (model, base, _), point in timed.items():
        variant, speedup = point.variant, point.time_estimate("speedup")
        if variant.is_mha or speedup is None:
            continue
        floor = number(point.time.get("noise_floor"))
        judged, reason = ratio_verdict(speedup, floor)
        evidence = f"{with_interval(speedup, 2)} times MHA's speed end to end; {reason}"
        step = number(point.time.get("decode_step_speedup"))
        if step is not None:
            evidence += f"; one decode step alone {step:.2f} times"
        name = _architecture(study, point)
        claims.append(Claim("Time", f"{name} needs less time per sample than MHA", evidence, judged))
        mqa = next((p for k, p in timed.items() if k[:2] == (model, base) and p.variant.is_mqa), None)
        fastest = mqa.time_estimate("speedup") if mqa else None
        if mqa is point or fastest is None:
            continue
        # The rows hold ratios to MHA only; dividing the far ends gives an interval too wide rather than too narrow.
        low = fastest.low / speedup.high if fastest.low and speedup.high else None
        high = fastest.high / speedup.low if fastest.high and speedup.low else None
        ratio = Estimate(fastest.value / speedup.value, low, high)
        judged, reason = ratio_verdict(ratio, floor)
        evidence = f"{with_interval(ratio, 2)} times MQA's time (interval from the ends of two); {reason}"
        claims.append(Claim("Time", f"{name} needs more time per sample than MQA", evidence, judged))
    return claims


def _architecture(study: Study, point: Point) -> str:
    several = len({each.variant.model for each in study.points}) > 1
    return f"{point.variant.label}-{point.variant.model}" if several else point.variant.label


def _tasks(study: Study) -> list[Task | None]:
    """The mean over tasks (None) first, where there is one."""
    return [None, *study.tasks] if study.has_mean else list(study.tasks)


def _where(task: Task | None) -> str:
    return f"on {task.title}" if task else "in the mean over tasks"


def _points(estimate: Estimate) -> str:
    found = {1: "distinguishable", -1: "distinguishable", 0: "not distinguishable"}[side(estimate)]
    if estimate.low is None:
        found = "no paired interval: no per-example scores in common"
    return f"{with_interval(estimate, 2, sign=True)} points; {found}"


def _lost(points: Sequence[Point], task: Task | None) -> str:
    """Which of the compared points have runs that did not finish, and are compared by the others."""
    return "".join(f"; {point.name}: {lost}" for point in points if (lost := point.lost(task)))


def quality_claims(study: Study) -> list[Claim]:
    """Each point with fewer KV heads against MHA of the same proportion, per task: hidden failures are looked for."""
    claims = []
    for point in study.points:
        reference = study.reference(point)
        if point.variant.is_mha or reference is None:
            continue
        for task in _tasks(study):
            difference = study.difference(point, reference, task)
            if difference is not None:
                statement = f"{point.name} scores below {reference.name} {_where(task)}"
                evidence = _points(difference) + _lost([point, reference], task)
                claims.append(Claim("Quality against MHA", statement, evidence, verdict(side(difference), -1)))
    return claims


def uptraining_claims(study: Study) -> list[Claim]:
    """Each uptrained point against itself right after conversion, with MHA's own gain from the steps beside."""
    claims = []
    for point in study.points:
        start = study.sibling(point, proportion=0.0)
        if start is None or start is point:
            continue
        mha, mha_start = study.reference(point), study.mha(point, 0.0)
        for task in _tasks(study):
            gain = study.difference(point, start, task)
            if gain is None:
                continue
            evidence = _points(gain) + _lost([point, start], task)
            own = study.difference(mha, mha_start, task) if mha and mha_start else None
            if own is not None:
                evidence += f"; MHA gains {with_interval(own, 2, sign=True)} from the same steps"
            statement = f"{point.name} scores above {start.name} {_where(task)}"
            claims.append(Claim("Uptraining", statement, evidence, verdict(side(gain), 1)))
    return claims


def closure_claims(study: Study) -> list[Claim]:
    """How much of the MQA-to-MHA gap each GQA point closes, at the same proportion, method and base."""
    section, claims = SECTIONS[3], []
    for gqa in study.points:
        v, mha = gqa.variant, study.reference(gqa)
        if v.is_mha or v.is_mqa or mha is None:
            continue
        alike = (v.model, v.base, v.method, v.proportion)
        mqa = study.find(lambda o, alike=alike: o.is_mqa and (o.model, o.base, o.method, o.proportion) == alike)  # type: ignore[misc]
        if mqa is None:
            continue
        for task in _tasks(study):
            closure = study.closure(mha, mqa, gqa, task)
            if closure is None:
                continue
            gap, share = closure
            statement = f"{gqa.name} closes a part of the gap between MQA and MHA {_where(task)}"
            evidence = f"gap {with_interval(gap, 2)} points{_lost([mha, mqa, gqa], task)}"
            if side(gap) <= 0:
                evidence += "; no gap that the data can see, so no share of it"
                judged: Verdict = "cannot tell" if side(gap) == 0 else "not supported"
            else:
                evidence += f"; {with_interval(share, 0)} % of it closed"
                judged = verdict(side(share), 1)
            claims.append(Claim(section, statement, evidence, judged))
    return claims


def baseline_claims(study: Study) -> list[Claim]:
    """MHA against each task's trivial baselines: what its scores are worth before variants are compared."""
    claims = []
    for point in study.points:
        for task in study.tasks if point.variant.is_mha else ():
            for name in study.baselines(task):
                difference = study.over_baseline(point, task, name)
                if difference is not None:
                    statement = f"{point.name} scores above the {name} baseline {_where(task)}"
                    claims.append(Claim(SECTIONS[4], statement, _points(difference), verdict(side(difference), 1)))
    return claims


def all_claims(study: Study) -> list[Claim]:
    """Every claim the rows speak to, section by section."""
    quality = [*quality_claims(study), *uptraining_claims(study), *closure_claims(study), *baseline_claims(study)]
    return [*time_claims(study), *quality]


def claims_markdown(claims: list[Claim]) -> str:
    """The claims as Markdown, one table per section."""
    parts = ["# Claims\n"]
    if not claims:
        parts.append("The rows hold no two points that could be compared.\n")
    for section in SECTIONS:
        rows = [[claim.statement, claim.evidence, claim.verdict] for claim in claims if claim.section == section]
        if rows:
            parts += [f"## {section}\n", markdown(["claim", "evidence", "verdict"], rows)]
    compared = sum(claim.section != "Time" for claim in claims)
    if compared:
        parts.append(
            f"{compared} comparisons of quality at 95 % each: where nothing differed, about {compared / 20:.0f} would "
            "still look distinguishable. All are conditional on one base checkpoint"
            " and, with one seed, on that seed's training.\n"
        )
    return "\n".join(parts)
