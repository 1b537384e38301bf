"""The command-line flags that say how a data set is read, shared by train.py, evaluate.py and `python -m minidamage.data`."""
import argparse
import os

from minidamage.data.voc import VOC_BOXES, VOC_DIFFICULT

READING = ("images", "attribute", "voc_boxes", "voc_difficult")       # arguments of load_dataset
OF_A_KIND = ("voc_boxes", "voc_difficult")                            # ... those that another copy of a set shares


def add_reading_flags(parser):
    """--images, --attribute, --voc-boxes, --voc-difficult; what is not typed is not in the parsed arguments."""
    def add(flag, **kwargs):
        parser.add_argument(flag, default=argparse.SUPPRESS, **kwargs)
    add("--images", metavar="FOLDER", type=os.path.abspath, help="folder of the pictures, where the annotation file does not say it")
    add("--attribute", metavar="NAME", help="VIA: the region attribute that holds the class (default: detected)")
    add("--voc-boxes", choices=VOC_BOXES, help="Pascal VOC: what the numbers of a box are, pixels counted from 1 or corners (default: "
        f"{VOC_BOXES[0]})")
    add("--voc-difficult", choices=VOC_DIFFICULT, help="Pascal VOC: objects marked difficult are neither targets nor false alarms, or "
        f"count as the others do (default: {VOC_DIFFICULT[0]})")


def reading(args, names=READING):
    """{argument of load_dataset: value} of the flags that were typed. args: a namespace, or the dict of one."""
    given = args if isinstance(args, dict) else vars(args)
    return {name: given[name] for name in names if given.get(name) is not None}
