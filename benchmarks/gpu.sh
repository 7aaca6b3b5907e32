#!/usr/bin/env bash
# Steps at the block size of Qwen-Image, measured on CUDA GPUs; the table is printed, and written as JSON and as a page of
# Markdown beside it, which can be sent to whoever wants to know.
#
#   benchmarks/gpu.sh [JSON]      default: gpu.json in the repository, and gpu.md
#
# It needs
#   - a CUDA GPU with 80 GB, or several, idle: who else computes on them is measured, too
#   - .venv with a CUDA build of torch (`make .venv/ready`), or PYTHON=... with ppcl_ds installed
#   - 6 GB in TMPDIR and 12 GB of memory, for a random teacher of six blocks
# What has not begun after eight minutes is left out, and named. CUDA_VISIBLE_DEVICES chooses among several GPUs.
set -euo pipefail

json=$(realpath -m -- "${1:-$(dirname -- "${BASH_SOURCE[0]}")/../gpu.json}")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

# It may say that the CPU is to be used all the same.
unset DS_ACCELERATOR
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA GPU here that $python can use" >&2
    exit 1
fi

# All of it at a small size first: what does not work on this machine shows within a minute or two.
"$python" -m benchmarks.gpu --quick

"$python" -m benchmarks.gpu --json "$json" --markdown "${json%.json}.md" --minutes 8
echo "rows: $json, page: ${json%.json}.md"
