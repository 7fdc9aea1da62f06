"""Check that GSPO works on this machine before you pay for a large run.

    python validate_gspo.py                               one to three minutes, no network, no GPU
    python validate_gspo.py --model_name tiny-moe         the same on a mixture of experts
    python validate_gspo.py --model_name Qwen/Qwen2.5-0.5B-Instruct     what makes sense on your own model
    python validate_gspo.py --seeds 5                     parts 2 and 3 with five seeds

There are four parts: (1) the properties that implementations get wrong, against float64 loops; (2) the
dynamics of real training, beside GRPO's; (3) held-out pass@1 before and after, with a control; (4) clip
ranges, and which of them this machine's precision allows. Everything also goes to validation_results/:
results.json, metrics.jsonl and dynamics.png. Exit codes: 0 all is well; 1 a check failed; 2 bad input;
130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from gspo.training.command_line import Parser


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here, because torch takes seconds: --help and a mistyped flag are answered before.
    from gspo.checks.validation import prepare, validate

    try:
        name, model, tokenizer = prepare(options.model_name, options.output_dir)
    except (ValueError, OSError) as error:
        print(f"validate_gspo.py: {error}", file=sys.stderr)
        return 2
    seeds = range(options.seed, options.seed + options.seeds)
    passed = validate(name, model, tokenizer, seeds, options.output_dir)
    return 0 if passed else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model_name", default="tiny", help="tiny, tiny-moe, a hub id or a folder (default: tiny)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds for parts 2 and 3 (default: 1)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("validation_results"),
        help="the folder for results.json, metrics.jsonl and dynamics.png (default: validation_results)",
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.seed < 0:
        parser.error("--seeds must be at least 1, and --seed at least 0")
    return options


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack the marks
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("validate_gspo.py: interrupted, nothing was concluded", file=sys.stderr)
        sys.exit(130)
