#!/usr/bin/env bash
# Says loudly which tests `make test` will leave out because a tool of the system is missing.
missing=()
command -v prometheus >/dev/null || missing+=("prometheus (dashboard queries and alert rules)")
command -v promtool >/dev/null || missing+=("promtool (Prometheus configuration)")
ldconfig -p | grep -q libb64.so.0d || missing+=("libb64 (perf_analyzer)")
if [ ${#missing[@]} -gt 0 ]; then
    echo "************************************************************************"
    echo "* LEFT OUT, because these are not installed (sudo make system-tools):"
    printf '*   %s\n' "${missing[@]}"
    echo "************************************************************************"
fi
