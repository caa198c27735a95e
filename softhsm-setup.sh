#!/usr/bin/env bash
# Makes a SoftHSM token for development and tests, in a directory of its own.
#
# Repeatable: a second run changes nothing, and a run that was killed is completed by the next one.
# A token is built in a staging directory and moved into place by one rename, so DIR/tokens never
# holds a half-made one. The program embeds this file for `lacre dev`; it must stay self-contained.
#
# SoftHSM keeps keys in files. It is a test device and never protects anything that matters.
set -euo pipefail
umask 077

dir=./.dev/softhsm
label=lacre-dev
reset=no
print_only=no

usage() {
  cat <<'USAGE'
Usage: softhsm-setup.sh [--dir DIR] [--label LABEL] [--reset] [--print-env]

Makes a SoftHSM token with random PINs and prints how to use it.

  --dir DIR      where everything is kept (default: ./.dev/softhsm)
  --label LABEL  the token's label (default: lacre-dev), 1 to 32 of A-Z a-z 0-9 . _ -
  --reset        delete the tokens and PINs in DIR first; every key in them is lost
  --print-env    change nothing, only print the settings of the token that is there
  --help         this text

stdout is a shell fragment, so that   eval "$(./softhsm-setup.sh)"   sets
  SOFTHSM2_CONF, LACRE_PKCS11_MODULE, LACRE_PIN_FILE, LACRE_PKCS11_URI

Files in DIR: softhsm2.conf, tokens/ (0700), pin and so-pin (0600).
USAGE
}

say() { printf 'softhsm-setup: %s\n' "$*" >&2; }

die() {
  say "error: $1"
  [ $# -lt 2 ] || say "hint: $2"
  exit 1
}

value_of() { # option, number of arguments left, value
  if [ "$2" -lt 2 ] || [ -z "$3" ]; then die "$1 needs a value" "see --help"; fi
  printf '%s' "$3"
}

while [ $# -gt 0 ]; do
  case $1 in
    --dir) dir=$(value_of "$1" $# "${2-}"); shift ;;
    --dir=*) dir=${1#*=} ;;
    --label) label=$(value_of "$1" $# "${2-}"); shift ;;
    --label=*) label=${1#*=} ;;
    --reset) reset=yes ;;
    --print-env) print_only=yes ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument $1" "see --help" ;;
  esac
  shift
done

[ -n "$dir" ] || die "--dir needs a value" "see --help"
# 32 bytes is the width of a PKCS#11 label; the alphabet needs no escaping in a pkcs11: URI.
[[ $label =~ ^[A-Za-z0-9._-]{1,32}$ ]] || die "not a usable label: $label" "1 to 32 of A-Z a-z 0-9 . _ -"
[ "$print_only$reset" != yesyes ] || die "--print-env changes nothing, --reset deletes: use one of them"

find_module() {
  local candidate
  for candidate in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so \
    /usr/lib64/softhsm/libsofthsm2.so /usr/lib64/libsofthsm2.so /usr/local/lib/softhsm/libsofthsm2.so; do
    if [ -r "$candidate" ]; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "libsofthsm2.so is not installed" "apt-get install softhsm2"
}

conf_text() { # token directory
  printf '%s\n' "directories.tokendir = $1" 'objectstore.backend = file' 'log.level = ERROR' 'slots.removable = false'
}

# One line per initialised token: serial number, whether the user PIN is set, label. Slot numbers
# are not looked at: SoftHSM derives them from the serial and renumbers after initialisation.
tokens() { # configuration file
  SOFTHSM2_CONF=$1 softhsm2-util --show-slots | awk '
    /^ *Serial number:/ { serial = $3 }
    /^ *Initialized:/ { initialised = $2 }
    /^ *User PIN init\.:/ { pin = $4 }
    /^ *Label:/ {
      sub(/^ *Label: */, "")
      sub(/ *$/, "")
      if (initialised == "yes") print serial, pin, $0
    }'
}

# The serial number of the token with our label; nothing if there is none.
serial_of_label() { # configuration file
  local found
  found=$(tokens "$1" | awk -v label="$label" 'NF == 3 && $3 == label { print $1, $2 }')
  [ "$(printf '%s' "$found" | grep -c .)" -le 1 ] || die "$dir has several tokens labelled $label" "use --reset"
  case $found in
    '') ;;
    *' yes') printf '%s' "${found% *}" ;;
    *) die "token $label in $dir has no user PIN" "use --reset" ;;
  esac
}

random_pin() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

make_pin() { # file
  [ ! -s "$1" ] || return 0
  random_pin >"$1.new"
  mv "$1.new" "$1"
}

# softhsm2-util takes PINs as arguments, where every user of the machine can read them, or asks
# for them on a terminal and on nothing else. So it gets a terminal from script(1), part of
# Debian's essential packages, and the PINs arrive on that terminal: each is asked for twice.
init_token() { # configuration file, log
  local so_pin user_pin
  so_pin=$(cat so-pin)
  user_pin=$(cat pin)
  printf '%s\n' "$so_pin" "$so_pin" "$user_pin" "$user_pin" |
    SOFTHSM2_CONF=$1 timeout 60 script -qec "softhsm2-util --init-token --free --label $label" /dev/null >"$2" 2>&1
}

make_token() {
  local stage=$here/staging made
  mkdir -p "$stage/tokens"
  conf_text "$stage/tokens" >"$stage/softhsm2.conf"
  if ! init_token "$stage/softhsm2.conf" "$stage/log"; then
    # The terminal may have echoed the PINs into the log.
    grep -vF -e "$(cat pin)" -e "$(cat so-pin)" "$stage/log" >&2 || true
    die "softhsm2-util could not make the token" "is $here writable, and is the disk full?"
  fi
  [ -n "$(serial_of_label "$stage/softhsm2.conf")" ] || die "the new token does not show up"
  made=$(find "$stage/tokens" -mindepth 1 -maxdepth 1 -type d)
  # The staged files reach the disk before the name that makes them count.
  sync
  mv "$made" tokens/
  rm -rf "$stage"
}

# What a URI path may not hold literally becomes %XX, byte by byte.
percent_encode() {
  local LC_ALL=C text=$1 i char
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    case $char in
      [A-Za-z0-9._~/-]) printf '%s' "$char" ;;
      *) printf '%%%02X' "'$char" ;;
    esac
  done
}

print_env() { # serial
  local uri
  uri="pkcs11:token=$label;serial=$1?module-path=$(percent_encode "$module")"
  uri="$uri&pin-source=file:$(percent_encode "$here/pin")"
  printf 'export SOFTHSM2_CONF=%q\n' "$here/softhsm2.conf"
  printf 'export LACRE_PKCS11_MODULE=%q\n' "$module"
  printf 'export LACRE_PIN_FILE=%q\n' "$here/pin"
  printf "export LACRE_PKCS11_URI='%s'\n" "$uri"
}

for tool in softhsm2-util script awk od timeout flock; do
  command -v "$tool" >/dev/null || die "$tool is missing" "apt-get install softhsm2 bsdutils util-linux mawk coreutils"
done
module=$(find_module)

if [ "$print_only" = yes ]; then
  [ -r "$dir/softhsm2.conf" ] || die "no token in $dir" "run without --print-env to make one"
else
  mkdir -p "$dir"
fi
here=$(cd "$dir" && pwd -P)
cd "$here"

if [ "$print_only" = yes ]; then
  serial=$(serial_of_label "$here/softhsm2.conf")
  if [ -z "$serial" ] || [ ! -s pin ]; then
    die "no token labelled $label in $here" "run without --print-env to make one"
  fi
  print_env "$serial"
  exit 0
fi

# Two runs at once would make two tokens of one label. The lock goes with the process.
exec 9>>"$here/.lock"
flock -w 60 9 || die "another softhsm-setup.sh works in $here"

rm -rf staging
if [ "$reset" = yes ]; then
  say "deleting the tokens in $here"
  rm -rf tokens pin so-pin softhsm2.conf
fi
mkdir -p tokens
chmod 700 tokens
# Rewritten only when it differs: a copied or moved DIR gets its new path, a second run no new file.
if [ "$(cat softhsm2.conf 2>/dev/null)" != "$(conf_text "$here/tokens")" ]; then
  conf_text "$here/tokens" >softhsm2.conf.new
  mv softhsm2.conf.new softhsm2.conf
fi

serial=$(serial_of_label "$here/softhsm2.conf")
if [ -n "$(tokens "$here/softhsm2.conf")" ] && { [ ! -s pin ] || [ ! -s so-pin ]; }; then
  die "$here has tokens but not their PINs" "use --reset to start again; the keys in them are lost"
fi
if [ -z "$serial" ]; then
  make_pin so-pin
  make_pin pin
  make_token
  serial=$(serial_of_label "$here/softhsm2.conf")
  [ -n "$serial" ] || die "the new token does not show up"
  say "made token $label, serial $serial, in $here"
else
  say "token $label, serial $serial, is in $here"
fi
print_env "$serial"
