"""Invented identifiers of every kind, as people write them; checksums from their published rules."""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable
from pathlib import Path

import yaml

TEMPLATES: dict[str, dict[str, list[str]]] = yaml.safe_load(
    Path(__file__).with_name("privacy_templates.yaml").read_text(encoding="utf-8")
)
ALNUM = string.ascii_letters + string.digits


def drawn(rng: random.Random, pattern: str) -> str:
    return re.sub("#", lambda _: rng.choice(string.digits), pattern)


def _luhn(digits: str) -> str:
    """The digit that completes `digits`."""
    doubled = [int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(digits))]
    return str(-sum(number // 10 + number % 10 for number in doubled) % 10)


def _email(rng: random.Random) -> str:
    first = rng.choice(
        re.findall(r"\S+", "maria.kovacs li_na j.tanaka o.petrov+news josé.niño ana-b x9 почта.иван s.cohen 4815162342")
    )
    host = rng.choice(
        re.findall(
            r"\S+",
            """fastmail-test.net foxmail-test.com mail.firma-test.de docomo-test.jp пример-тест.рф uni-test.ac.uk
            163-test.com xn--bcher-kva.example-test.org""",
        )
    )
    return f"{first}@{host}"


def _iban(rng: random.Random) -> str:
    country, length, bank = rng.choice(
        [
            ("DE", 18, ""),
            ("GB", 14, "NWBK"),
            ("NL", 10, "ABNA"),
            ("FR", 23, ""),
            ("ES", 20, ""),
            ("AT", 16, ""),
            ("MT", 23, "MALT"),
            ("SA", 20, ""),
            ("TR", 22, ""),
            ("NO", 11, ""),
        ]
    )
    body = bank + "".join(rng.choices(string.digits, k=length))
    if country == "TR":
        body = body[:5] + "0" + body[6:]
    number = "".join(str(int(char, 36)) for char in body + country + "00")
    code = f"{country}{98 - int(number) % 97:02d}{body}"
    return code if rng.random() < 0.5 else " ".join(code[i : i + 4] for i in range(0, len(code), 4))


def _card(rng: random.Random) -> str:
    body = rng.choice(["4539", "5425", "2221", "6011", "3566", "6212"]) + "".join(rng.choices(string.digits, k=11))
    body += _luhn(body)
    return rng.choice([body, " ".join(re.findall("....", body)), "-".join(re.findall("....", body))])


def _phone(rng: random.Random) -> str:
    return drawn(rng, rng.choice([
        "+44 7911 12####", "+1 (212) 736-5###", "+1.212.736.5###", "+49 30/9018##", "+86 138 1### 5678",
        "+33 6 12 34 ## ##",
        "+55 11 9123#-####", "+81 90-1###-5678", "+91 98765 4####", "+7 916 12#-##-##", "+12127365###",
        "0044 7911 12####",
        "+972 50-23#-####", "+66 81 23# ####", "+90 532 12# ## ##", "+44 7911 12#### ext. 12",
        "+49 (0)30 9018##"]))  # fmt: skip


def _ip(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice([81, 93, 145, 203])}.{rng.randint(20, 100)}.{rng.randint(100, 250)}.{rng.randint(10, 250)}"
    groups = [f"{rng.randrange(1, 1 << 16):x}" for _ in range(5)]
    return f"2a02:8109:{groups[0]}::{groups[1]}" if rng.random() < 0.5 else "2a02:8109:9ac0:" + ":".join(groups)


def _mac(rng: random.Random) -> str:
    pairs = [f"{rng.randrange(256):02x}" for _ in range(5)] + ["7e"]
    return (
        rng.choice([":", "-"]).join(pairs)
        if rng.random() < 0.8
        else f"{pairs[0]}{pairs[1]}.{pairs[2]}{pairs[3]}.{pairs[4]}7e"
    )


def _crypto(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return "0x" + rng.randbytes(20).hex()
    payload = rng.choice([b"\x00", b"\x05"]) + rng.randbytes(20)
    payload += hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4]
    number, out = int.from_bytes(payload, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        out = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[rest] + out
    return "1" * (len(payload) - len(payload.lstrip(b"\0"))) + out


def _secret(rng: random.Random) -> str:
    def token(length: int, letters: str = ALNUM) -> str:
        return "7aQ" + "".join(rng.choices(letters, k=length - 3))

    upper, lower = string.ascii_uppercase + "234567", string.hexdigits[:16]
    return rng.choice([
        f"sk-proj-{token(48)}", f"sk-ant-api03-{token(60)}", f"hf_{token(34)}",
        "AKIA" + "".join(rng.choices(upper, k=15)) + "7",
        f"ghp_{token(36)}", f"github_pat_{token(60)}", f"glpat-{token(20)}", "AIza" + token(35),
        f"xoxb-{drawn(rng, '############')}-{token(24)}",
        f"sk_live_{token(24)}", f"npm_{token(36)}", f"SG.{token(22)}.{token(43)}",
        f"{drawn(rng, '61########')}:AA{token(33)}",
        f"gsk_{token(52)}", f"eyJhbGciOiJIUzI1NiJ9.eyJ{token(20)}.{token(43)}",
        "dop_v1_" + "7" + "".join(rng.choices(lower, k=63)),
        f"-----BEGIN PRIVATE KEY-----\n{token(64)}\n{token(40)}\n-----END PRIVATE KEY-----"])  # fmt: skip


def _profile(rng: random.Random) -> str:
    name = rng.choice(re.findall(r"\S+", "mariakovacs li.na_88 jtanaka o_petrov anab1990 sara-cohen"))
    hosts = re.findall(
        r"\S+",
        """https://github.com/ github.com/ https://twitter.com/
        https://x.com/ https://www.instagram.com/ linkedin.com/in/ t.me/
        https://www.reddit.com/u/ https://www.tiktok.com/@ https://vk.com/ facebook.com/ https://medium.com/@""",
    )
    return rng.choice(hosts) + name


def national_phone(rng: random.Random, language: str) -> str:
    return drawn(rng, rng.choice(TEMPLATES[language]["phones"]))


def passport(rng: random.Random, language: str) -> str:
    return drawn(rng, rng.choice(["C01X0#T4#", "AB#######", "#########", "X#######"]))


def handle(rng: random.Random, language: str) -> str:
    return "@" + rng.choice(re.findall(r"\S+", "maria_kovacs lina88 j.tanaka opetrov ana_b1990 saracohen"))


def _weighted(digits: str, weights: list[int], modulus: int) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True)) % modulus


def _verhoeff(digits: str) -> str:
    """The check digit in the dihedral group of order 10."""

    def product(a: int, b: int) -> int:
        if a < 5:
            return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
        return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5

    permutation = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    check = 0
    for place, digit in enumerate(reversed(digits), start=1):
        value = int(digit)
        for _ in range(place % 8):
            value = permutation[value]
        check = product(check, value)
    return str(next(digit for digit in range(10) if product(check, digit) == 0))


def _cpf(rng: random.Random) -> str:
    digits = drawn(rng, "3########")
    for length in (9, 10):
        digits += str(-_weighted(digits, list(range(length + 1, 1, -1)), 11) % 11 % 10)
    return f"{digits[:3]}.{digits[3:6]}.{digits[6:9]}-{digits[9:]}"


def _chinese(rng: random.Random) -> str:
    digits = drawn(rng, "1101051990") + f"{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}" + drawn(rng, "###")
    return digits + "10X98765432"[_weighted(digits, [2 ** (17 - place) % 11 for place in range(17)], 11)]


def _german_tax(rng: random.Random) -> str:
    digits = "1" + "".join(rng.sample("023456789", 8)) + "0"
    digits = digits if digits.count("0") == 2 else digits[:-1] + digits[-2]
    product = 10
    for digit in digits:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return digits + str((11 - product) % 10)


def _nir(rng: random.Random) -> str:
    digits = drawn(rng, "2 8# 05 75 1## 1##")
    return f"{digits} {97 - int(digits.replace(' ', '')) % 97:02d}"


def _dni(rng: random.Random) -> str:
    digits = drawn(rng, "4#######")
    return digits + "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23]


def _snils(rng: random.Random) -> str:
    digits = drawn(rng, "1########")
    check = _weighted(digits, list(range(9, 0, -1)), 101) % 100
    return f"{digits[:3]}-{digits[3:6]}-{digits[6:]} {check:02d}"


def _my_number(rng: random.Random) -> str:
    digits = drawn(rng, "4##########")
    rest = _weighted(digits, [6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2], 11)
    return digits + str(0 if rest <= 1 else 11 - rest)


def _korean(rng: random.Random) -> str:
    digits = f"{rng.randint(60, 99)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}" + drawn(rng, "108###")
    check = (11 - _weighted(digits, [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5], 11)) % 10
    return f"{digits[:6]}-{digits[6:]}{check}"


def _israeli(rng: random.Random) -> str:
    digits = drawn(rng, "3#######")
    return digits + _luhn(digits)


def _thai(rng: random.Random) -> str:
    digits = drawn(rng, "1###########")
    digits += str((11 - _weighted(digits, list(range(13, 1, -1)), 11)) % 10)
    return "-".join((digits[0], digits[1:5], digits[5:10], digits[10:12], digits[12]))


def _turkish(rng: random.Random) -> str:
    digits = drawn(rng, "1########")
    odd, even = sum(map(int, digits[0::2])), sum(map(int, digits[1::2]))
    digits += str((odd * 7 - even) % 10)
    return digits + str(sum(map(int, digits)) % 10)


def _aadhaar(rng: random.Random) -> str:
    digits = drawn(rng, "5##########")
    digits += _verhoeff(digits)
    return " ".join(re.findall("....", digits))


def _ssn(rng: random.Random) -> str:
    return f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"


_IDS: dict[str, Callable[[random.Random], str]] = {
    "en": _ssn, "code": _ssn, "de": _german_tax, "fr": _nir, "es": _dni, "pt": _cpf, "ru": _snils, "zh": _chinese,
    "ja": _my_number,
    "ko": _korean, "he": _israeli, "hi": _aadhaar, "th": _thai, "tr": _turkish,
}  # fmt: skip
VALUES: dict[str, Callable[[random.Random], str]] = {
    "EMAIL_ADDRESS": _email, "IBAN_CODE": _iban, "CREDIT_CARD": _card, "PHONE_NUMBER": _phone, "IP_ADDRESS": _ip,
    "MAC_ADDRESS": _mac, "CRYPTO_ADDRESS": _crypto, "SECRET": _secret, "USERNAME": _profile,
    "NATIONAL_ID": lambda rng: rng.choice([_ssn, _cpf, _chinese, _nir, _snils, _korean, _thai])(rng),
}  # fmt: skip


def national_id(rng: random.Random, language: str) -> str:
    return _IDS[language](rng)
