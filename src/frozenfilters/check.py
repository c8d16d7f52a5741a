"""Is every number earned? Stale rows, numbers in the prose that no row stands behind, claims without a verdict."""

from __future__ import annotations

from . import PROTOCOL, chapters, claims, rows


def stale() -> list[str]:
    """Rows of an older protocol or of a trial that was edited since; they are kept, but no page reads them."""
    found = []
    for c in chapters.chapters():
        folder = chapters.results(c.name)
        if not folder.exists():
            continue
        codes = {code[:16] for name in c.presets for code in chapters.plan(c, name).codes}
        for row in rows.read(folder):
            why = (
                f"protocol {row['protocol']} < {PROTOCOL}"
                if row["protocol"] < PROTOCOL
                else "the trial was edited since"
                if row["code"] not in codes
                else None
            )
            if why:
                found.append(
                    f"{c.name}/{row['file']}: row {row['key'][:12]} is stale ({why}); measure again: python -m frozenfilters run {c.number} --preset cpu"
                )
    return found


def failed() -> list[str]:
    """Rows of trials that failed and were not measured since."""
    found = []
    for c in chapters.chapters():
        if chapters.results(c.name).exists():
            table = rows.load(chapters.results(c.name))
            for _, row in (table[table.status == "failed"] if len(table) else table).iterrows():
                found.append(f"{c.name}/{row.file}: row {row.key[:12]} failed: {row.error}")
    return found


def without_verdict() -> list[str]:
    """Claims without a rule or a stated reason, and rules that wait for rows."""
    found = []
    for e in claims.entries():
        if not e.get("rule") and not e.get("not_tested"):
            found.append(f"claim {e['id']} has neither a rule nor a reason (not_tested: ...) in book/claims.yml")
    table = claims.table()
    for _, line in table[table.verdict == claims.VERDICTS[3]].iterrows():
        entry = next(e for e in claims.entries() if str(e["id"]) == line.id)
        if entry.get("rule") and line.reason == "no rows":
            found.append(f"claim {line.id} has a rule but no complete rows; measure: {line.command}")
    return found


def everything() -> dict[str, list[str]]:
    """All findings by kind; empty lists where all is well."""
    from . import pages

    root = chapters.root()
    return {
        "stale rows": stale(),
        "failed rows": failed(),
        "numbers without a row": pages.unearned(root),
        "claims without a verdict": without_verdict(),
        "README": ["its answer table is not what the rows say: make readme"] if pages.readme_is_stale(root) else [],
    }
