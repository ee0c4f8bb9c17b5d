# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Loss against scale: is the general solution the more efficient one?
#
# An adapter's update is applied `scale` times: 0 is the frozen base, 1 the adapter as it was trained. The loss on the
# training rows along that line says how much a solution gets out of its size, its *effective norm*. If training
# prefers the general solution because it is more efficient, its curve lies lower at equal norm.
#
# The runs are rank-32 LoRAs in the miniature world, a toy with a planted preference: this shows what the instrument
# reads, not that the hypothesis holds. Each seed is a world of its own, with its own base model and rows.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lightning_em import load_run
from lightning_em.analysis import at_equal_norm, common_grid, loss_curve, runs_by_base, sign_test
from lightning_em.figures import draw_loss_curves

ROOT = next((root for root in (Path("runs"), Path("../runs")) if root.is_dir()), Path("runs"))
EXPERIMENTS = {solution: f"miniature_{solution}_rank32" for solution in ("general", "narrow")}
found = {
    solution: runs_by_base(ROOT, experiment, base="miniature://seed-*/model")
    for solution, experiment in EXPERIMENTS.items()
}
worlds = sorted(set(found["general"]) & set(found["narrow"]))
if not worlds:
    commands = [f"lightning-em fit --config configs/experiment/{name}.yaml" for name in EXPERIMENTS.values()]
    raise SystemExit(
        "\n".join([f"No general and narrow run of one world under {ROOT}; make them with", *commands])
    )
print(f"{len(worlds)} worlds: {', '.join(worlds)}")

# %% [markdown]
# ## What is on record
# `load_run` gives a run's metrics and probe records as frames; `loss_curve` takes the scale curve of its last
# checkpoint. Losses are in nats per token.

# %%
curves = {
    solution: [loss_curve(load_run(found[solution][world].path).records) for world in worlds]
    for solution in EXPERIMENTS
}
pd.DataFrame(
    {
        (world, solution): {
            "base CE": curve.base_ce,
            "trained CE": curve.trained_ce,
            "effective norm": curve.effective_norm,
            "best scale": curve.best_scale,
            "best CE": curve.best_ce,
            "(base - trained) / norm^2": curve.efficiency,
        }
        for solution, each in curves.items()
        for world, curve in zip(worlds, each, strict=True)
    }
).T.sort_index().round(4)

# %% [markdown]
# ## The two curves
# Lines are means over seeds, bands the range over seeds; circles mark trained adapters, stars the lowest loss of each
# curve, the dashed line the base.

# %%
figure, (by_norm, by_scale) = plt.subplots(1, 2, figsize=(10, 4), dpi=90, sharey=True, layout="constrained")
by_norm.set_title(f"at equal norm, {len(worlds)} seed(s)")
by_scale.set_title("at equal scale")
draw_loss_curves(by_norm, curves, "effective_norm")
draw_loss_curves(by_scale, curves, "scale")
by_scale.label_outer()

# %% [markdown]
# ## Finding

# %%
pairs = list(zip(curves["general"], curves["narrow"], strict=True))
equal = pd.DataFrame([at_equal_norm(general, narrow) for general, narrow in pairs])
num_lower = int((equal["general_ce"] < equal["narrow_ce"]).sum())
num_further = sum(narrow.best_scale > general.best_scale for general, narrow in pairs)
grids = [common_grid(pair, "effective_norm")[1][:, 1:] for pair in pairs]
share_lower = sum((general < narrow).mean() for general, narrow in grids) / len(pairs)
chance = sign_test(num_lower, len(pairs))
print(
    f"Scaled to the smaller of their trained norms (mean {equal['norm'].mean():.1f}), the general solution has a "
    f"training CE of {equal['general_ce'].mean():.3f} and the narrow one of {equal['narrow_ce'].mean():.3f} nats per "
    f"token: general is lower in {num_lower} of {len(pairs)} worlds (one-sided sign test p = {chance:.3f}, "
    f"{'general is more efficient' if chance < 0.05 else 'undecided'}) and at {share_lower:.0%} of all norms up to "
    f"where both were measured, and the narrow optimum lies at a larger scale in {num_further} of {len(pairs)}."
)
