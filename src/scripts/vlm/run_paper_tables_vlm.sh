#!/usr/bin/env bash
# The rows of the paper's main vision-language tables, our settings and the published ones:
# hours on a GPU, as it says first. Resumes on the same command.
#
#   bash scripts/vlm/run_paper_tables_vlm.sh --estimate
#   bash scripts/vlm/run_paper_tables_vlm.sh --models llava-1.6-7b [flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" paper_tables_vlm.py "$@"
