"""Verifies a JWT from stdin with PyJWT (ES256 only) and prints its claims as JSON.

    python jwt.py --jwks URL|FILE --issuer ISS --audience AUD [--typ at+jwt] < token

Exit 1 with one line on stderr if anything about the token is not as stated.
"""

import sys

# This file's own directory comes first in sys.path, where `import jwt` would find this file.
sys.path.pop(0)

import argparse
import json
import urllib.request

import jwt


def key_set(place: str) -> jwt.PyJWKSet:
    if place.startswith(("http://", "https://")):
        with urllib.request.urlopen(place, timeout=10) as response:
            return jwt.PyJWKSet.from_dict(json.load(response))
    with open(place, encoding="utf-8") as file:
        return jwt.PyJWKSet.from_dict(json.load(file))


def verify(token: str, options: argparse.Namespace) -> dict:
    header = jwt.get_unverified_header(token)
    if options.typ and header.get("typ") != options.typ:
        raise jwt.InvalidTokenError(f"typ is {header.get('typ')!r}, not {options.typ!r}")
    # The kid only chooses among the published keys; the algorithm is ours, never the token's.
    key = key_set(options.jwks)[header["kid"]]
    return jwt.decode(
        token,
        key.key,
        algorithms=["ES256"],
        issuer=options.issuer,
        audience=options.audience,
        options={"require": ["exp", "iat", "iss", "aud"]},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jwks", required=True, help="URL or file of the JWK set")
    parser.add_argument("--issuer", required=True)
    parser.add_argument("--audience", required=True)
    parser.add_argument("--typ", help="what the header's typ must be")
    options = parser.parse_args()
    try:
        print(json.dumps(verify(sys.stdin.read().strip(), options)))
    except (jwt.PyJWTError, KeyError, OSError, ValueError) as error:
        print(f"jwt: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
