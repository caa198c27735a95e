#!/usr/bin/env bash
# Everything that must hold before a change goes in (`test.sh`), or its quick part (`test.sh lint`).
#
# Goes on after a failed step, so that one run shows all failures. The last line counts: each step
# is one, and each of cargo's tests is one.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PWD/.deps/bin:$PATH
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
what=${1:-all}
passed=0
failed=0
failures=()

note() { # name, exit status
  if [ "$2" = 0 ]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    failures+=("$1")
  fi
}

step() { # name, command...
  local name=$1 status=0
  shift
  printf '\n== %s\n' "$name"
  "$@" 2>&1 || status=$?
  note "$name" "$status"
}

# The tests' PKCS#11 module is a package of its own; the tests build it when they need it.
shim() {
  cargo "$1" --manifest-path tests/backend/shim/Cargo.toml "${@:2}"
}

# Kryoptic as a module, also a package of its own.
kryoptic() {
  cargo "$1" --manifest-path tests/backend/kryoptic/Cargo.toml "${@:2}"
}

docs() { RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps --lib --locked; }

# A failed test counts once, by its own line; a run that fails without one (it did not compile, or
# a test program died) counts as one.
tests() {
  local log status=0 ok bad
  printf '\n== tests\n'
  mkdir -p .deps
  log=.deps/test.log
  cargo test --locked --no-fail-fast 2>&1 | tee "$log" || status=$?
  read -r ok bad < <(awk '/^test result:/ {
    for (i = 2; i <= NF; i++) { if ($i == "passed;") ok += $(i - 1); if ($i == "failed;") bad += $(i - 1) }
  } END { print ok + 0, bad + 0 }' "$log")
  passed=$((passed + ok))
  failed=$((failed + bad))
  while read -r name; do failures+=("test $name"); done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log")
  if [ "$status" != 0 ] && [ "$bad" = 0 ]; then note "cargo test" "$status"; fi
}

step "format" cargo fmt --check
step "format of the shim" shim fmt --check
step "clippy" cargo clippy --quiet --all-targets --locked -- -D warnings
step "clippy on the shim" shim clippy --quiet --locked --target-dir "${CARGO_TARGET_DIR:-target}/shim" -- -D warnings
step "format of the Kryoptic module" kryoptic fmt --check
step "licences and advisories" scripts/deny.sh
step "shell scripts" shellcheck softhsm-setup.sh scripts/*.sh .ci/run
step "systemd unit" scripts/unit.sh
if [ "$what" = all ]; then
  step "documentation" docs
  tests
fi

printf '\n'
for failure in "${failures[@]}"; do printf 'failed: %s\n' "$failure"; done
mkdir -p .deps
printf '%d passed, %d failed\n' "$passed" "$failed" | tee .deps/summary
[ "$failed" = 0 ]
