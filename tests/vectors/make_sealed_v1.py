"""Makes sealed-v1.json from docs/formats/sealed-v1.md, with other code than Lacre's.

    python make_sealed_v1.py > sealed-v1.json      a test compares the output with the file
    python make_sealed_v1.py --example             the worked example of the document

All keys and IVs here are fixed, so that anybody gets the same bytes. Nothing real is sealed so.
"""

import hashlib
import json
import struct
import sys

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

KEK = bytes(range(0x00, 0x20))
DEK = bytes(range(0x20, 0x40))
KEK_ID = bytes(range(0xA0, 0xB0))
WRAP_IV = bytes(range(0xC0, 0xCC))
PAYLOAD_IV = bytes(range(0xD0, 0xDC))


def encode(*parts):
    """32-bit big-endian length, then the part."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def payload_aad(tenant, kind, record, version):
    number = struct.pack(">Q", version)
    return encode(b"lacre/sealed/v1/payload", tenant.encode(), kind.encode(), record.encode(), number)


def wrap_aad(tenant, kind, record, version, kek_version, mechanism):
    number = struct.pack(">Q", version)
    context = (b"lacre/sealed/v1/wrap", tenant.encode(), kind.encode(), record.encode(), number)
    return encode(*context, KEK_ID, struct.pack(">I", kek_version), mechanism.encode())


def short(part):
    return bytes([len(part)]) + part


def header(mechanism, kek_version, iv, wrapped):
    return b"LCRS" + b"\x01" + KEK_ID + struct.pack(">I", kek_version) + short(mechanism.encode()) + short(iv) + short(wrapped)


def seal(mechanism, context, kek_version, plaintext):
    aad = wrap_aad(*context, kek_version, mechanism)
    if mechanism == "A256GCM":
        iv, wrapped = WRAP_IV, AESGCM(KEK).encrypt(WRAP_IV, DEK, aad)
    else:
        # No AAD in RFC 3394: its hash is wrapped together with the key.
        iv, wrapped = b"", aes_key_wrap(KEK, DEK + hashlib.sha256(aad).digest())
    sealed = AESGCM(DEK).encrypt(PAYLOAD_IV, plaintext, payload_aad(*context))
    ciphertext, tag = sealed[:-16], sealed[-16:]
    first = header(mechanism, kek_version, iv, wrapped)
    whole = first + short(b"A256GCM") + short(PAYLOAD_IV) + struct.pack(">I", len(ciphertext)) + ciphertext + tag
    return first, ciphertext, tag, whole


def positive():
    here = ("default", "secret", "01a21768-4101-75eb-a9af-db33cf966f25", 1)
    cases = [
        ("a password", "A256GCM", here, 1, b"correct horse"),
        ("key wrap", "A256KW", here, 1, b"correct horse"),
        ("key wrap of an object", "A256KW-OBJ", here, 1, b"correct horse"),
        ("empty", "A256GCM", here, 1, b""),
        ("one byte", "A256GCM", here, 1, b"\x00"),
        ("one slot of guarded memory", "A256GCM", here, 1, bytes(i % 251 for i in range(4096))),
        ("more than a slot", "A256GCM", here, 1, bytes(i % 251 for i in range(5000))),
        ("greatest versions", "A256GCM", ("default", "secret", "r", 2**64 - 1), 2**32 - 1, b"v"),
        ("the caller's context", "A256GCM", ("default", "external", "orders/4711 \u00e7\u00e3o \u6f22", 0), 3, b"v"),
        ("shifted to the left", "A256GCM", ("ab", "c", "d", 1), 1, b"v"),
        ("shifted to the right", "A256GCM", ("a", "bc", "d", 1), 1, b"v"),
        ("a NUL in the record", "A256GCM", ("a", "b", "c\0d", 1), 1, b"v"),
    ]
    for name, mechanism, context, kek_version, plaintext in cases:
        first, ciphertext, tag, whole = seal(mechanism, context, kek_version, plaintext)
        tenant, kind, record, version = context
        yield {
            "name": name,
            "mechanism": mechanism,
            "tenant": tenant,
            "kind": kind,
            "record": record,
            "version": str(version),
            "kek_version": kek_version,
            "plaintext": plaintext.hex(),
            "wrap_aad": wrap_aad(*context, kek_version, mechanism).hex(),
            "payload_aad": payload_aad(*context).hex(),
            "wrapped_dek": first.hex(),
            "ciphertext": ciphertext.hex(),
            "tag": tag.hex(),
            "sealed": whole.hex(),
        }


def negative():
    """Bytes that a reader must refuse before it asks a device."""
    here = ("default", "secret", "r", 1)
    _, _, _, good = seal("A256GCM", here, 1, b"value")
    mechanism = 25  # where the mechanism's length stands
    wrapped = mechanism + 1 + len("A256GCM") + 1 + 12
    payload = wrapped + 1 + 48
    length = payload + 1 + len("A256GCM") + 1 + 12
    cut = lambda at, to: good[:at] + to + good[at + len(to) :]
    cases = [
        ("empty", b""),
        ("another magic", cut(0, b"LCRT")),
        ("format 0", cut(4, b"\x00")),
        ("format 2", cut(4, b"\x02")),
        ("only the first half", good[:payload]),
        ("without its last byte", good[:-1]),
        ("a tag of 12 bytes", good[:-4]),
        ("a byte too many", good + b"\x00"),
        ("unknown mechanism", cut(mechanism + 1, b"A256CBC")),
        ("mechanism in lower case", cut(mechanism + 1, b"a256gcm")),
        ("mechanism longer than the value", cut(mechanism, b"\xff")),
        ("wrap IV of 11 bytes", good[: mechanism + 8] + b"\x0b" + good[mechanism + 9 :]),
        ("wrapped DEK of 47 bytes", good[:wrapped] + b"\x2f" + good[wrapped + 1 :]),
        ("unknown payload algorithm", cut(payload + 1, b"A128GCM")),
        ("length beyond the end", cut(length, b"\x00\x00\x00\x06")),
        ("length of 4 GiB", cut(length, b"\xff\xff\xff\xff")),
        ("length one short", cut(length, b"\x00\x00\x00\x04")),
    ]
    for name, sealed in cases:
        assert sealed != good, name
        yield {"name": name, "sealed": sealed.hex()}


def example():
    first, ciphertext, tag, whole = seal("A256GCM", ("default", "secret", "r-1", 1), 1, b"correct horse")
    print("wrap AAD    ", wrap_aad("default", "secret", "r-1", 1, 1, "A256GCM").hex())
    print("payload AAD ", payload_aad("default", "secret", "r-1", 1).hex())
    print("wrapped_dek ", first.hex())
    print("ciphertext  ", ciphertext.hex())
    print("tag         ", tag.hex())
    print("sealed      ", whole.hex())


if "--example" in sys.argv:
    example()
else:
    fixed = {"kek": KEK.hex(), "dek": DEK.hex(), "kek_id": KEK_ID.hex(), "wrap_iv": WRAP_IV.hex(), "payload_iv": PAYLOAD_IV.hex()}
    print(json.dumps({"format": "sealed-v1", **fixed, "valid": list(positive()), "invalid": list(negative())}, indent=1))
