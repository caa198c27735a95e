#!/usr/bin/env bash
# Rehearses the loss of the HSM on two SoftHSM tokens in a scratch directory, as docs/operations/restore.md
# tells it, and prints how long the way back took. Touches nothing else and leaves nothing behind.
#
#   LACRE=path/to/lacre SECRETS=20 scripts/restore-drill.sh
set -euo pipefail
umask 077

lacre=${LACRE:-lacre}
secrets=${SECRETS:-20}
dir=$(mktemp -d "${TMPDIR:-/tmp}/lacre-drill-XXXXXX")
daemon=

clean_up() {
  if [ -n "$daemon" ]; then kill -9 "$daemon" 2>/dev/null || true; fi
  rm -rf "$dir"
}
trap clean_up EXIT

say() { printf 'drill: %s\n' "$*"; }
die() {
  printf 'drill: FAILED: %s\n' "$*" >&2
  tail -n 20 "$dir"/*.log >&2 2>/dev/null || true
  exit 1
}

# One member of the JSON on standard input.
member() { python3 -c 'import json, sys; print(eval("json.load(sys.stdin)" + sys.argv[1]))' "$1"; }

softhsm_module() {
  local path
  for path in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so \
    /usr/lib64/pkcs11/libsofthsm2.so /usr/local/lib/softhsm/libsofthsm2.so; do
    if [ -e "$path" ]; then printf '%s' "$path" && return; fi
  done
  die "SoftHSM is not installed"
}
module=${SOFTHSM2_MODULE:-$(softhsm_module)}

new_token() { # label
  softhsm2-util --init-token --free --label "$1" --pin 271828 --so-pin 31415926 >/dev/null
}

configure() { # file, label of the main token, label of the backup token, its PIN file
  cat > "$1" <<TOML
data_dir = "$dir/data"
memory.allow_unlocked = true
[server]
listen = "127.0.0.1:0"
[seal.pkcs11]
module = "$module"
token = "$2"
pin_source = "file:$dir/pin"
[devices.vault.pkcs11]
module = "$module"
token = "$3"
pin_source = "file:$4"
[backup]
device = "vault"
TOML
}

start() { # configuration
  : > "$dir/ready"
  "$lacre" serve --config "$1" > "$dir/ready" 2>> "$dir/daemon.log" &
  daemon=$!
  for _ in $(seq 600); do
    LACRE_ADDR=$(sed -n 's/^lacre ready url=\([^ ]*\).*/\1/p' "$dir/ready")
    if [ -n "$LACRE_ADDR" ]; then
      export LACRE_ADDR
      return
    fi
    kill -0 "$daemon" 2>/dev/null || die "the daemon ended"
    sleep 0.1
  done
  die "the daemon did not become ready"
}

stop() {
  kill "$daemon"
  wait "$daemon" || true
  daemon=
}

export SOFTHSM2_CONF=$dir/softhsm2.conf
mkdir "$dir/tokens"
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n' "$dir" > "$SOFTHSM2_CONF"
printf 271828 > "$dir/pin"
printf 000000 > "$dir/wrong-pin"
new_token main
new_token vault

say "an installation with a backup KEK on a second token"
configure "$dir/lacre.toml" main vault "$dir/pin"
LACRE_CLIENT_ID=$("$lacre" init --config "$dir/lacre.toml" --secret-out "$dir/admin.secret" -o name 2>> "$dir/init.log")
export LACRE_CLIENT_ID LACRE_CLIENT_SECRET_FILE=$dir/admin.secret
start "$dir/lacre.toml"
for n in $(seq "$secrets"); do
  printf 'value of %s' "$n" | "$lacre" secrets create "drill/$n" -o name > /dev/null
done
for _ in $(seq 300); do
  left=$("$lacre" status -o json | member '["status"]["vault"]["without_backup"]')
  [ "$left" != 0 ] || break
  sleep 0.1
done
[ "$left" = 0 ] || die "$left records have no backup"
say "$secrets records, each with a second wrap"
stop
mkdir "$dir/copy"
cp "$dir/data/lacre.db" "$dir/copy/"

say "the HSM is lost; what is left: the database's copy and the backup token"
softhsm2-util --delete-token --token main > /dev/null
rm -rf "$dir/data"
began=$(date +%s%N)

mkdir "$dir/data"
cp "$dir/copy/lacre.db" "$dir/data/"
new_token replacement
new_token stranger

# What is wrong is an error, and nothing has changed: the third try is the first that works.
fails() { # what, configuration, text
  if "$lacre" restore run --config "$2" --lost default --secrets-dir "$dir/new" > "$dir/out" 2> "$dir/err"; then
    die "$1 was accepted"
  fi
  grep -q -e "$3" "$dir/err" || die "$1 gives another error: $(cat "$dir/err")"
  say "$1 is refused: $(tail -n 1 "$dir/err")"
}
configure "$dir/wrong.toml" replacement stranger "$dir/pin"
fails "a wrong backup token" "$dir/wrong.toml" "does not hold key"
configure "$dir/wrong.toml" replacement vault "$dir/wrong-pin"
fails "a wrong PIN" "$dir/wrong.toml" "PIN"

configure "$dir/restored.toml" replacement vault "$dir/pin"
"$lacre" restore run --config "$dir/restored.toml" --lost default --secrets-dir "$dir/new" -o json \
  > "$dir/report" 2>> "$dir/restore.log" || die "the restore"
say "restored $(member '["restored"]' < "$dir/report") records, $(member '["reissued"]' < "$dir/report") application(s) have new secrets"

start "$dir/restored.toml"
if "$lacre" kek list > /dev/null 2>&1; then die "the old client secret is accepted"; fi
export LACRE_CLIENT_SECRET_FILE=$dir/new/$LACRE_CLIENT_ID.secret
since=$("$lacre" status -o json 2> /dev/null | member '["status"]["quarantined_at"]')
[ "$since" != None ] || die "there is no quarantine"
if "$lacre" kek rotate > /dev/null 2> "$dir/err"; then die "a key was rotated in quarantine"; fi
grep -q quarantine "$dir/err" || die "the refusal does not say why"
for n in $(seq "$secrets"); do
  [ "$("$lacre" secrets get "drill/$n" --reveal)" = "value of $n" ] || die "drill/$n is another value"
done
ended=$(date +%s%N)
say "every value is readable again; in quarantine since $since"

"$lacre" restore release > /dev/null
printf new | "$lacre" secrets create drill/after -o name > /dev/null
"$lacre" kek rotate > /dev/null 2>&1
"$lacre" audit verify --full --checkpoint "$dir/checkpoint" > "$dir/verified" 2>&1 || die "the audit log is not whole"
"$lacre" audit tail --after 0 -o ndjson > "$dir/records"
for action in restore.begin key.retire app.reissue restore.end restore.release; do
  grep -q "\"action\":\"$action\"" "$dir/records" || die "the audit log lacks $action"
done
stop
say "released; the audit log is whole, from before the loss to now"
printf 'RTO %d.%03d s for %s records\n' $(((ended - began) / 1000000000)) $(((ended - began) / 1000000 % 1000)) "$secrets"
