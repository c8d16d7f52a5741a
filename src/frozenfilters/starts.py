"""What starting costs: kernels, notebooks, imports; wall time, or processes of their own."""

from __future__ import annotations

import os
import time


def kernels(rounds: int = 3) -> list[dict]:
    """Wall time of a notebook that imports torch, torchvision and seaborn: a warm kernel against an ordinary one."""
    from . import warm

    if not warm.available():
        return []
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a warm start must start no threads, and its kernels must ask for the same
    try:
        table = warm.ratio(rounds)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return [each("kernels", "warm kernel", "ordinary kernel", table.ratio) | {"seconds": float(table.warm_s.median())}]


NOTEBOOK = """import torch, torchvision, seaborn
import frozenfilters as ff
net = ff.models.resnet20(width=4)
ff.fit(net, [(torch.rand(8, 3, 16, 16), torch.zeros(8, dtype=torch.long))] * 3, epochs=1)
seaborn.lineplot(x=[1, 2], y=[3, 4]).figure"""


def notebooks(rounds: int = 1, count: int = 6) -> list[dict]:
    """Wall time of six short study notebooks: two at a time on warm kernels, against one after another on ordinary ones."""
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    import nbformat
    import pandas as pd
    import papermill

    from . import render, warm

    if not warm.available():
        return []
    spec = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    env, ratios, seconds = {**os.environ, **render.THREADS}, [], []
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)], metadata=spec), f"{folder}/in.ipynb")

        def execute(i: int, kernel: str) -> None:
            papermill.execute_notebook(
                f"{folder}/in.ipynb", f"{folder}/{i}.ipynb", engine_name="private", kernel_name=kernel, progress_bar=False, env=env
            )

        for _ in range(rounds):
            start = time.perf_counter()
            for i in range(count):
                execute(i, render.ordinary())
            cold = time.perf_counter() - start
            start = time.perf_counter()
            with warm.kernels(env) as name, ThreadPoolExecutor(2) as pool:  # the warm start is paid in full
                list(pool.map(lambda i: execute(i, name), range(count)))
            seconds.append(time.perf_counter() - start)
            ratios.append(seconds[-1] / cold)
    return [each("notebooks", "six notebooks, warm, two at a time", "ordinary, one by one", pd.Series(ratios)) | {"seconds": min(seconds)}]


def imports(rounds: int = 3) -> list[dict]:
    """CPU time of `import frozenfilters` against `import torch`, each in a process of its own."""
    from . import warm

    table = warm.import_ratio(rounds)
    return [
        each("imports", "import frozenfilters", "import torch", table.ratio),
        each("imports", "first use of freeze, lc, fit", "import torch", table.used_ratio),
    ]


def each(cell: str, variant: str, against: str, ratios) -> dict:
    return {
        "cell": cell,
        "variant": variant,
        "against": against,
        "ratio": float(ratios.median()),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
        "rounds": len(ratios),
    }
