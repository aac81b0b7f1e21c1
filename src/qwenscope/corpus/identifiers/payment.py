"""IBANs, payment cards and crypto addresses, each with its checksum."""

from __future__ import annotations

import hashlib
import re

from stdnum import bitcoin, iban, luhn

from qwenscope.corpus.identifiers.rules import (
    Rule,
    Span,
    after,
    before,
    claimed,
    everywhere,
    is_named_by,
    numbers,
    where,
)

_IBAN = re.compile(
    r"(?:(?<![0-9A-Za-z])|(?<=IBAN)|(?<=iban)|(?<=Iban))(?:A[DELTZ]|B[AEGHIRY]|C[HRYZ]|D[EJKO]|E[EGS]|F[IKOR]"
    r"|G[BEILRT]|"
    r"H[NRU]|I[ELQST]|JO|K[WZ]|L[BCITUVY]|M[CDEKNRTU]|N[ILO]|OM|P[KLST]|QA|R[OSU]|S[ACDEIKMOTV]|T[LNR]|UA|V[AG]|XK|YE)"
    r"[ \-.]?[0-9]{2}(?:[ \t\r\n.\-]{0,3}[0-9A-Z]){11,30}",
    re.IGNORECASE,
)
_SEP = r"[ \t\r\n.\-/]{1,3}"
_CARD = re.compile(
    rf"(?<![0-9])(?<![0-9][.\-])(?:[0-9]{{12,19}}"
    rf"|[0-9]{{4}}{_SEP}[0-9]{{4}}{_SEP}[0-9]{{4}}{_SEP}[0-9]{{4}}(?:{_SEP}[0-9]{{3}}(?![0-9]))?"
    rf"|[0-9]{{4}}{_SEP}[0-9]{{6}}{_SEP}[0-9]{{4,5}})(?![0-9]|\.[0-9])"
)
_BRANDS = re.compile(  # first digits and length of those in use
    r"4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[01])\d{13}|2720\d{12}|220[0-4]\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11,13}|35(?:2[89]|[3-8]\d)\d{12,15}|6(?:011|4[4-9]\d|5\d\d|[0237]\d\d|81\d)\d{12,15}"
    r"|(?:50|5[678]|8[12])\d{14,17}"
)
_CARD_CUE = re.compile(
    r"(?<![A-Za-z])(?:card|visa|mastercard|maestro|debit|credit)(?![A-Za-z])|卡号|карт", re.IGNORECASE
)
_TEST_CARDS = frozenset(
    re.findall(
        r"\S+",
        """4111111111111111 4012888888881881 4242424242424242 4000056655665556 5555555555554444 5105105105105100
        5200828282828210
    2223003122003222 378282246310005 371449635398431 6011111111111117 6011000990139424 30569309025904 38520000023237
    3530111333300000 3566002020360505 4222222222222 4000000000000002 6200000000000005""",
    )
)
_MONERO = re.compile(r"(?<![0-9A-Za-z])[48][0-9AB][1-9A-HJ-NP-Za-km-z]{93}(?:[1-9A-HJ-NP-Za-km-z]{11})?(?![0-9A-Za-z])")
_ARITHMETIC_AFTER = re.compile(r"\s?(?:[+*^%\u00d7]|//|<<|>>|[<>]=?)\s?[\w(]|\s[/\-]\s[0-9]")
_ARITHMETIC_BEFORE = re.compile(r"[\w)\]]\s?(?:\*\*|[+*^%])\s?$|[0-9)]\s[/\-]\s$|(?<![0-9])0,$")
_ALNUM = re.compile(r"(?!(?:exp|cvv|cvc|valid|thru))[0-9A-Za-z_]{1,40}", re.IGNORECASE)


def _iban(match: re.Match[str]) -> Span | None:
    places = [place for place, char in enumerate(match[0]) if char.isalnum()]
    compact = "".join(match[0][place] for place in places).upper()
    for length in range(len(compact), 14, -1):
        if iban.is_valid(compact[:length], check_country=False):
            return match.start(), match.start() + places[length - 1] + 1
    return None


def _card(match: re.Match[str]) -> Span | None:
    digits = re.sub(r"[^0-9]", "", match[0])
    brand = _BRANDS.fullmatch(digits) or (len(digits) < 16 and is_named_by(_CARD_CUE, before(match)))
    if not brand or (len(set(digits)) < 3 and digits not in _TEST_CARDS) or not luhn.is_valid(digits):
        return None
    if _ARITHMETIC_AFTER.match(after(match)) or _ARITHMETIC_BEFORE.search(before(match)):
        return None
    prefix = re.search(r"[0-9A-Za-z_]*$", before(match))
    suffix = _ALNUM.match(match.string, match.end())
    if any(char.isdecimal() for part in (prefix, suffix) if part for char in part[0]):  # part of a hash or an id
        return None
    return match.span() if digits not in _TEST_CARDS or claimed(match) else None


def _base58(match: re.Match[str]) -> Span | None:
    """Bitcoin and its kin: addresses and private keys; all end in four bytes of a double SHA-256."""
    value = match[0]
    if value.islower() or value.isupper() or value.isdecimal():
        return None
    data = bitcoin.b58decode(value)
    checksum = hashlib.sha256(hashlib.sha256(data[:-4]).digest()).digest()[:4]
    return match.span() if checksum == data[-4:] else None


def _bech32(match: re.Match[str]) -> Span | None:
    prefix, _, data = match[0].lower().rpartition("1")
    expanded = [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix]
    values = ["qpzry9x8gf2tvdw0s3jn54khce6mua7l".index(char) for char in data]
    return match.span() if bitcoin.bech32_checksum(expanded + values) in (1, 0x2BC830A3) else None


def _monero(match: re.Match[str]) -> Span | None:
    """By form: its checksum is Keccak's, which no library here has."""
    return match.span() if len(set(match[0])) > 20 else None


def _ethereum(match: re.Match[str]) -> Span | None:
    digits = match[0][2:].lower()
    repeated = digits in (digits + digits)[1:-1]  # 0x000...0, 0xdeadbeef...
    return None if repeated or len(set(digits)) < 5 else match.span()


_has_base58 = where(r"[1-9DKLMTX][1-9A-HJ-NP-Za-km-z]{25}")

RULES = (
    Rule("IBAN_CODE", numbers, _IBAN, _iban),
    Rule("CREDIT_CARD", numbers, _CARD, _card),
    Rule(
        "CRYPTO_ADDRESS",
        _has_base58,
        re.compile(r"(?<![0-9A-Za-z])[1-9DKLMTX][1-9A-HJ-NP-Za-km-z]{25,51}(?![0-9A-Za-z])"),
        _base58,
    ),
    Rule("CRYPTO_ADDRESS", _has_base58, _MONERO, _monero),
    Rule(
        "CRYPTO_ADDRESS",
        where(r"1[02-9ac-hj-np-z]{38}|1[02-9AC-HJ-NP-Z]{38}"),
        re.compile(
            r"(?<![0-9A-Za-z])(?:bc|ltc|tb|addr|stake|cosmos|nsec|age)1[02-9ac-hj-np-z]{38,100}(?![0-9A-Za-z])",
            re.IGNORECASE,
        ),
        _bech32,
    ),
    Rule(
        "CRYPTO_ADDRESS",
        everywhere,
        re.compile(r"(?<![0-9A-Za-z])0[xX][0-9A-Fa-f]{40}(?![0-9A-Za-z])"),
        _ethereum,
        ("0x", "0X"),
    ),
)
