"""The input pipeline on one core, in pictures a second: what has to be multiplied by the loader's processes to feed a GPU."""
import tempfile
from pathlib import Path

import torch

import minidamage
from minidamage.data import DetectionDataset, SegmentationDataset, load_dataset, synthetic


def benchmark_data(table):
    """Decode, augment and cut the masks of one picture after the other, for a detector and for a segmenter, with their papers' recipes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                            # as in a worker process of the loader
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = table.args.data_path or synthetic.make_demo(Path(folder, "demo"), images=32, size=640)
            parts = load_dataset(path).parts
            records = next(iter(parts.values()))[:32]
            detector, segmenter = minidamage.MODELS["damagenet"][2], minidamage.MODELS["context_cracknet"][2]
            for what, dataset in (("decode + instance masks", DetectionDataset(records)),
                                  ("decode + augment + instance masks", DetectionDataset(records, detector, train=True)),
                                  ("decode + label map 448", SegmentationDataset(records, image_size=448)),
                                  ("decode + augment + label map 448",
                                   SegmentationDataset(records, segmenter, train=True, image_size=448))):
                row = table.add(f"data: {what}, {len(records)} pictures {records[0].width}x{records[0].height}",
                                lambda: [dataset[i] for i in range(len(records))], {})
                if row:
                    row["images/s"] = 1e3 * len(records) / row["ours"]
                    table.keep()
                    print(" " * 64, f"{row['images/s']:.0f} images/s a core")
    finally:
        torch.set_num_threads(threads)
