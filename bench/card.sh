#!/usr/bin/env bash
# Everything that only a GPU can tell, in the order of its value, with a time limit and a file of JSON for each phase.
#
#   bash bench/card.sh --fetch WHEELS            where there is a network: wheels of what a bare machine lacks
#   bash bench/card.sh --out DIR --wheels WHEELS    on the card: about 25 minutes; needs torch, transformers, triton
#   bash bench/card.sh --dry --out DIR           the same walk on a CPU, small: a minute and a half of CPU time
#   bash bench/card.sh --out DIR kernels step    these phases alone
#
# DIR/phases.json says which phase ended how and when; DIR/PHASE.json and DIR/PHASE.log what it found and said. A phase
# that fails or takes too long does not keep the next from its turn; the exit code is 1 if one did.
set -uo pipefail

out=card wheels="" dry="" wanted=""
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift ;;
    --wheels) wheels=$(realpath "$2"); shift ;;
    --fetch) fetch=$(realpath -m "$2"); shift ;;
    --dry) dry=yes ;;
    *) wanted="$wanted $1" ;;
  esac
  shift
done
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# module:package of what torch's own machines lack
lacking="pydantic:pydantic pydantic_core:pydantic_core annotated_types:annotated-types phonenumbers:phonenumbers
  typing_inspection:typing-inspection stdnum:python-stdnum typer:typer einops:einops fla:fla-core"
if [ -n "${fetch:-}" ]; then
  packages=$(for pair in $lacking; do grep "^${pair#*:}==" requirements.lock || echo "${pair#*:}"; done)
  exec "$python" -m pip download --no-deps --only-binary :all: --python-version "${FOR_PYTHON:-3.12}" \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any --dest "$fetch" $packages
fi

mkdir -p "$out"
export PYTHONPATH="$PWD/src:$out/packages${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
for pair in $lacking; do
  [ -z "$wheels" ] || "$python" -c "import ${pair%:*}" 2>/dev/null ||
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$out/packages" "${pair#*:}"
done

failed=0
echo "[]" >"$out/phases.json"
phase() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  [ -z "$wanted" ] || [[ " $wanted " == *" $name "* ]] || return 0
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ "$code" = 0 ] || failed=1
  "$python" - "$out/phases.json" "$name" "$code" "$((SECONDS - began))" "$limit" <<'PY'
import json, sys
path, name, code, seconds, limit = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    phases = json.load(file)
phases.append({"phase": name, "exit_code": int(code), "seconds": int(seconds), "limit": int(limit)})
with open(path, "w", encoding="utf-8") as file:
    json.dump(phases, file, indent=2)
PY
  echo "$name: exit code $code after $((SECONDS - began)) of $limit seconds"
}
asked() { # JSON COMMAND...: keep what a command prints
  local file=$1
  shift
  set -o pipefail
  "$@" | tee "$file"
}
export -f asked
doctor=(bash -c 'asked "$0" "$@"' "$out/doctor.json" "$python" -m qwenscope doctor --json)
resume=(bash -c 'asked "$0" "$@"' "$out/resume.json" "$python" -m qwenscope doctor --self-test --json)
mkdir -p "$out/without_fla/fla" # a package that cannot be imported, before the real one on the path
echo 'raise ImportError("left out")' >"$out/without_fla/fla/__init__.py"
without=(env PYTHONPATH="$out/without_fla:$PYTHONPATH")

if [ -n "$dry" ]; then
  phase doctor 300 "${doctor[@]}"
  phase kernels 300 env TRITON_INTERPRET=1 "$python" bench/kernels.py --json "$out/kernels.json"
  phase step 600 "$python" bench/step.py --shape 1024/16 --batch 256 --repeats 1 --trainer ours-fp32 --json "$out/step.json"
  phase fullsize 600 "$python" bench/fullsize.py --reduced --seconds 0.1 --json "$out/fullsize.json"
  phase resume 600 "${resume[@]}"
  phase fullsize_without_fla 600 "${without[@]}" "$python" bench/fullsize.py --reduced --seconds 0.1 \
    --json "$out/fullsize_without_fla.json"
else
  phase doctor 120 "${doctor[@]}"
  phase kernels 180 "$python" bench/kernels.py --json "$out/kernels.json"
  phase step 240 "$python" bench/gpu.py --json "$out/step.json"
  phase fullsize 420 "$python" bench/fullsize.py --seconds 60 --json "$out/fullsize.json" ${FULLSIZE:-}
  phase resume 180 "${resume[@]}"
  phase fullsize_without_fla 420 "${without[@]}" "$python" bench/fullsize.py --seconds 40 \
    --json "$out/fullsize_without_fla.json" ${FULLSIZE:-}
  [ -z "${PEERS:-}" ] || phase peers 420 "$python" bench/gpu.py $PEERS --json "$out/peers.json"
fi
exit $failed
