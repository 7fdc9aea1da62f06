"""Draw the curves of runs and write a page about them, from what their folders hold.

    python -m gspo.report gspo_outputs/RUN        training_curves.png and report.html in its folder
    python -m gspo.report gspo_outputs/RUN1 gspo_outputs/RUN2        one page for both, here

The runs may be finished, going, stopped or damaged. Exit codes: 0 done; 1 cannot write; 2 bad input.
"""

import sys
from pathlib import Path

from gspo.printing import escaped
from gspo.report.curves import draw_curves
from gspo.report.page import write_page
from gspo.report.run_record import read_run
from gspo.report.verdict import verdict
from gspo.training.command_line import Parser, complain
from gspo.training.whole_folders import CannotSave


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(str(__doc__))
    parser.prog = "gspo.report"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes, instead")
    given = parser.parse_args(arguments)
    is_one = len(given.runs) == 1
    page = given.output or (given.runs[0] / "report.html" if is_one else Path("report.html"))
    runs = []
    for folder in given.runs:
        try:
            runs.append(read_run(folder))
        except (OSError, ValueError) as error:  # one of gspo_outputs/* may be something else
            complain(parser.prog, error)
    if not runs:
        return 2
    try:
        write_page(runs, page)
        if is_one:
            draw_curves(runs[0], page.with_name("training_curves.png"))
    except (CannotSave, ImportError) as error:
        complain(parser.prog, error)
        return 1
    for run in runs:
        lines = [f"{run.name}:", *verdict(run), *(f"Damaged: {what}." for what in run.damage)]
        print(escaped("\n".join(lines), "\n"), end="\n\n")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
