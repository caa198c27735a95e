#!/usr/bin/env bash
# Licences, bans, sources and advisories of everything in Cargo.lock, and in those of the tests'
# PKCS#11 modules, without a network.
#
# The RustSec database is a dated data file beside the project. Where it is absent the advisory part
# is skipped, and the last line says so.
set -euo pipefail
cd "$(dirname "$0")/.."

data=../shared/data/advisory-db.tar.xz
snapshot=2026-08-21T06:28:40Z
# cargo-deny derives the folder's name from the URL in deny.toml.
db=.advisory-dbs/advisory-db-3157b0e258782691

deny() {
  cargo-deny --offline --locked check "$@"
  cargo-deny --offline --locked --config deny.toml --manifest-path tests/backend/shim/Cargo.toml \
    check --allow advisory-not-detected "$@"
  # Kryoptic is loaded by tests and never shipped: it may bring OpenSSL and other versions.
  cargo-deny --offline --locked --config deny.toml --manifest-path tests/backend/kryoptic/Cargo.toml \
    check licenses sources
}
PATH=$PWD/.deps/bin:$PATH

# From a worktree the data is beside the main checkout.
if [ ! -f "$data" ]; then
  common=$(git rev-parse --path-format=absolute --git-common-dir 2>/dev/null || true)
  [ -z "$common" ] || data=$common/../../shared/data/advisory-db.tar.xz
fi
if [ ! -f "$data" ]; then
  deny licenses bans sources
  echo "advisories skipped: ../shared/data/advisory-db.tar.xz is not there"
  exit 0
fi

stamp="$snapshot $(stat -c '%s %Y' "$data")"
if [ "$(cat "$db.stamp" 2>/dev/null)" != "$stamp" ]; then
  rm -rf "$db" "$db.stamp"
  mkdir -p "$db"
  tar -xJf "$data" -C "$db"
  # cargo-deny reads the database's age from its git history; without a repository of its own it
  # would find this project's. The hooks of this machine have nothing to say about it.
  git -C "$db" init -q
  git -C "$db" add -A
  GIT_AUTHOR_DATE=$snapshot GIT_COMMITTER_DATE=$snapshot git -C "$db" \
    -c user.name=advisory-db -c user.email=advisory-db@localhost -c commit.gpgsign=false \
    -c core.hooksPath=/dev/null commit -q -m "RustSec advisory snapshot 2026-08-21"
  # The age is the newer of the commit and this file: left alone it would look new.
  touch -d "$snapshot" "$db/.git/HEAD"
  printf '%s' "$stamp" >"$db.stamp"
fi
deny
