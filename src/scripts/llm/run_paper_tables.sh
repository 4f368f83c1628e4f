#!/usr/bin/env bash
# The rows of the paper's main language tables, our settings and the published ones:
# hours on a GPU, as it says first. Resumes on the same command.
#
#   bash scripts/llm/run_paper_tables.sh --estimate
#   bash scripts/llm/run_paper_tables.sh --models llama-3.1-8b-instruct [flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" paper_tables.py "$@"
