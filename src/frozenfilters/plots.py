"""One style for every figure: a finding as title, units, intervals, colours that colour-blind readers tell apart, a footer that
says where the numbers come from, and a text for those who cannot see it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .claims import interval

PALETTE = "colorblind"
WIDTH = 5.4  # inches: text of 11 points stays readable on a phone's 340 pixels


def style() -> None:
    """Set the study's look for matplotlib and seaborn."""
    import seaborn as sns

    sns.set_theme(
        "paper",
        "whitegrid",
        PALETTE,
        font="DejaVu Sans",
        rc={
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.labelsize": 11,
            "legend.fontsize": 10,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "frozenfilters",
        },
    )


def panels(count: int, height: float = 2.7):
    """A figure of `count` panels under one another: one column reads well on every screen."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(count, 1, figsize=(WIDTH, height * count + 1.2), squeeze=False)  # title, legend and footer take an inch
    return figure, list(axes[:, 0])


def estimates(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Mean and 95 % interval of `value` over seeds for each combination of `by`: columns mean, low, high, n."""
    lines = []
    for names, group in table.groupby(list(by), sort=False, dropna=False):
        i = interval(group[value]) if group[value].notna().any() else None
        if i is not None:
            lines.append({**dict(zip(by, names, strict=True)), "mean": i.mean, "low": i.low, "high": i.high, "n": i.n})
    return pd.DataFrame(lines)


def dots(
    ax,
    table: pd.DataFrame,
    value: str,
    y: str,
    hue: str | None = None,
    *,
    order=None,
    hue_order=None,
    scale: float = 100,
    labels: dict | None = None,
) -> None:
    """Every seed as a small dot, its mean and 95 % interval as a bar, one line of the axis per category."""
    import seaborn as sns

    order = list(order or dict.fromkeys(table[y]))
    hues = list(hue_order or dict.fromkeys(table[hue])) if hue else [None]
    colors, markers = sns.color_palette(PALETTE, len(hues)), "osD^v"
    for j, h in enumerate(hues):
        part = table if h is None else table[table[hue] == h]
        shift = (j - (len(hues) - 1) / 2) * 0.24
        for i, name in enumerate(order):
            x = part.loc[part[y] == name, value].dropna().to_numpy() * scale
            if not len(x):
                continue
            e = interval(x)
            ax.scatter(x, np.full(len(x), i + shift), s=9, color=colors[j], alpha=0.45, linewidth=0)
            half = [[0], [0]] if e.n < 2 else [[e.mean - e.low], [e.high - e.mean]]
            ax.errorbar(
                e.mean,
                i + shift,
                xerr=half,
                fmt=markers[j % 5],
                color=colors[j],
                ms=5.5,
                capsize=3,
                label=(labels or {}).get(h, h) if i == 0 else None,
            )
    ax.set_yticks(range(len(order)), [(labels or {}).get(n, n) for n in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    low, high = np.nanmin(table[value]) * scale, np.nanmax(table[value]) * scale
    ax.set_xlim(low - 0.12 * (high - low) - 0.1, high + 0.12 * (high - low) + 0.1)


def curves(
    ax, table: pd.DataFrame, value: str, x: str, hue: str, *, order=None, scale: float = 100, labels: dict | None = None, log2: bool = True
) -> None:
    """Mean over seeds against `x` with its 95 % interval as a band, one line style per `hue`."""
    import seaborn as sns

    e = estimates(table, value, [hue, x])
    order = list(order or dict.fromkeys(e[hue]))
    for h, color, marker, dash in zip(order, sns.color_palette(PALETTE, len(order)), "osD^v", ("-", "--", "-.", ":", "-"), strict=False):
        part = e[e[hue] == h].sort_values(x)
        ax.plot(part[x], part["mean"] * scale, dash, marker=marker, ms=5, color=color, label=(labels or {}).get(h, h))
        if (part.n > 1).any():
            ax.fill_between(part[x], part["low"] * scale, part["high"] * scale, color=color, alpha=0.18, linewidth=0)
    if log2:
        ticks = sorted(e[x].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    low, high = np.nanmin(table[value]) * scale, np.nanmax(table[value]) * scale
    ax.set_ylim(low - 0.15 * (high - low) - 0.1, high + 0.15 * (high - low) + 0.1)  # bands of two seeds may be wider than the scale
    ax.margins(x=0.04)


def legend(ax) -> None:
    """The legend of `ax` below its axis label, where it hides nothing; for the last panel of a figure."""
    from matplotlib.transforms import ScaledTranslation

    below = ax.transAxes + ScaledTranslation(0, -0.48, ax.figure.dpi_scale_trans)  # inches
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=2, fontsize=9.5, borderaxespad=0)


def parameter_table(table: pd.DataFrame):
    """Counts of parameters (columns total, frozen, learned, frozen_share) as a plain table, the share in percent."""
    counts = {"parameters": "{:,.0f}", "frozen": "{:,.0f}", "learned": "{:,.0f}", "frozen share": "{:.1%}"}
    return table.rename(columns={"total": "parameters", "frozen_share": "frozen share"}).reset_index().style.format(counts).hide(axis="index")


def footer(table: pd.DataFrame, chapter: str, data_notes: dict[str, str] | None = None) -> str:
    """What a reader must know of the numbers above: data and its caveats, scale, seeds, device, notebook and rows."""

    def listed(column: str) -> str:
        values = [v for v in dict.fromkeys(table[column]) if v is not None] if column in table else []
        return ", ".join(str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values)

    notes = data_notes if data_notes is not None else _notes(table)
    sets = ", ".join(f"{name} ({note})" if note else name for name, note in notes.items())
    scale = ", ".join(
        f"{label} {listed(c)}" for c, label in (("n_train", "training images"), ("epochs", "epochs"), ("width", "width")) if listed(c)
    )
    seeds = table["seed"].nunique() if "seed" in table else 1
    device = ", ".join(dict.fromkeys(table["stamp.device"])) if "stamp.device" in table else "unknown device"
    return f"Data: {sets}. Scale: {scale}. {seeds} seeds, {len(table)} rows, {device}. Notebook notebooks/{chapter}.ipynb, rows book/results/{chapter}/."


def _notes(table: pd.DataFrame) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in dict.fromkeys(table["dataset"]) if "dataset" in table else []:
        used = (
            next((d.get(name) for d in table.loc[table["dataset"] == name, "stamp.data"] if isinstance(d, dict) and d.get(name)), {})
            if "stamp.data" in table
            else {}
        )
        note = used.get("note", "")
        found[name] = "; ".join(t for t in (note, "self-packed" if used.get("source") == "self-packed" else "") if t)
    return found


def show(figure, title: str, alt: str, foot: str = "", path: str | Path | None = None):
    """Finish a figure and return it as an image that carries its own text.

    Args:
        figure: a matplotlib figure.
        title: the finding, one sentence.
        alt: what the figure shows, for readers who cannot see it.
        foot: see `footer`.
        path: also write the PNG there.

    Raises:
        ValueError: without a title or an alternative text.
    """
    import textwrap

    import matplotlib.pyplot as plt
    from IPython.display import Image

    if not title.strip() or not alt.strip():
        raise ValueError("show: a figure needs its finding as title and a text (alt) for readers who cannot see it")
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(width * 9.6)), x=0.01, ha="left", fontsize=12, fontweight="bold")
    if foot:
        figure.supxlabel(textwrap.fill(foot, int(width * 14.2)), x=0.01, ha="left", fontsize=8.5, color="0.3")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    plt.close(figure)
    return Image(buffer.getvalue(), format="png", width=int(width * 110), alt=f"{title} {alt}")


def filter_sheet(ax, bank, columns: int = 9, title: str = "") -> None:
    """The first kernels of a bank (n, k, k) side by side, each on its own scale: orange negative, purple positive, white zero."""
    kernels = np.asarray(bank.detach().cpu() if hasattr(bank, "detach") else bank, float)[:columns]
    k = kernels.shape[-1]
    sheet = np.full((k, columns * (k + 1) - 1), np.nan)
    for i, kernel in enumerate(kernels):
        sheet[:, i * (k + 1) : i * (k + 1) + k] = kernel / (np.abs(kernel).max() or 1)
    ax.imshow(sheet, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10, fontweight="normal")


def claim_table(claims: pd.DataFrame):
    """The chapter's claims as a plain table: claim, what the paper said, what we measured, verdict."""
    from IPython.display import HTML

    shown = claims[["id", "claim", "paper", "measures", "ours", "verdict", "reason"]].rename(
        columns={"paper": "paper said", "measures": "estimator", "ours": "we measured (95 % interval)", "reason": "per data set"}
    )
    return HTML(shown.to_html(index=False, border=0, classes="dataframe claims"))


def landing(path: Path) -> str | None:
    """The book's first picture, from chapter 1's shown rows: what the filters look like, and what they are worth. Returns its text.

    None while no preset beyond smoke has all its rows: a picture is earned, too.
    """
    import matplotlib.pyplot as plt
    import torch

    from . import chapters, claims, filters, rows

    c = chapters.chapter("01")
    shown = claims.shown_rows("01")
    if not len(shown):
        return None
    style()
    table, portrait = shown[shown.trial == "trial"], shown[shown.trial == "portrait"].iloc[0]
    banks, archs = ["learned", "random", "dct", "ghaar"], list(dict.fromkeys(table.arch))
    figure, axes = plt.subplots(len(banks), 1, figsize=(WIDTH, 3.9))
    words = []
    for ax, bank in zip(axes, banks, strict=True):
        kernels = (
            rows.arrays(portrait)["kernels"]
            if bank == "learned"
            else filters.draw_(torch.empty(9, 9, 5, 5), bank, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
        )
        part = table[table.bank == bank]
        worth = ", ".join(f"{LABELS.get(a, a)} {100 * part[part.arch == a].accuracy.mean():.1f} %" for a in archs)
        words.append(f"{LABELS.get(bank, bank)}: {worth}")
        filter_sheet(ax, kernels, title=words[-1])
    means = table.groupby(["arch", "bank"]).accuracy.mean() * 100
    lost = {a: means[a, "learned"] - max(means[a, bank] for bank in banks[1:]) for a in archs}
    alt = f"Nine filters of each kind and the mean accuracy of networks that use them. {'; '.join(words)}."
    image = show(
        figure,
        "The best filters that never learned cost " + " and ".join(f"a {LABELS.get(a, a)} {v:.1f} points" for a, v in lost.items()),
        alt,
        "Mean over data sets and seeds. "
        + footer(table, c.name)
        + " Learned filters: first layer of one network; the others never learned.",
        path,
    )
    return image.alt


LABELS = {
    "resnet20": "ResNet-20",
    "convmixer": "ConvMixer",
    "random": "frozen, random",
    "dct": "frozen, cosine atoms",
    "ghaar": "frozen, steered",
}
