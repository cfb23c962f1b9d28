#!/usr/bin/env bash
# Run every check that needs a CUDA device, in at most 9 minutes; prints a summary and fails if a check fails.
#
#   benchmarks/on_gpu.sh [--rehearse] [OUT]
#
# OUT: folder for the outputs of the checks (on_gpu-results). PYTHON: the interpreter (.venv/bin/python).
# LIMIT: seconds for all of it (540).
# --rehearse: the same checks with tiny sizes on the CPU, in about two minutes of its time, to see that all of them run; a
# busy machine gets ten times the limits.
#
# Checks: the device; tests of what runs otherwise on CUDA (4-bit bases, paged optimizers, caches); the QLoRA recipe with nf4
# and a paged optimizer; step time and peak memory of all arms beside the predictions, with the time constant and the energy
# meter; the same on a 7 B shape in 4 bits. Weights are random, so nothing is downloaded.
set -u
cd "$(dirname "$0")/.."

rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=1; shift; fi
out=${1:-on_gpu-results}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
[ -n "$rehearse" ] && export CUDA_VISIBLE_DEVICES=

if [ -z "$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device: run benchmarks/on_gpu.sh --rehearse on a CPU." >&2
    exit 2
fi

start=$SECONDS
patience=${rehearse:+10}
patience=${patience:-1}
limit=${LIMIT:-$((540 * patience))}
failed=

# check NAME SECONDS COMMAND…: run with a time limit, within what is left of the whole
check() {
    local name=$1 most=$(($2 * patience)) left=$((limit - SECONDS + start)) began=$SECONDS state=passed
    shift 2
    [ "$left" -lt 5 ] && { echo "$name: not run, no time left"; failed="$failed $name"; return; }
    [ "$most" -gt "$left" ] && most=$left
    timeout "$most" "$@" >"$out/$name.txt" 2>&1
    local code=$?
    [ "$code" = 124 ] && state="stopped after $most s"
    [ "$code" != 0 ] && [ "$code" != 124 ] && state="failed ($code)"
    [ "$code" != 0 ] && failed="$failed $name"
    echo "$name: $state, $((SECONDS - began)) s; $out/$name.txt"
}

device() {
    [ -n "$rehearse" ] || nvidia-smi
    "$python" - <<'END'
import bitsandbytes, peft, torch, transformers

device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
      f"bitsandbytes {bitsandbytes.__version__}")
END
}

# a tiny model in place of recipes/qlora.yaml's, nf4 and a paged optimizer, with answers predicted from random text
recipe() {
    "$python" - "$out" "$rehearse" <<'END' || return
import json, random, sys
from pathlib import Path

from ruamel.yaml import YAML

from peft_blueprint.testing import save_tiny_model

out, rehearse = Path(sys.argv[1]), bool(sys.argv[2])
folder = save_tiny_model(out / "tiny", layers=4)
draw = random.Random(0)
rows = [{"prompt": " ".join(str(draw.randrange(90)) for _ in range(8)), "completion": " 1 2 3"} for _ in range(64)]
(out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
settings = YAML(typ="safe").load(Path("recipes/qlora.yaml"))
data = str(out / "data.jsonl")
settings |= {"model": str(folder), "train": data, "held_out": data, "output": str(out / "qlora"), "max_length": 32}
settings["training"] |= {"max_steps": 3 if rehearse else 20, "optim": "paged_adamw_8bit"}
(out / "qlora.json").write_text(json.dumps(settings))  # JSON is YAML 1.2
END
    "$python" -m peft_blueprint.cli train "$out/qlora.json"
}

pytest=("$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=0)
tests=(tests/train/test_frozen_prefix.py tests/train/test_freezing.py tests/train/test_qlora.py tests/train/test_unfreezing.py)
steps=("$python" -m benchmarks gpu)
if [ -n "$rehearse" ]; then
    tests=("tests/train/test_frozen_prefix.py" -k "nf4 or store")
    steps+=(--quick)
    large=("${steps[@]}" --dtype nf4 --checkpointing --arms all-linear "answer only")
else
    large=("${steps[@]}" --shape 7b --dtype nf4 --checkpointing --optimizer paged_adamw_8bit --examples 1 --length 8192 --rounds 3)
fi

export -f device recipe
export python out rehearse
check device 30 bash -c device
check recipe 90 bash -c recipe
check steps 120 "${steps[@]}"
check steps-7b-nf4 150 "${large[@]}"
check tests 150 "${pytest[@]}" "${tests[@]}"

echo
for name in steps steps-7b-nf4; do
    grep -E '^(\||FLOPs|\(the|Energy|[0-9a-z]+ shape)' "$out/$name.txt" 2>/dev/null
done
echo "$((SECONDS - start)) s in all.${failed:+ Not passed:$failed.}"
[ -z "$failed" ]
