"""Verdicts by rule, intervals that cover what they say."""

import numpy as np
import pandas as pd
import pytest

from frozenfilters import claims
from frozenfilters.claims import interval, paired, select, verdict


def table(difference, seeds=5, datasets=("a", "b"), noise=0.001):
    rng = np.random.default_rng(0)
    lines = []
    for d, name in enumerate(datasets):
        for seed in range(seeds):
            base = 0.8 + 0.05 * rng.standard_normal()
            delta = difference[d] if isinstance(difference, (list, tuple)) else difference
            lines += [
                {"dataset": name, "seed": seed, "arm": "learned", "accuracy": base},
                {"dataset": name, "seed": seed, "arm": "frozen", "accuracy": base + delta + noise * rng.standard_normal()},
            ]
    return pd.DataFrame(lines)


RULE = {"metric": "accuracy", "a": {"arm": "frozen"}, "b": {"arm": "learned"}, "min_seeds": 3}


@pytest.mark.parametrize(
    "difference, test, word",
    [
        (-0.05, {"below": 0.0}, "reproduced"),
        (0.05, {"below": 0.0}, "not reproduced"),
        ([-0.05, 0.05], {"below": 0.0}, "partly"),
        (0.0, {"within": 0.01}, "reproduced"),
        (0.05, {"within": 0.01}, "not reproduced"),
        (0.05, {"above": 0.01}, "reproduced"),
        (0.0, {"above": 0.0}, "not tested at this scale"),
    ],
)
def test_verdicts(difference, test, word):
    noise = 0.05 if word.startswith("not tested") else 0.001
    assert verdict(RULE | {"test": test}, table(difference, noise=noise))[0] == word


def test_too_few_seeds_or_rows_or_no_rule():
    rule = RULE | {"test": {"below": 0.0}, "datasets": ["a", "c"]}
    word, reason, found = verdict(rule, table(-0.05))
    assert word == "partly" and "c: untested" in reason and list(found) == ["a"]
    assert verdict(RULE | {"test": {"below": 0.0}, "min_seeds": 9}, table(-0.05))[0] == "not tested at this scale"
    assert verdict(None, table(0))[0] == "not tested at this scale"
    assert verdict(RULE | {"test": {"below": 0.0}}, pd.DataFrame())[0] == "not tested at this scale"
    with pytest.raises(ValueError, match="sideways"):
        verdict(RULE | {"test": {"sideways": 0.0}}, table(0))


def test_equivalence_is_not_an_insignificant_difference():
    """Noise that hides every difference earns no 'matches'."""
    assert verdict(RULE | {"test": {"within": 0.01}}, table(0.0, noise=0.05))[0] != "reproduced"


def test_partly_needs_a_data_set_that_holds():
    t = table([-0.05, 0.0], noise=0.001)
    t.loc[(t.dataset == "b") & (t.arm == "frozen"), "accuracy"] += np.random.default_rng(2).normal(0, 0.1, 5)
    assert verdict(RULE | {"test": {"within": 0.01}}, t)[:2] == ("not reproduced", "a: fails, b: undecided")
    assert verdict(RULE | {"test": {"below": 0.0}}, t)[0] == "partly"


def test_pairing_removes_what_seeds_share():
    t = table(-0.02, noise=0.0)
    assert np.allclose(paired(t, "accuracy", {"arm": "frozen"}, {"arm": "learned"}, pair=["dataset", "seed"]), -0.02)
    with pytest.raises(ValueError, match="several rows"):
        paired(t, "accuracy", {"arm": "frozen"}, {"arm": "learned"})
    with pytest.raises(KeyError, match="no column 'rate'"):
        select(t, rate=3)


def test_slope_per_doubling():
    t = pd.DataFrame(
        [{"seed": s, "rate": r, "arm": "lc", "accuracy": 0.5 + 0.03 * np.log2(r) + 0.1 * s} for s in range(3) for r in (1, 2, 8)]
    )
    assert np.allclose(paired(t, "accuracy", {"arm": "lc"}, axis="rate"), 0.03)


def test_slope_of_a_gap_to_an_arm_without_the_axis():
    lc = [{"seed": s, "rate": r, "arm": "lc", "accuracy": 0.5 + 0.02 * np.log2(r) + 0.1 * s} for s in range(3) for r in (1, 4)]
    t = pd.DataFrame(lc + [{"seed": s, "rate": 0, "arm": "plain", "accuracy": 0.6 + 0.1 * s} for s in range(3)])
    assert np.allclose(paired(t, "accuracy", {"arm": "lc"}, {"arm": "plain"}, axis="rate"), 0.02)
    assert len(paired(t, "accuracy", {"arm": "none"}, {"arm": "plain"})) == 0
    with pytest.raises(KeyError, match="no metric 'acuracy'"):
        paired(t, "acuracy", {"arm": "plain"})


def test_diverged_rows_drop_out_with_their_pair():
    t = table(-0.02, noise=0.0)
    t.loc[(t.seed == 0) & (t.arm == "learned"), "accuracy"] = np.nan
    assert len(paired(t, "accuracy", {"arm": "frozen"}, {"arm": "learned"}, pair=["dataset", "seed"])) == 8


def test_the_interval_covers_what_it_says_and_the_bootstrap_does_not():
    """Why the study's default is Student's interval: coverage of the mean of five normal seeds, 2,000 draws."""
    from scipy import stats

    rng = np.random.default_rng(1)
    x = rng.standard_normal((2000, 5))
    t = np.mean([i.low <= 0 <= i.high for i in map(interval, x)])
    ci = stats.bootstrap((x,), np.mean, axis=1, method="percentile", n_resamples=999, rng=np.random.default_rng(0)).confidence_interval
    boot = np.mean((ci.low <= 0) & (ci.high >= 0))
    assert 0.93 < t < 0.97 and boot < 0.88


def test_interval_edges():
    assert interval([2.0]).high == np.inf and interval([1.0, 1.0, 1.0]).low == 1.0
    assert interval([1.0, np.nan, 3.0]).n == 2
    assert interval([0.0, 1.0, 2.0], method="bootstrap").low >= 0
    with pytest.raises(ValueError, match="finite"):
        interval([np.nan])
    assert f"{interval([1.0, 1.0]):.1f}" == "1.0 [1.0, 1.0]"


def test_claims_file_is_whole():
    found = claims.entries()
    assert {e["system"] for e in found} >= {"ExplainFix", "Linear combinations"}
    for e in found:
        assert e["paper"]["text"] and e["paper"]["source"]
        assert bool(e.get("rule")) != bool(e.get("not_tested")), f"{e['id']}: a rule, or the reason why there is none"
        if e.get("rule"):
            assert len(e["rule"]["test"]) == 1 and e["rule"]["min_seeds"] >= 3 and e["rule"]["measures"]
