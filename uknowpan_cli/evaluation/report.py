"""Results of `evaluate` as a table, JSON, CSV, LaTeX and plain words."""

import csv
import io
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uknowpan.evaluation.reprojection import SecondJudge
from uknowpan.models.metrics.evaluation import Results


@dataclass(frozen=True)
class _Index:
    """Label, decimals and best value of an index."""

    label: str
    latex: str
    decimals: int
    high_is_better: bool | None
    """None: the best value is that of the truth."""
    best: str = "1"


INDICES = {
    "q2n": _Index("Q2n", r"Q$2^n$", 4, True),
    "q": _Index("Q", "Q", 4, True),
    "sam": _Index("SAM, deg", r"SAM ($^\circ$)", 4, False, "0"),
    "ergas": _Index("ERGAS", "ERGAS", 4, False, "0"),
    "scc": _Index("SCC", "SCC", 4, True),
    "psnr": _Index("PSNR, dB", "PSNR (dB)", 3, True, "inf"),
    "ssim": _Index("SSIM", "SSIM", 4, True),
    "d_lambda_k": _Index("D_lambda_K", r"$D_\lambda^K$", 4, False, "0"),
    "d_s": _Index("D_s", "$D_s$", 4, False, "0"),
    "hqnr": _Index("HQNR", "HQNR", 4, True),
    "d_lambda": _Index("D_lambda", r"$D_\lambda$", 4, False, "0"),
    "qnr": _Index("QNR", "QNR", 4, True),
    "d_rho": _Index("D_rho", r"$D_\rho$", 4, None, "truth's"),
    "d_rho_excess": _Index("D_rho excess", r"$D_\rho$ excess", 4, None, "truth's"),
    "colour_grain": _Index("colour grain", "grain", 4, None, "truth's"),
}

TRUTH = "truth"
"""Name of the truth as a row of a table."""

JUDGED = {
    "r_q2n": "R-Q2n",
    "r_sam": "R-SAM, deg",
    "r_ergas": "R-ERGAS",
    "d_rho": "D_rho",
    "d_rho_thr": "D_rho, thr.",
    "d_sr": "D_sR",
    "rqnr": "RQNR",
    "d_rho_excess": "D_rho excess",
    "colour_grain": "colour grain",
}
"""Labels of the indices by reprojection that the table shows."""

WAYS = {
    "published": "published, {} MTF",
    "registered": "registered, own blur",
    "registered_nominal": "registered, {} MTF",
}
"""Labels of the ways of `SecondJudge`, for the name of a sensor."""

JUDGE_WORDS = (
    "HQNR does not see that a result is too soft, or that it stays where a displaced MS lies. R-Q2n, R-SAM and R-ERGAS "
    "compare the MS with the result as the sensor would see it; D_rho compares the detail with the PAN's. "
    "A truth has a D_rho, a D_sR and a grain of its own: 0 is no aim."
)

PAPER_EXP = (("the .mat files that papers use", (0.0232, 0.0813, 0.8975)), ("the H5 files", (0.0456, 0.1201, 0.8399)))
"""D_lambda_K, D_s and HQNR of EXP on PanCollection's two sets of 20 WV3 images at full resolution."""
PAPER_IMAGES, PAPER_TOLERANCE = 20, 6e-4

_LATEX_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX_SPECIAL |= {c: f"\\{c}" for c in "&%$#_{}"}


@dataclass(frozen=True)
class Report:
    """Scores, and the facts that the numbers depend on."""

    results: Results
    title: str
    bands: int | None
    about: dict[str, Any]
    """Files, sensor, border and the like, as JSON has them."""
    notes: list[str] = field(default_factory=list)
    judges: dict[str, list[SecondJudge]] = field(default_factory=dict)
    """Method -> scores by reprojection, one per image."""

    def facts(self) -> dict[str, Any]:
        """All as JSON has it."""
        words = plain_words(self.results)
        facts = {**self.about, **_as_dict(self.results), "notes": self.notes}
        if self.judges:
            first = next(iter(self.judges.values()))
            facts["reprojection"] = {way: _as_dict(scores)["scores"] for way, scores in self.judged().items()}
            facts["reprojection"]["images"] = [judge.place() for judge in first]
        return facts | ({"in_words": words} if words else {})

    def judged(self) -> dict[str, Results]:
        """Way -> scores by reprojection."""
        ways: dict[str, Results] = {}
        for way in WAYS:
            scores = {}
            for method, judges in self.judges.items():
                rows = [judge.scores[way] for judge in judges if way in judge.scores]
                if rows:
                    common = [index for index in rows[0] if all(index in row for row in rows)]
                    scores[method] = {
                        index: torch.tensor([row[index] for row in rows], dtype=torch.float64) for index in common
                    }
            if scores:
                ways[way] = Results(self.results.kind, self.results.images, scores)
        return ways

    def csv(self) -> str:
        """CSV with one line for each method and image, images from 0, values with all digits.

        Scores by reprojection have the columns WAY:INDEX. A cell without a value is empty.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        indices = _indices(self.results)
        ways = [
            (way, index) for way in WAYS for index in JUDGED if any(way in j[0].scores for j in self.judges.values())
        ]
        writer.writerow(["method", "image", *indices, *map(":".join, ways)])
        for method in dict.fromkeys((*self.results.scores, *self.judges)):
            own, judges = self.results.scores.get(method, {}), self.judges.get(method)
            for image in range(self.results.images):
                cells = [repr(float(own[i][image])) if i in own else "" for i in indices]
                if judges is not None:
                    values = (judges[image].scores.get(way, {}).get(index) for way, index in ways)
                    cells += ["" if value is None else repr(value) for value in values]
                writer.writerow([method, image, *cells])
        return text.getvalue()

    def latex(self) -> str:
        """LaTeX tabular for the package booktabs, the best of each index in bold."""
        results, indices = self.results, _indices(self.results)
        heads = []
        for index in indices:
            name = index_label(index, self.bands) if index == "q2n" and self.bands else INDICES[index].latex
            heads.append(name + (r" $\uparrow$" if INDICES[index].high_is_better else r" $\downarrow$"))
        rows = []
        for method in results.scores:
            cells = {index: _cell(results, method, index, r" \pm ") for index in indices}
            shown = [rf"$\mathbf{{{c}}}$" if _best(results, i) == method else f"${c}$" for i, c in cells.items()]
            plain = "".join(_LATEX_SPECIAL.get(character, character) for character in method)
            rows.append(" & ".join([plain, *shown]) + r" \\")
        lines = [rf"\begin{{tabular}}{{l{'c' * len(indices)}}}", r"\toprule", " & ".join(["Method", *heads]) + r" \\"]
        lines += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""]
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """Notes, and scores without a truth in words."""
        words = plain_words(self.results)
        return [*self.notes, *([JUDGE_WORDS] if self.judges else []), *([words] if words else [])]


def index_label(index: str, bands: int | None = None) -> str:
    """Label of an index; Q2n is Q4 for 3 or 4 bands, Q8 for 5 to 8."""
    if index == "q2n" and bands is not None and bands > 1:
        return f"Q{2 ** math.ceil(math.log2(bands))}"
    return INDICES[index].label


def _indices(results: Results) -> list[str]:
    return list(next(iter(results.scores.values())))


def _best(results: Results, index: str) -> str | None:
    """The method with the best mean; None where there is no choice."""
    means = {method: results.mean(method, index) for method, own in results.scores.items() if index in own}
    aim = means.pop(TRUTH, None)
    if len(means) < 2:
        return None
    if INDICES[index].high_is_better is None:
        return None if aim is None else min(means, key=lambda method: abs(means[method] - aim))
    choose = max if INDICES[index].high_is_better else min
    return choose(means, key=lambda method: means[method])


def _cell(results: Results, method: str, index: str, between: str) -> str:
    if index not in results.scores[method]:
        return ""
    places = INDICES[index].decimals
    mean, std = results.mean(method, index), results.std(method, index)
    if math.isnan(std):
        return f"{mean:.{places}f}"
    return f"{mean:.{places}f}{between}{std:.{places}f}"


def print_table(report: Report) -> None:
    """Print mean and standard deviation (N - 1) over the images, the best in bold."""
    results = report.results
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    for index in _indices(results):
        table.add_column(f"{index_label(index, report.bands)}\n(best {INDICES[index].best})", justify="right")
    best = {index: _best(results, index) for index in _indices(results)}
    for method in results.scores:
        cells = {index: _cell(results, method, index, " ± ") for index in best}
        table.add_row(escape(method), *(f"[bold]{c}[/bold]" if best[i] == method else c for i, c in cells.items()))
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.title, highlight=False, markup=False)
    console.print(table)
    if report.judges:
        console.print(_judge_table(report))


def _judge_table(report: Report) -> Table:
    """Means of the scores by reprojection, a row for each way and method."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("by reprojection", overflow="fold")
    table.add_column("method", overflow="fold")
    judged = report.judged()
    known = {index for results in judged.values() for own in results.scores.values() for index in own}
    shown = [index for index in JUDGED if index in known]
    for index in shown:
        table.add_column(JUDGED[index], justify="right")
    for way, results in judged.items():
        name = WAYS[way].format(report.about["sensor"])
        for method, own in results.scores.items():
            cells = (f"{results.mean(method, index):.4f}" if index in own else "" for index in shown)
            table.add_row(name, escape(method), *cells)
            name = ""
    return table


def _as_dict(results: Results) -> dict[str, Any]:
    """Mean, standard deviation and the value of every image, as JSON has them."""

    def column(method: str, index: str) -> dict[str, Any]:
        values = results.scores[method][index].tolist()
        return {"mean": results.mean(method, index), "std": results.std(method, index), "values": values}

    scores = {method: {index: column(method, index) for index in own} for method, own in results.scores.items()}
    return {"kind": results.kind, "images": results.images, "scores": scores}


def known_exp(results: Results, sensor: str) -> str | None:
    """A sentence on whether EXP is that of a published set; None where no published values exist."""
    exp = results.scores.get("EXP")
    if exp is None or results.kind != "full" or sensor != "WV3" or results.images != PAPER_IMAGES:
        return None
    means = [results.mean("EXP", index) for index in ("d_lambda_k", "d_s", "hqnr")]
    for name, expected in PAPER_EXP:
        if all(abs(a - b) <= PAPER_TOLERANCE for a, b in zip(means, expected, strict=True)):
            return f"EXP is that of the 20 full-resolution WV3 images of {name}."
    published = "; ".join(f"{name} {', '.join(f'{v:.4f}' for v in expected)}" for name, expected in PAPER_EXP)
    return (
        f"EXP is none of the published ones of WV3 (D_lambda_K, D_s, HQNR: {published}): other images, or another "
        "protocol."
    )


def plain_words(results: Results) -> str | None:
    """Scores without a truth in words; None for scores against one."""
    if results.kind != "full":
        return None
    methods = [method for method in results.scores if method != "EXP"] or list(results.scores)
    best = max(methods, key=lambda method: results.mean(method, "hqnr"))
    colour, detail, both = (results.mean(best, i) for i in ("d_lambda_k", "d_s", "hqnr"))
    lines = [
        f"In words{f', for {best}' if len(results.scores) > 1 else ''}:",
        f"D_lambda_K {colour:.3f}: how far the colours, at the MS's resolution, have left the MS; "
        f"0 is perfect, 0.02 to 0.05 usual, this is {_judged(colour, 0.02, 0.05)}.",
        f"D_s {detail:.3f}: how far the detail differs from what the PAN shows; 0 is perfect, 0.03 "
        f"to 0.10 usual, this is {_judged(detail, 0.03, 0.10)}.",
        f"HQNR {both:.3f} = (1 - D_lambda_K)(1 - D_s): both together; 1 is perfect, 0.85 to 0.95 "
        f"usual, this is {_judged(both, 0.85, 0.95)}.",
    ]
    if "EXP" in results.scores and best != "EXP":
        exp = results.mean("EXP", "hqnr")
        verdict = "" if exp < both else ", which is no worse: PAN and MS may lie apart"
        lines.append(f"The MS merely enlarged (EXP) has {exp:.3f}{verdict}.")
    lines.append("No truth stands behind these numbers; differences below 0.005 mean little.")
    return "\n".join(lines)


def _judged(value: float, low: float, high: float) -> str:
    return "below that" if value < low else "within that" if value <= high else "above that"
