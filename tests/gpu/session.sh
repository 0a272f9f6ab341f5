#!/usr/bin/env bash
# Everything that only a GPU can show, in at most eight minutes, offline, most valuable first.
#
#     bash tests/gpu/wheels.sh && bash tests/gpu/session.sh [--out FOLDER] [--only PART,...] [--dry-run]
#
# Each part runs under its own time limit and writes what it finds to FOLDER at once, so that a later failure loses nothing;
# session.md and session.json have the figures of all, with card and versions. Packages that the machine lacks come from .whl/,
# which wheels.sh fills where a registry can be reached. --dry-run walks every part on the CPU with Triton's interpreter and
# small shapes, and with twice the time.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=gpu-session only=checks,synth,end_to_end,profile,kernels,steps dry=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --dry-run) dry=1 && shift ;;
        *) echo "session.sh: unknown option $1" >&2 && exit 2 ;;
    esac
done
mkdir -p "$out"
case ,$only, in *,steps,*) rm -f "$out/steps.jsonl" ;; esac # which grows line by line
python=$(command -v python3)
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg MLFLOW_DISABLE_TELEMETRY=true PYTHONPATH=$PWD:${PYTHONPATH:-}
if [ -z "$dry" ] && compgen -G '.whl/*.whl' > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    $python -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    $python -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" . || echo "hedgelab's metadata could not be installed"
    mkdir -p "$site/wandb" && touch "$site/wandb/__init__.py" # SAELens imports it; no training step calls it
    export PYTHONPATH=$site:$PYTHONPATH
fi
pytest="$python -m pytest -q -m gpu -p no:cacheprovider --durations=8"
if [ -n "$dry" ]; then
    export HEDGELAB_GPU_DRY_RUN=1 CUDA_VISIBLE_DEVICES=
    shapes=dry slower=2 kernels="--batch 8 --d-in 16 --d-sae 128 --k 2"
else
    shapes=gemma,gemma_16k kernels=--no-sweep
fi
failed=

# part NAME SECONDS COMMAND...: run it where it is wanted, keep what it prints, go on after a failure.
part() {
    local name=$1 seconds=$2
    shift 2
    case ,$only, in *,"$name",*) ;; *) return ;; esac
    local start=$SECONDS
    timeout "$((seconds * ${slower:-1}))" "$@" > "$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit code $code, $((SECONDS - start)) s"
    tail -n "${lines:-25}" "$out/$name.log"
    [ $code = 0 ] || failed="$failed $name"
}

part checks 110 $pytest tests/kernels/triton tests/gpu/test_gpu.py -k 'not commands'
part synth 60 $python tests/gpu/synth.py ${dry:+--small} --json "$out/synth.json"
part end_to_end 60 $pytest tests/gpu/test_gpu.py -k commands
lines=70 part kernels 70 env ${dry:+TRITON_INTERPRET=1} $python -m tests.benchmarks.gpu_kernels $kernels --json "$out/kernels.json"
lines=110 part profile 60 $python tests/gpu/steps.py --profile --shapes $shapes --peer-python "$python" --json "$out/steps.jsonl"
part steps 120 $python tests/gpu/steps.py --shapes $shapes --peer-python "$python" --json "$out/steps.jsonl"
$python tests/gpu/summary.py "$out" || failed="$failed summary"
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
