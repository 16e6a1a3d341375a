#!/usr/bin/env bash
# Accuracy of a real model on MVBench, EgoSchema, LongVideoBench and VideoMME, whole and reduced, through the gateway:
#   bench/lmms_eval.sh llava-hf/llava-onevision-qwen2-7b-ov-hf [options of bench/accuracy.py]
#   bench/lmms_eval.sh --gateway http://127.0.0.1:8080 --model NAME [options]
#   bench/lmms_eval.sh --local 20        the embedded model and clips: no weights, no data
# lmms-eval wants other versions than vLLM does, so it has an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.7.3
evaluator=.cache/lmms-eval-$version
if [ ! -e "$evaluator/done" ]; then
  "${PYTHON:-python3}" -m venv --clear "$evaluator"
  "$evaluator/bin/python" -m pip install --quiet "lmms-eval==$version"
  touch "$evaluator/done"
fi
"${PYTHON:-python3}" demo/environment.py
case "${1:-}" in
  "" | -*) ;;
  *) set -- --serve "$@" ;;
esac
exec .venv/bin/python bench/accuracy.py --evaluator "$evaluator/bin/python" "$@"
