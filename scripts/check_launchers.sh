#!/usr/bin/env bash
# Two small runs through each launcher that is installed, then a small grid shared out among two workers: everywhere the
# numbers have to be those of one process. A few minutes; nothing is left behind.
#
#   scripts/check_launchers.sh [LAUNCHER...]      (joblib, slurm_local and ray, unless some are named)
#
# Ray's plugin needs an older cloudpickle than other packages here may: give it an environment of its own.
set -euo pipefail

[ $# -gt 0 ] || set -- joblib slurm_local ray
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run=(+experiment=quickstart 'curve=[]' training.epochs=4 budget.queries=200 run.progress=false)
grid=(+benchmark=smoke +only.seed=0 +only.defense=none progress=false)

quietly() {
  "$@" >>said 2>&1 || { tail -n 40 said; exit 1; }
}

numbers() { # of all runs below this folder: what was measured, and with how many threads
  python - "$1" <<'END'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("outputs/*-vs-*/*/result.json")):
    result = json.loads(path.read_text())
    print(result["run_id"], result["environment"]["threads"], result["accuracy"], result["fidelity"])
END
}

export OMP_NUM_THREADS=1
mkdir "$folder/here" && cd "$folder/here"
quietly python -m distill.train "${run[@]}" -m seed=0,1
quietly python -m distill.benchmark "${grid[@]}" workers=1 threads=1
numbers . >"$folder/expected"
echo "one process: $(wc -l <"$folder/expected") runs"

unset OMP_NUM_THREADS # one thread is now the launcher's doing
for launcher in "$@"; do
  mkdir "$folder/$launcher" && cd "$folder/$launcher"
  began=$SECONDS
  if python -m distill.train +launch="$launcher" --cfg hydra 2>&1 | grep 'plugin is not installed'; then
    continue
  fi
  quietly python -m distill.train "${run[@]}" +launch="$launcher" -m seed=0,1
  for made in outputs/*-vs-*/*/result.json; do
    grep -q "  $(basename "$(dirname "$made")") *$" said || { echo "$launcher: no table of $made"; exit 1; }
  done
  quietly python -m distill.benchmark "${grid[@]}" +launch="$launcher" -m worker=0,1
  numbers . | diff "$folder/expected" - || { echo "$launcher: other numbers"; exit 1; }
  echo "$launcher: the same numbers, $((SECONDS - began)) s"
done
