"""Makes sealed-v1.json from docs/formats/sealed-v1.md, with other code than Lacre's.

    python make_sealed_v1.py > sealed-v1.json      a test compares the output with the file
    python make_sealed_v1.py --example             the worked example of the document

All keys and IVs here are fixed, so that anybody gets the same bytes. Nothing real is sealed so.
"""

import hashlib
import hmac
import json
import struct
import sys

from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap, aes_key_wrap_with_padding

KEK = bytes(range(0x00, 0x20))
DEK = bytes(range(0x20, 0x40))
KEK_ID = bytes(range(0xA0, 0xB0))
WRAP_IV = bytes(range(0xC0, 0xCC))
PAYLOAD_IV = bytes(range(0xD0, 0xDC))
MAC_KEY = bytes(range(0x40, 0x60))
CBC_IV = bytes(range(0xE0, 0xF0))
# The RSA KEK: the primes that follow two digests. The seed of OAEP is fixed, too.
RSA_P = (int(hashlib.shake_256(b"lacre sealed-v1 p").hexdigest(192), 16) | 3 << 1534 | 1) + 928
RSA_Q = (int(hashlib.shake_256(b"lacre sealed-v1 q").hexdigest(192), 16) | 3 << 1534 | 1) + 3168
RSA_N, RSA_E = RSA_P * RSA_Q, 65537
RSA_D = pow(RSA_E, -1, (RSA_P - 1) * (RSA_Q - 1))
OAEP_SEED = bytes(range(0x60, 0x80))


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
    framed = struct.pack(">H", len(wrapped)) + wrapped if mechanism.startswith("RSA-") else short(wrapped)
    return b"LCRS" + b"\x01" + KEK_ID + struct.pack(">I", kek_version) + short(mechanism.encode()) + short(iv) + framed


def oaep(message, name):
    """RFC 8017, section 7.1.1, without label."""
    digest = lambda data: hashlib.new(name, data).digest()
    size, length = len(digest(b"")), RSA_N.bit_length() // 8
    mask = lambda seed, n: b"".join(digest(seed + struct.pack(">I", i)) for i in range(n // size + 1))[:n]
    xor = lambda a, b: bytes(x ^ y for x, y in zip(a, b))
    block = digest(b"") + bytes(length - len(message) - 2 * size - 2) + b"\x01" + message
    seed = OAEP_SEED[:size]
    block = xor(block, mask(seed, len(block)))
    encoded = b"\x00" + xor(seed, mask(block, size)) + block
    return pow(int.from_bytes(encoded, "big"), RSA_E, RSA_N).to_bytes(length, "big")


def cbc(message):
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(KEK), modes.CBC(CBC_IV)).encryptor()
    return encryptor.update(padder.update(message) + padder.finalize()) + encryptor.finalize()


def with_tag(aad, iv, encrypted):
    return encrypted + hmac.new(MAC_KEY, encode(b"lacre/sealed/v1/tag", aad, iv, encrypted), "sha256").digest()


def wrap(mechanism, aad):
    if mechanism == "A256GCM":
        return WRAP_IV, AESGCM(KEK).encrypt(WRAP_IV, DEK, aad)
    # No AAD in the others: its hash is wrapped together with the key.
    bound = DEK + hashlib.sha256(aad).digest()
    if mechanism in ("A256KW", "A256KW-OBJ"):
        return b"", aes_key_wrap(KEK, bound)
    if mechanism == "A256KWP":
        return b"", aes_key_wrap_with_padding(KEK, bound)
    if mechanism == "A256CBC+HS256":
        return CBC_IV, with_tag(aad, CBC_IV, cbc(bound))
    name = {"RSA-OAEP-256+HS256": "sha256", "RSA-OAEP+HS256": "sha1"}[mechanism]
    return b"", with_tag(aad, b"", oaep(bound, name))


def seal(mechanism, context, kek_version, plaintext):
    aad = wrap_aad(*context, kek_version, mechanism)
    iv, wrapped = wrap(mechanism, aad)
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
        ("key wrap with padding", "A256KWP", here, 1, b"correct horse"),
        ("RSA and HMAC", "RSA-OAEP-256+HS256", here, 1, b"correct horse"),
        ("RSA with SHA-1 and HMAC", "RSA-OAEP+HS256", here, 1, b"correct horse"),
        ("CBC and HMAC", "A256CBC+HS256", here, 1, b"correct horse"),
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
    # What has a length of 16 bits in one mechanism has 8 in the others, and the other way round.
    _, _, _, rsa = seal("RSA-OAEP-256+HS256", here, 1, b"value")
    _, _, _, cbc_value = seal("A256CBC+HS256", here, 1, b"value")
    at = mechanism + 1 + len("RSA-OAEP-256+HS256") + 1
    cases += [
        ("RSA with a length of 8 bits", rsa[:at] + rsa[at + 1 :]),
        ("RSA without its tag", rsa[:at] + b"\x01\x80" + rsa[at + 2 : at + 2 + 384] + rsa[at + 2 + 416 :]),
        ("a name with zeros behind it", rsa.replace(b"\x12RSA-OAEP-256+HS256", b"\x12RSA-OAEP+HS256\0\0\0\0")),
        ("CBC without its IV", cbc_value.replace(b"\x10" + CBC_IV, b"\x00")),
        ("CBC with a length of 16 bits", cbc_value.replace(CBC_IV + b"\x70", CBC_IV + b"\x00\x70")),
    ]
    for name, sealed in cases:
        assert sealed not in (good, rsa, cbc_value), name
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
    number = lambda n: n.to_bytes(384, "big").hex()
    fixed |= {"mac_key": MAC_KEY.hex(), "cbc_iv": CBC_IV.hex(), "rsa_n": number(RSA_N), "rsa_d": number(RSA_D)}
    print(json.dumps({"format": "sealed-v1", **fixed, "valid": list(positive()), "invalid": list(negative())}, indent=1))
