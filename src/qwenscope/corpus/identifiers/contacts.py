"""E-mail addresses and phone numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import phonenumbers

from qwenscope.corpus.identifiers.folding import MARK
from qwenscope.corpus.identifiers.rules import (
    GAP,
    Rule,
    Span,
    after,
    before,
    claimed,
    cue,
    everywhere,
    is_named_by,
    numbers,
)

_LATIN = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_UNSPACED = (
    r"\u0590-\u06ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff"
    r"\u3005-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7a3"
)
_MARKS = r"0-9._+%'&\-"  # what may stand in a local part beside letters
_LOCAL_REVERSED = re.compile(  # one script only: a word of another one before it is prose
    rf"[{_MARKS}{MARK}]*(?![{_LATIN}{_UNSPACED}{_MARKS}{MARK}])\w(?:(?![{_LATIN}{_UNSPACED}])\w|[{_MARKS}])*"
    rf"|[{_LATIN}{_MARKS}{MARK}]+|[{_UNSPACED}{_MARKS}{MARK}]+"
)
_TLD = (  # scripts without spaces need to know where a domain ends
    "中国|中國|公司|网络|網路|网址|香港|台湾|台灣|新加坡|澳門|在线|商城|集团|我爱你|みんな|コム|한국|닷컴|닷넷|삼성|ไทย|คอม"
)
_DOT = r"(?:\.|\s?[\[({<](?:dot|DOT|\.)[\])}>]\s?|\s(?:dot|DOT)\s)"
_DOMAIN = re.compile(
    rf"(?:[0-9A-Za-z](?:[0-9A-Za-z\-]{{0,62}}[0-9A-Za-z])?{_DOT}){{1,16}}(?:xn--[0-9A-Za-z\-]{{2,59}}|[A-Za-z]{{2,24}})"
    rf"|(?:[^\W_](?:[\w\-]{{0,62}}[^\W_])?{_DOT}){{1,8}}(?:[A-Za-z]{{2,24}}|{_TLD}"
    rf"|(?:(?![{_LATIN}{_UNSPACED}])[^\W\d_]){{2,24}}|[{_UNSPACED}{MARK}]{{2,10}})"
)
_SPELLED = [*(word + end for word in ("at", "AT") for end in ")]}>"), " dot ", " DOT "]
_AT = re.compile(
    r"@|\s?[\[({<](?:at|AT|@)[\])}>]\s?|\s(?:at|AT)\s(?=[0-9A-Za-z\-]{1,63}\s(?:dot|DOT)\s(?i:com|org|net|edu|gov|info|io|de|fr|uk|pl|ru|cn|jp|nl|br)\b)"
)


def _at_signs(text: str) -> Sequence[Span]:
    return everywhere(text) if "@" in text or is_spelled(text) else ()


def is_spelled(text: str) -> bool:
    """Whether an e-mail address may stand there without its sign."""
    return any(sign in text for sign in _SPELLED)


_PLACEHOLDER = (
    r"(?:foo|bar|baz|qux|abc|xyz|tests?|tester|e?-?mail|users?|user-?name|name|first|last|some(?:one|body)|anyone|you|"
    r"me|host|server|domain|site|website|company|corp|org|sample|demo|dummy|fake|placeholder|info|admin|contact)\d*"
)
_STAYS = re.compile(  # local part @ domain, in lower case
    r"(?:git|no-?_?reply|do-?not-?reply|mailer-daemon)@.*|.*@(?:.+\.)?(?:localhost|v?\d+\.\d+.*|v\d+\..*|\d+x\..*)"
    rf"|{_PLACEHOLDER}(?:[._\-]{_PLACEHOLDER})*@(?:.+\.)?{_PLACEHOLDER}\.[a-z]+|\w@\w\.\w+|(?:your|my"
    rf"|example)[\w.\-]*@.*|(?:self\.|.*@self\.).*"
    r"|.*@(?:.+\.)?your[\w\-]*\.\w+|.*\.(?:png|jpe?g|gif|svg|webp|html?|css|txt|json|ya?ml|xml|js|ts|java|php"
    r"|shape|sum|mean)"
)
_EXAMPLE_DOMAIN = re.compile(
    r"(?:.+\.)?(?:example(?:\.[a-z]{2,3}){0,2}|.+\.(?:test|example|invalid)|(?:company|domain|mydomain"
    r"|test)\.(?:com|org|net))"
)
_PASSWORD_BEFORE = re.compile(r"://[^\s:@/]{0,64}:$")
_METHOD_CALL = re.compile(r"\(\s*(?:\)|-?\d+\s*[,)]|\w+\s*=)|\s*@")


def _email(match: re.Match[str]) -> Span | None:
    text, at = match.string, match.start()
    local = _LOCAL_REVERSED.match(text[max(0, at - 320) : at][::-1])
    domain = _DOMAIN.match(text, match.end())
    if local is None or domain is None or not re.search(r"\w", local[0]):
        return None
    name = local[0][::-1].lstrip(".'&-%" + MARK)
    spelled = f"{name}@{domain[0]}".lower()
    if not name or _STAYS.fullmatch(spelled) or _METHOD_CALL.match(text, domain.end()):
        return None
    start = at - len(name)
    if _PASSWORD_BEFORE.search(text[max(0, start - 80) : start]):
        return None
    if _EXAMPLE_DOMAIN.fullmatch(domain[0].lower()) and not claimed_at(text, start):
        return None
    return start, domain.end()


def claimed_at(text: str, start: int) -> bool:
    """As `claimed`, for an identifier that starts before its candidate."""
    match = re.compile("").match(text, start)
    return match is not None and claimed(match)


_PHONE_CUE = cue(
    r"(?<![A-Za-z])(?:(?:(?:tele|mobile|cell|home|work|office|my|contact)[_ ]?)?phone(?:[_ ]?(?:number|no|nr"
    r"|num))?|tel|telefone?|"
    r"telefon[oa]?|t[eé]l[eé]phone|t[eé]l|telefoon|teléfono|celular|móvil|portable|mobile?|mobil|mob|cell|fax"
    r"|call|ring|dial|"
    r"whats?app|viber|signal|sms|text (?:me|us)|(?:my|our) number|(?:reach|contact) (?:me|us)|handy|rufen sie|ruf"
    r"|zadzwo[nń]\w*|dzwo[nń]\w*|bel|volej\w*|zavolej\w*|cellulare|chiama\w*|sun[aă]\w*|h[ií]vj\w*|soita|telefonsz[aá]m\w*|hubungi|"
    r"telp|hp|gsm|puhelin|tlf|điện thoại|đt|sđt|cep)(?![A-Za-z])"
    r"|wa\.me/|[?&]phone=|telegram|微信|телефон|тел(?!\w)|моб|звони|факс|позвони|номер|電話|电话|手机|手機|致电|致電|拨打|撥打|携帯|ファックス"
    r"|传真|傳真|전화|휴대폰|연락처|핸드폰|هاتف|جوال|اتصل|تلفن|موبايل|موبایل|טלפון|נייד|फ.?ोन|मोबाइल|โทร|มือถือ|τηλ"
)
_EXTENSION = re.compile(
    r"[ \t,;]{0,3}(?:ext(?:ension|n)?|extensión|x|"
    r"доб(?:авочный)?|внутр|转|轉|分机|分機|内線|내선|ramal|poste|int|interno|"
    r"durchwahl|dw|#)[.:= \t]{0,3}[0-9]{1,6}(?![0-9])",
    re.IGNORECASE,
)
_REGIONS = [
    "US",
    "GB",
    "DE",
    "FR",
    "IN",
    "CN",
    "JP",
    "RU",
    "BR",
    "VN",
    "KR",
    "MX",
    "ES",
    "IT",
    "TR",
    "ID",
    "PH",
    "TH",
    "PL",
    "UA",
    "NL",
    "AU",
    "ZA",
    "NG",
    "EG",
    "SA",
    "AE",
    "PK",
    "BD",
    "IR",
    "AR",
    "CO",
    "IL",
    "TW",
    "HK",
    "SG",
    "MY",
    "SE",
    "NO",
    "DK",
    "FI",
    "PT",
    "GR",
    "CZ",
    "HU",
    "RO",
    "CH",
    "AT",
    "BE",
    "IE",
    "CA",
    "NZ",
    "KZ",
    "BY",
]
_RESERVED = re.compile(r"\+?(?:1\d{3}55501\d\d|44(?:20794 ?60|7700900|1632960|1134960|1144960|1154960|1214960)\d{3})")
_FICTION = re.compile(
    r"\b(?:fiction(?:al)?|drama|example|dummy|fake|placeholder|reserved|documentation)\b", re.IGNORECASE
)
_DATE = re.compile(r"(?:19|20)\d\d[-./ ]\d\d?[-./ ]\d\d?(?!\d)|\d\d?[-./]\d\d?[-./](?:19|20)\d\d(?!\d)")


@lru_cache(maxsize=4096)
def is_phone_number(number: str, region: str | None) -> bool:
    """Whether a numbering plan has `number`; `region` (an ISO code) for numbers without a country code."""
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _cuts(value: str) -> list[str]:
    """`value`, then without its last groups, as long as seven digits are left: the last ones may be another number."""
    ends = [len(value), *(gap.start() for gap in reversed(list(re.finditer(rf"(?<=[0-9])(?![0-9]){GAP}", value))))]
    parts = [value[:end] for end in dict.fromkeys(ends)][:5]
    return [part for part in parts if sum(char.isdecimal() for char in part) >= 7]


def _with_extension(match: re.Match[str], length: int) -> Span:
    end = match.start() + length
    extension = _EXTENSION.match(match.string, end)
    return match.start(), extension.end() if extension else end


def _international(match: re.Match[str]) -> Span | None:
    for value in _cuts(match[0]):
        digits = re.sub(r"[^0-9]", "", value)
        number = "+" + digits.removeprefix("00") if value[0] == "0" else "+" + digits
        if value[0] == "0" and re.match(r"00[^0-9]*[0-9]{1,3}[^0-9]*0", value):  # 0049 0050: columns of numbers
            continue
        if is_phone_number(number, None):
            fiction = _RESERVED.fullmatch(number) and _FICTION.search(after(match, match.start() + len(value)))
            return None if fiction else _with_extension(match, len(value))
    return None


def _national(match: re.Match[str]) -> Span | None:
    text = before(match)
    linked = text.endswith(("wa.me/", "?phone=", "&phone="))
    american = re.compile(r"(?:1[-. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d-)[2-9]\d\d-\d{4}(?!-?\d)").match(match[0])
    if _DATE.match(match[0]) or (not american and not is_named_by(_PHONE_CUE, text)):
        return None
    for value in [american[0]] if american else _cuts(match[0]):
        digits = re.sub(r"[^0-9]", "", value)
        if digits in "012345678901234567890" or len(set(digits)) < 3 or re.search("0{5}$|^555....$", digits):
            continue
        if linked and is_phone_number("+" + digits, None):
            return _with_extension(match, len(value))
        regions = ["US"] if american else _REGIONS
        if any(is_phone_number(digits, region) for region in regions):
            return _with_extension(match, len(value))
    return None


RULES = (
    Rule("EMAIL_ADDRESS", _at_signs, _AT, _email),
    Rule(
        "PHONE_NUMBER",
        numbers,
        re.compile(
            rf"(?:(?:(?<![0-9A-Za-z_)])|(?<=[Tt]el)|(?<=hone)|(?<=ax)|(?<=App))\+\(?"
            rf"|(?<![0-9A-Za-z_+])(?<![0-9][.\-])00(?=[1-9]))[0-9](?:{GAP}[0-9]){{6,16}}(?![0-9])"
        ),
        _international,
    ),
    Rule(
        "PHONE_NUMBER",
        numbers,
        re.compile(
            rf"(?<![0-9A-Za-z_+])(?:(?<![0-9][.,\-])|(?<=[0-9],)(?=\(?[2-9][0-9][0-9][)\-]))"
            rf"\(?[0-9](?:{GAP}[0-9]){{6,13}}(?![0-9%])"
        ),
        _national,
    ),
)
