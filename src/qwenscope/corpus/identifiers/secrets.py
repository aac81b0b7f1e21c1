"""Keys, tokens and passwords: the prefixes that services give their keys, and random values named as secrets."""

from __future__ import annotations

import re
from itertools import pairwise

from qwenscope.corpus.identifiers.rules import Rule, Span, after_words, before, where

_KEYS = {  # a literal of the key -> its pattern; an empty one for prefix, then at least 20 of the usual characters
    "sk-": r"sk-(?:proj-|svcacct-|admin-|ant-(?:api|admin)\d\d-|or-v1-|lf-)?[\w\-]{20,220}",
    "hf_": r"hf_[A-Za-z0-9]{30,60}",
    "KIA": r"(?:AKIA|ABIA|ACCA)[A-Z2-7]{16}|AKIA[A-Z0-9]{16}",
    "ASIA": r"ASIA[A-Z0-9]{16}",
    "gh": r"gh[pousr]_[A-Za-z0-9]{30,255}",
    "github_pat_": r"github_pat_\w{22,255}",
    "glpat-": r"glpat-[\w\-]{20,100}",
    "AIza": r"AIza[\w\-]{33,39}",
    "ya29.": r"ya29\.[\w\-]{20,400}",
    "GOCSPX-": r"GOCSPX-[\w\-]{20,40}",
    "xox": r"xox[abeoprs]-[\w\-]{10,250}",
    "xapp-": r"xapp-[\w\-]{20,250}",
    "hooks.slack.com": r"hooks\.slack\.com/(?:services|workflows)/[\w/\-]{20,120}",
    "discord": r"discord(?:app)?\.com/api/webhooks/\d{15,22}/[\w\-]{40,100}",
    "_live_": r"(?:sk|rk|pk)_live_[A-Za-z0-9]{10,250}",
    "_test_": r"(?:sk|rk|pk)_test_[A-Za-z0-9]{10,250}",
    "whsec_": r"whsec_[A-Za-z0-9+/=]{20,100}",
    "SG.": r"SG\.[\w\-]{16,32}\.[\w\-]{16,64}",
    "npm_": r"npm_[A-Za-z0-9]{30,50}",
    "pypi-": r"pypi-[\w\-]{40,400}",
    "rubygems_": r"rubygems_[0-9a-f]{40,60}",
    "dckr_pat_": r"dckr_pat_[\w\-]{20,60}",
    "_v1_": r"do[opr]_v1_[0-9a-f]{40,80}",
    "shp": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "gsk_": r"gsk_[A-Za-z0-9]{30,80}",
    "xai-": r"xai-[A-Za-z0-9]{40,120}",
    "pplx-": r"pplx-[A-Za-z0-9]{30,80}",
    "r8_": r"r8_[A-Za-z0-9]{30,50}",
    "nvapi-": r"nvapi-[\w\-]{40,100}",
    "tvly-": r"tvly-[\w\-]{20,60}",
    "dapi": r"dapi[0-9a-f]{32}(?:-\d)?",
    "key-": r"key-[0-9a-zA-Z]{32}",
    "-us": r"[0-9a-f]{32}-us\d{1,2}",
    "EAAA": r"EAAA[\w\-]{50,100}",
    "sq0": r"sq0(?:atp|csp)-[\w\-]{20,60}",
    "secret_": r"secret_[A-Za-z0-9]{40,60}",
    "ntn_": r"ntn_[A-Za-z0-9]{40,60}",
    "lin_api_": r"lin_api_[A-Za-z0-9]{30,60}",
    "figd_": r"figd_[\w\-]{30,60}",
    "hvs.": r"hvs\.[\w\-]{24,120}",
    "AGE-SECRET-KEY-": r"AGE-SECRET-KEY-1[0-9A-Z]{50,64}",
    ":AA": r"(?:bot)?\d{8,10}:AA[\w\-]{30,40}",
    "AC": r"AC[0-9a-f]{32}",
    "SK": r"SK[0-9a-f]{32}",
    "eyJ": r"eyJ[\w\-]{8,4000}\.eyJ[\w\-]{4,8000}(?:\.[\w\-]{4,1000})?",
    "sntry": r"sntry[su]_[\w+/=\-]{40,400}",
    "NRAK-": r"NRAK-[0-9A-Z]{27}",
    "PMAK-": r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
    "glsa_": r"glsa_[0-9A-Za-z]{32}_[0-9A-Fa-f]{8}",
    "rnd_": r"rnd_[0-9A-Za-z]{28,40}",
    "CFPAT-": r"CFPAT-[\w\-]{40,50}",
    "k.eyJ": r"[ps]k\.eyJ[\w\-]{20,200}\.[\w\-]{16,40}",
    "sbp_": r"sbp_[0-9a-f]{40}",
    "ercel_": r"[Vv]ercel_[0-9A-Za-z]{24,60}",
    "ops_eyJ": r"ops_eyJ[\w+/=\-]{200,2000}",
    "tskey-": r"tskey-[a-z]{3,10}-[0-9A-Za-z]{8,20}(?:-[0-9A-Za-z]{16,50})?",
    "pscale_": r"pscale_(?:tkn|oauth|pw)_[\w\-]{32,64}",
    "ATATT": r"ATATT[\w\-]{24,250}(?:=[0-9A-F]{8})?",
    "FLWSECK": r"FLWSECK(?:_TEST)?-[0-9a-f]{12,40}-X",
    "jina_": r"jina_[0-9A-Za-z]{40,80}",
    "pcsk_": r"pcsk_\w{40,80}",
    "fw_": r"fw_[0-9A-Za-z]{22,30}",
    "lsv2_": r"lsv2_[ps][tk]_[0-9a-f]{32}_[0-9a-f]{10}",
    "apify_api_": r"apify_api_[0-9A-Za-z]{30,50}",
    "phc_": r"phc_[0-9A-Za-z]{40,50}",
    "phx_": r"phx_[0-9A-Za-z]{40,50}",
    "fio-u-": r"fio-u-[\w\-=]{60,70}",
    "EAA": r"EAA[A-Z][0-9A-Za-z]{80,250}",
    "bkua_": r"bkua_[0-9a-f]{40}",
    "CCIPAT_": r"CCIPAT_[0-9A-Za-z]{20,30}_[0-9a-f]{40}",
    "dp.": r"dp\.(?:pt|st(?:\.[a-z0-9\-]{1,35})?|ct|sa)\.[0-9A-Za-z]{40,44}",
    "akfx": r"akfx[0-9A-Za-z]{40}",
    "atlasv1.": r"[0-9A-Za-z]{14}\.atlasv1\.[\w=\-]{60,70}",
    "oy2": r"oy2[a-z0-9]{43}",
    "AccountKey=": r"(?<=AccountKey=)[A-Za-z0-9+/=]{60,100}",
}
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?)-----")
_PEM_LINE = re.compile(
    r"(?:\\[nr]|[\s\"'+\\]){0,40}(?:(?:Version|Comment|Proc-Type|DEK-Info):[^\n]{0,100}|[A-Za-z0-9+/=]{40,200}"
    r"|[A-Za-z0-9+/=]{1,80}(?=\s|\\|[\"']|$))"
)
_IN_URL = re.compile(r"(?<=://)[\w.\-%+~]{0,64}:([^\s:@/\"'<>]{3,128})(?=@)")
_VALUE = re.compile(r"(?<=[\s=:\"'`])[0-9A-Za-z+/_\-.~]{20,200}={0,2}(?![\w(])")
_NAME_BEFORE = re.compile(
    r"(?i:(?:api|access|secret|private|auth|account|client|encryption|signing)[_\- ]?(?:key|token|secret)|token"
    r"|secret|passw(?:or)?d|pwd|"
    r"bearer|authorization|credential)s?[\"'`]?(?:\s{0,3}(?:[:=]|:=|=>|is|:\s?[Bb]asic)\s{0,3}|\s)[\"'`]?$"
)
_DUMMY = re.compile(
    r"example|your|xxxx|\*\*\*|placeholder|insert|change.?me|dummy|redacted|todo|replace", re.IGNORECASE
)
_PASSWORD = re.compile(  # its name, and a value in quotes or not
    r"(?:passw(?:or)?[dt]|passphrase|pwd|secret|kennwort|contrase\u00f1a|mot de passe|senha|пароль|密码|密碼"
    r"|パスワード|비밀번호)"
    r"\w{0,24}(?:\\?[\"'`])?\s{0,3}(?::=|=>|[:=]|is)\s{0,3}"
    r"(?:\\?([\"'`])([^\s\"'`<>{}()\[\]\\]{8,128})(?=\\?\1)|((?:[^\s\"'`<>{}()\[\],;&|\\]|&(?!\w{1,40}=)){8,128})(?=[\s,;&|]|$))",
    re.IGNORECASE,
)
_COMMON = re.compile(r"p[a@4][s5$]{2}|pwd|secret|abcd|0123|1234|qwert|://|^[/.~]", re.IGNORECASE)
_VARIABLE = re.compile(r"[$%#]?(?:\{.*\}|\(.*\)|[A-Za-z_.]+)%?")


_has_token = where(r"[0-9](?:(?=[0-9A-Za-z]{8})|(?<=[0-9A-Za-z]{8}[0-9]))")  # nine in a row, one a digit


_OF_PASSWORDS = (
    *("assw", "ASSW", "assphrase", "pwd", "PWD", "ecret", "ECRET", "ennwort", "ontraseña", "t de passe", "enha"),
    *("ароль", "АРОЛЬ", "密码", "密碼", "パスワード", "비밀번호"),
)
_OF_SECRETS = (
    *("key", "Key", "KEY", "oken", "OKEN", "ecret", "ECRET", "assw", "ASSW", "pwd", "PWD", "earer", "redential"),
    "uthoriz",
)


def _looks_random(value: str) -> bool:
    """Many different characters, of two kinds at least, and nothing that says it is an example."""
    body = value.rsplit("_", 1)[-1] if "_live_" in value or "_test_" in value else value
    kinds = sum(any(test(char) for char in body) for test in (str.isdecimal, str.islower, str.isupper))
    return kinds >= 2 and len(set(body)) >= 8 and not _DUMMY.search(value)


def _key(match: re.Match[str]) -> Span | None:
    return match.span() if _looks_random(match[0]) else None


def _pem(match: re.Match[str]) -> Span | None:
    """Through the closing line or, where the text was cut, through the lines that can only be key."""
    text, end = match.string, match.end()
    closing = text.find(f"-----END {match[1]}-----", end, end + 16_384)
    if closing >= 0:
        return match.start(), closing + len(f"-----END {match[1]}-----")
    lines = 0
    while (line := _PEM_LINE.match(text, end)) and (lines == 0 or len(line[0].strip()) >= 40):
        end, lines = line.end(), lines + 1
    return (match.start(), end) if lines else None


def _password_in_url(match: re.Match[str]) -> Span | None:
    dummy = re.fullmatch(r"(?:secret|\W*\w*(?:pass|pwd)\w*\W*|\{.*|x-oauth-basic)", match[1], re.IGNORECASE)
    variable = match[1].startswith("$") and _VARIABLE.fullmatch(match[1])
    return None if dummy or variable or _DUMMY.search(match[1]) else match.span(1)


def _password(match: re.Match[str]) -> Span | None:
    """A value that mixes letters and digits with signs, or both cases and digits many times over; no name in code."""
    quoted = match[2] is not None
    value = match[2] if quoted else match[3]
    kinds = ["aA0!"[0 if c.islower() else 1 if c.isupper() else 2 if c.isdecimal() else 3] for c in value]
    changes = sum(kind != following for kind, following in pairwise(kinds))
    signs = any(sign in value for sign in "!@#$%^&*?")
    mixed = {"a", "A", "0"} <= set(kinds) and changes >= 6
    strong = "0" in kinds and ((signs and changes >= 3 and bool({"a", "A"} & set(kinds))) or (mixed and quoted))
    if not strong or len(set(value)) < 6 or _VARIABLE.fullmatch(value):
        return None
    return None if _DUMMY.search(value) or _COMMON.search(value) else match.span(2 if quoted else 3)


def _assigned(match: re.Match[str]) -> Span | None:
    value = match[0]
    cased = any(char.islower() for char in value) and any(char.isupper() for char in value)
    hexadecimal = re.fullmatch(r"[0-9a-f]{32,128}", value)
    dotted = re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)+|[A-Za-z]+(?:[_\-/.][A-Za-z]+)+\d?", value)  # code: config.tokens.v2
    if not _looks_random(value) or not (cased or hexadecimal) or dotted:
        return None
    return match.span() if _NAME_BEFORE.search(before(match)) else None


RULES = (
    *(
        Rule(
            "SECRET",
            where(literal) if literal == "hf_" else _has_token,
            re.compile(rf"(?<![0-9A-Za-z])(?:{pattern})(?![0-9A-Za-z])", re.ASCII),
            _key,
            (literal,),
        )
        for literal, pattern in _KEYS.items()
    ),
    Rule("SECRET", where("PRIVATE KEY"), _PEM, _pem),
    Rule("SECRET", where("://"), _IN_URL, _password_in_url),
    Rule("SECRET", _has_token, _VALUE, _assigned, _OF_SECRETS),
    Rule("SECRET", after_words(_OF_PASSWORDS, 12), _PASSWORD, _password),
)
