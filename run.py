"""Launch an experiment: `python run.py experiments/coco_point_bbox.yaml`; see `--help`."""

import signal
import sys

from sam2train.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    # All is done and said. Ctrl-C while libraries tidy up would print their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
