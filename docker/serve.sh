#!/bin/sh
# `vllm serve` with its arguments. ENGINE_KEY_FILE names a file with the API key that it then wants: a key among the
# arguments could be read by every user of the host.
set -eu
if [ -n "${ENGINE_KEY_FILE:-}" ]; then
    VLLM_API_KEY=$(cat "$ENGINE_KEY_FILE")
    if [ -z "$VLLM_API_KEY" ]; then
        echo "the file of ENGINE_KEY_FILE must hold a key, and is empty" >&2
        exit 2
    fi
    export VLLM_API_KEY
fi
exec vllm serve "$@"
