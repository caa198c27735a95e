"""Verifies every live token with PyJWT once a second, with keys as old as Cache-Control allows and no younger.

    python live.py --jwks URL --issuer ISS --audience AUD

Tokens come on standard input, one per line; at its end, prints one line of JSON:
{"tokens", "checks", "kids", "failures"}. An unknown key is a failure and no reason to fetch the keys again.
"""

import sys

# This file's own directory comes first in sys.path, where `import jwt` would find jwt.py.
sys.path.pop(0)

import argparse
import json
import re
import threading
import time
import urllib.request

import jwt


class Keys:
    """The published keys, fetched when what is kept has become too old."""

    def __init__(self, url: str):
        self.url = url
        self.until = 0.0
        self.keys = {}

    def all(self) -> dict:
        # Monotonic, and begun before the request: never kept for longer than was said.
        begun = time.monotonic()
        if begun >= self.until:
            with urllib.request.urlopen(self.url, timeout=10) as response:
                header = response.headers.get("Cache-Control") or ""
                found = re.search(r"\bmax-age=(\d+)", header)
                kept = 0 if re.search(r"\bno-(cache|store)\b", header) or not found else int(found[1])
                self.keys = {key.key_id: key for key in jwt.PyJWKSet.from_dict(json.load(response)).keys}
            self.until = begun + kept
        return self.keys


def verify_all(live: list, keys: Keys, options: argparse.Namespace, report: dict) -> list:
    live = [one for one in live if one["exp"] > time.time()]
    published = keys.all()
    for one in live:
        report["checks"] += 1
        try:
            key = published[one["kid"]]
            jwt.decode(
                one["token"],
                key.key,
                algorithms=[one["alg"]],
                issuer=options.issuer,
                audience=options.audience,
                options={"require": ["exp", "iat", "jti"]},
            )
        except (jwt.PyJWTError, KeyError) as error:
            # It may have ended since the list was made.
            if one["exp"] > time.time() and len(report["failures"]) < 20:
                report["failures"].append(f"{time.time():.3f} {one['kid']}: {type(error).__name__}: {error}")
    return live


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["--jwks", "--issuer", "--audience"]:
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    report = {"tokens": 0, "checks": 0, "kids": [], "failures": []}
    arrived, ended, keys, live = [], threading.Event(), Keys(options.jwks), []

    def read():
        for line in sys.stdin:
            token = line.strip()
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, options={"verify_signature": False})
            arrived.append({"token": token, "kid": header["kid"], "alg": header["alg"], "exp": claims["exp"]})
        ended.set()

    keys.all()
    print("ready", file=sys.stderr, flush=True)
    threading.Thread(target=read, daemon=True).start()
    last = False
    while True:
        begun = time.monotonic()
        new = [arrived.pop(0) for _ in range(len(arrived))]
        report["tokens"] += len(new)
        report["kids"] += sorted({one["kid"] for one in new} - set(report["kids"]))
        live = verify_all(live + new, keys, options, report)
        if last:
            print(json.dumps(report))
            return 0
        last = ended.wait(max(0.0, 1 - (time.monotonic() - begun)))


if __name__ == "__main__":
    sys.exit(main())
