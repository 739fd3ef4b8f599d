#!/bin/sh
# Takes out of an environment what packages bring for their own developers: headers, and tests.
#   slim.sh FOLDER-OF-THE-ENVIRONMENT
set -eu
cd "$1"/lib/python3.*/site-packages
rm -rf torch/include torch/share torch/test
find torch/bin -type f ! -name torch_shm_manager -delete
find networkx numpy scipy sympy -type d -name tests -prune -exec rm -r {} +
