"""Structured identifiers in text: e-mail addresses, IBANs, payment cards, phone numbers, IP addresses.

Each kind has a pattern for candidates and a check that decides: registry lengths and checksums (IBAN, Luhn), the phone
numbering plans of `phonenumbers`, the address registries of `ipaddress`. Values that documentation uses (example.com,
test cards, 192.0.2.0/24, private networks) are allowed, unless the words before them claim them as somebody's own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

import phonenumbers


@dataclass(frozen=True, slots=True, order=True)
class Identifier:
    """A span of text; `kind` is EMAIL_ADDRESS, IBAN_CODE, CREDIT_CARD, PHONE_NUMBER or IP_ADDRESS."""

    start: int
    end: int
    kind: str


def find_identifiers(text: str) -> list[Identifier]:
    """Identifiers in order, none overlapping; of two that overlap the one that starts first stays.

    >>> find_identifiers("mail bo@firm.de")
    [Identifier(start=5, end=15, kind='EMAIL_ADDRESS')]
    """
    if not _MAYBE.search(text):  # most text has no digit run and no @
        return []
    found = []
    for kind, pattern, check in _KINDS:
        for match in pattern.finditer(text):
            if check(match[0], text[max(0, match.start() - _CONTEXT) : match.start()]):
                found.append(Identifier(match.start(), match.end(), kind))
    kept: list[Identifier] = []
    for identifier in sorted(found, key=lambda found: (found.start, -found.end)):
        if not kept or identifier.start >= kept[-1].end:
            kept.append(identifier)
    return kept


_CONTEXT = 48  # characters before a candidate that may claim it

_MAYBE = re.compile(r"@|\d[\d .()/\-]{5}|\d\.\d|[0-9a-fA-F]:[0-9a-fA-F:]")

_EMAIL = re.compile(
    r"(?<![\w.+\-/@])[\w+\-][\w.+\-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,62}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w@])"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ \-]?[A-Z0-9]{4}){2,7}(?:[ \-]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(r"(?<![\w.,+\-])(?:\d[ \-]?){12,18}\d(?![\w\-]|[.,]\d)")
_PHONE = re.compile(r"(?<![\w.,+\-/=])(?:\+|00|\()?\d(?:[ \t.\-/()]{0,3}\d){6,16}(?![\w%]|[.,:/\-]\d)")
_IPV4 = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:|:){2,8}[0-9a-fA-F]{0,4}(?![\w:.])")

_OWN = re.compile(
    r"\b(?:my|mine|our|his|her|their|me|call(?:ed)?|reach|contact|e-?mail|mail|log(?:ged)?[ \-]?in|signed in|came from|"
    r"connect(?:ed|ing|ion)? from|visitor|user(?:'s)?|customer(?:'s)?)\b[^\n]*$",
    re.IGNORECASE,
)
_PHONE_WORD = re.compile(
    r"\b(?:phone|tel|telephone|telefon|mobile|cell|fax|call|whatsapp|sms|text me|ring|dial|handy)\b[^\n\d]*$",
    re.IGNORECASE,
)
_VERSION_WORD = re.compile(r"\b(?:v|ver|version|release|build|firmware|chapter|section|oid)\W{0,3}$", re.IGNORECASE)

_EXAMPLE_DOMAIN = re.compile(
    r"@(?:.+\.)?(?:example(?:\.(?:com|org|net|edu))?|.+\.(?:test|example|invalid|localhost|local))$", re.I
)
_SHARED_MAILBOX = re.compile(r"^(?:git|noreply|no-reply)@", re.IGNORECASE)
_TEST_CARDS = frozenset(
    re.findall(
        r"\d+",
        """4111111111111111 4012888888881881 4242424242424242 4000056655665556 5555555555554444 5105105105105100
        2223003122003222 378282246310005 371449635398431 6011111111111117 6011000990139424 30569309025904 38520000023237
        3530111333300000 3566002020360505 4222222222222""",
    )
)
_CARD_PREFIX = re.compile(r"3[0-9]|4|5[0-9]|6|2[2-7]")
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        """AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29
        ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20
        LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29
        PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20
        YE30""",
    )
}
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_PUBLIC_RESOLVERS = frozenset(
    ("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220", "4.2.2.2")
)


def _is_email(value: str, before: str) -> bool:
    if _SHARED_MAILBOX.match(value):
        return False
    return not _EXAMPLE_DOMAIN.search(value) or bool(_OWN.search(before))


def _is_iban(value: str, before: str) -> bool:
    code = re.sub(r"[ \-]", "", value)
    if _IBAN_LENGTHS.get(code[:2]) != len(code):
        return False
    digits = "".join(str(int(char, 36)) for char in code[4:] + code[:4])
    return int(digits) % 97 == 1


def _is_card(value: str, before: str) -> bool:
    digits = re.sub(r"[ \-]", "", value)
    if not _CARD_PREFIX.match(digits) or (len(set(digits)) < 3 and digits not in _TEST_CARDS):
        return False
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    if sum(number - 9 if number > 9 else number for number in doubled) % 10:
        return False
    grouped = re.fullmatch(r"\d+|\d{4}([ \-])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ \-])\d{6}\2\d{4,5}", value)
    return grouped is not None and (digits not in _TEST_CARDS or bool(_OWN.search(before)))


def _is_phone(value: str, before: str) -> bool:
    international = value.startswith(("+", "00"))
    if not international and not _PHONE_WORD.search(before) and not re.fullmatch(r"\(\d{3}\) ?\d{3}-\d{4}", value):
        return False
    number = "+" + value[2:] if value.startswith("00") else value
    for region in (None,) if international else ("US", "GB", "DE", "FR", "IN"):
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def _is_ip(value: str, before: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or address.is_multicast or _VERSION_WORD.search(before):
        return False
    if address.version == 6 and address not in _GLOBAL_UNICAST:  # code is full of a::b
        return False
    public = address.is_global and value not in _PUBLIC_RESOLVERS
    return public or bool(_OWN.search(before))


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str, str], bool]], ...] = (
    ("EMAIL_ADDRESS", _EMAIL, _is_email),
    ("IBAN_CODE", _IBAN, _is_iban),
    ("CREDIT_CARD", _CARD, _is_card),
    ("PHONE_NUMBER", _PHONE, _is_phone),
    ("IP_ADDRESS", _IPV4, _is_ip),
    ("IP_ADDRESS", _IPV6, _is_ip),
)
