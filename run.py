"""Launch an experiment: `python run.py experiments/coco_point_bbox.yaml`; see `--help`."""

import sys

from sam2train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
