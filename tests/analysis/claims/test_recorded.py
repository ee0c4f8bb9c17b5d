"""Numbers of the recorded study, computed once more with pandas, numpy and scipy alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lightning_em.analysis.claims import evaluate
from lightning_em.analysis.measurements import read_measurements

RECORDED = Path(__file__).parents[3] / "notebooks" / "data" / "measurements.csv.gz"
ADAPTERS = ("vector", "rank1", "rank32")
KEYS = ("C1", "C4", "C5", "C9")
MARGINS = {"C1": 0.1}
SOURCES = ("behaviour", "scale_curve", "checkpoint", "perturbation_curve", "chat_kl")


@pytest.fixture(scope="module")
def verdicts():
    """The result that decides, by claim and adapter."""
    frame = read_measurements(RECORDED)
    results = evaluate(frame[frame["world"] != "control"], KEYS)
    return {(result.claim, result.adapter): result for result in results if result.decides}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Quantities of general and narrow runs at their last step: a row a quantity, a column a role and seed.

    The names are `quantity@coordinate/...`.
    """
    rows = pd.read_csv(RECORDED, low_memory=False)
    rows = rows[(rows["world"] == "default") & rows["role"].isin(["general", "narrow"])].sort_values("step")
    places = rows[list(rows.columns[rows.columns.get_loc("protocol") + 1 :])]
    texts = [
        [f"{v:g}" if isinstance(v, float) else v for v in row if v == v] for row in places.to_numpy().tolist()
    ]
    names = ["@".join(filter(None, (q, "/".join(t)))) for q, t in zip(rows["quantity"], texts, strict=True)]
    rows = rows.assign(quantity=names)[rows["source"].isin(SOURCES)]
    last = rows.groupby(["adapter", "quantity", "role", "seed"])["value"].last()
    return last.unstack(["role", "seed"])


def differences(own: pd.DataFrame, name: str) -> np.ndarray:
    return (own.loc[name, "narrow"] - own.loc[name, "general"]).to_numpy()


def at_equal_norm(own: pd.DataFrame) -> np.ndarray:
    """CE of narrow - general with the longer of the two scaled down to the shorter."""
    found = []
    for seed in own["general"].columns:
        norms = own.loc["effective_norm"].xs(seed, level="seed")
        losses = {}
        for role in norms.index:
            curve = own.loc[own.index.str.startswith("ce@"), (role, seed)].dropna()
            scales = curve.index.str.removeprefix("ce@").astype(float)
            order = np.argsort(scales)
            losses[role] = np.interp(norms.min() / norms[role], scales[order], curve.to_numpy()[order])
        found.append(losses["narrow"] - losses["general"])
    return np.array(found)


def effects(own: pd.DataFrame, key: str) -> list[np.ndarray]:
    """A number a seed for each criterion, in the order of the claim."""
    if key == "C1":
        rate = "bad_rate@held_out_domain/"
        return [(own.loc[f"{rate}1", "general"] - own.loc[f"{rate}0", "general"]).to_numpy()]
    if key == "C4":
        return [at_equal_norm(own), -differences(own, "efficiency")]
    if key == "C5":
        names = own.index[own.index.str.match(r"lost_gain_mean@0\.[1234]$|lost_gain_mean@0\.05$")]
        middle = sorted(names, key=lambda name: abs(float(name.partition("@")[2]) - 0.2))
        return [differences(own, name) for name in middle]
    kls = [np.log(own.loc[f"kl@{prompts}/1"]) for prompts in ("general", "in_domain")]
    return [(kl["general"] - kl["narrow"]).to_numpy() for kl in kls]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("key", KEYS)
def test_estimate_interval_and_p_are_those_of_other_code(verdicts, table, key, adapter) -> None:
    result, own = verdicts[key, adapter], table.loc[adapter]
    expected = effects(own, key)
    assert len(expected) == len(result.findings)
    ps = []
    for finding, values in zip(result.findings, expected, strict=True):
        assert len(values) == finding.n == 5
        low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
        numbers = np.array([values.mean(), low, high])
        shown = [finding.estimate, finding.low, finding.high]
        assert shown == pytest.approx(np.exp(numbers) if key == "C9" else numbers, rel=1e-6, abs=1e-9)
        test = stats.permutation_test(
            (values - MARGINS.get(key, 0.0),), np.mean, permutation_type="samples", alternative="greater",
            n_resamples=np.inf,
        )  # fmt: skip
        ps.append(test.pvalue)
        assert finding.p == pytest.approx(test.pvalue)
    assert result.p == pytest.approx(max(ps))
    assert (result.estimate, result.low, result.high) == (
        result.findings[0].estimate, result.findings[0].low, result.findings[0].high,
    )  # fmt: skip
