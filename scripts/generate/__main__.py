"""Writes the files that follow from the code; with --check it only fails when one is out of date."""

import argparse
import sys

from scripts.generate import MAKERS, outdated, write

parser = argparse.ArgumentParser(prog="python -m scripts.generate", description=__doc__)
parser.add_argument("--check", action="store_true")
parser.add_argument("--only", action="append", choices=MAKERS, help="may be repeated")
options = parser.parse_args()
found = {path: text for maker in options.only or MAKERS for path, text in outdated(maker).items()}
if not options.check:
    write(found)
elif found:
    sys.exit(f"{', '.join(found)}: out of date; run python -m scripts.generate")
