#!/usr/bin/env bash
# Upload the W&B runs below some folders that were made offline and are not uploaded yet, when no run is going on there.
#
#   scripts/wandb_sync.sh [--dry-run] [FOLDER...]      (outputs, unless folders are named)
#
# It needs a key: `wandb login`, or WANDB_API_KEY.
set -euo pipefail

confirm=--yes
if [ "${1:-}" = --dry-run ]; then
  confirm=--dry-run
  shift
fi

runs=()
while IFS= read -r -d '' file; do # W&B puts a file *.wandb.synced beside what it has uploaded
  [ -e "$file.synced" ] || runs+=("$(dirname "$file")")
done < <(find "${@:-outputs}" -path '*/offline-run-*/*.wandb' -print0 | sort -z)

if [ ${#runs[@]} -eq 0 ]; then
  echo "nothing to upload"
  exit
fi
printf '%s\0' "${runs[@]}" | xargs -0 wandb sync "$confirm"
