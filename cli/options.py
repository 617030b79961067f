"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from cli.questions import OVER_HELP, PARAM_HELP

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Html: TypeAlias = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Draw the chart as one self-contained page."),
]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Draw the chart: .html, .png, .svg or .pdf."),
]
OpNames: TypeAlias = Annotated[
    list[str],
    typer.Argument(metavar="NAME", help="One or more ops; `ridgeplan systems` lists them."),
]
SomeNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Ops or systems; `ridgeplan systems` lists them."),
]
Family: TypeAlias = Annotated[
    str | None,
    typer.Option("--family", metavar="F", help="And all modelled systems of this family."),
]
Params: TypeAlias = Annotated[
    list[str] | None, typer.Option("-p", "--param", metavar="KEY=VALUE", help=PARAM_HELP)
]
Best: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--best",
        metavar="FIELD",
        help="Take the fastest value of a size that is the implementer's choice, e.g. chunk.",
    ),
]
Over: TypeAlias = Annotated[str, typer.Option("--over", metavar="KEY=RANGE", help=OVER_HELP)]
MaybeOver: TypeAlias = Annotated[
    str | None, typer.Option("--over", metavar="KEY=RANGE", help=OVER_HELP)
]
Rung: TypeAlias = Annotated[
    str,
    typer.Option(
        "--rung",
        metavar="RUNG",
        help="'best': the calibrated kernel model; 'bound': the roofline alone.",
    ),
]
