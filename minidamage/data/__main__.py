"""`python -m minidamage.data PATH`: checks a data set before training. Exit code 0: usable; 1: errors found; 2: cannot be read."""
import sys

from minidamage.command_line import Parser, ended
from minidamage.data import load_dataset
from minidamage.data.check import check, report
from minidamage.data.check_masks import SIZE
from minidamage.data.flags import add_reading_flags, reading


def main(arguments=None):
    parser = Parser(prog="python -m minidamage.data", description=__doc__)
    parser.add_argument("path", help="folder of the data set, or its annotation file (VehiDE, LabelMe, COCO, VIA 1 or 2, Pascal "
                        "VOC, YOLO, CrackForest, picture and mask folders); PATH:NAME keeps the pictures whose names begin so")
    add_reading_flags(parser)
    parser.add_argument("--quick", action="store_true", help="headers and annotations only: no decoding, no search for duplicates")
    parser.add_argument("--size", type=int, default=SIZE, metavar="PX", help="masks: pixels a side that they will be trained at, as "
                        "train.py --size (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=3, help="how many files or annotations to name for each finding")
    args = parser.parse_args(arguments)
    if args.size < 1:
        parser.error(f"--size: expected pixels a side, 1 or more, got {args.size}")
    try:
        dataset = load_dataset(args.path, **reading(args))
        findings = check(dataset, quick=args.quick, size=args.size)
    except BrokenPipeError:                                   # | head: `ended`
        raise
    except (ValueError, OSError) as error:
        print(f"python -m minidamage.data: {error}", file=sys.stderr)
        return 2
    print(report(findings, args.examples))
    return int(any(f.level == "error" for f in findings))


if __name__ == "__main__":
    sys.exit(ended(main))
