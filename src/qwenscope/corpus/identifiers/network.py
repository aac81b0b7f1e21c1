"""IP addresses and hardware (MAC) addresses."""

from __future__ import annotations

import ipaddress
import re

from qwenscope.corpus.identifiers.rules import Rule, Span, after, after_words, before, claimed, where

_IPV4 = re.compile(r"(?:(?<![0-9A-Za-z.])|(?<=IP)|(?<=ip))(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
_IPV4_IN_NAME = re.compile(r"(?<![0-9])(?<!(?<![A-Za-z])[0-9]-)(?:[0-9]{1,3}-){3}[0-9]{1,3}(?=\.[A-Za-z])")
_IPV6 = re.compile(r"(?<![0-9A-Fa-f:])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,45}(?![0-9A-Fa-f:])")
_MAC = re.compile(
    r"(?<![0-9A-Za-z])(?<!(?<![G-Zg-z])[0-9A-Fa-f]{2}[:\-])(?:[0-9A-Fa-f]{2}([:\-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}"
    r"|[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4})(?![0-9A-Za-z]|[:\-.][0-9A-Fa-f])"
)
_MAC_WORDS = ("mac", "MAC", "Mac", "hwaddr", "HWaddr", "bssid", "BSSID")
_MAC_GLUED = re.compile(  # twelve digits in a row, after their word
    rf"(?<![A-Za-z])(?:{'|'.join(_MAC_WORDS)})(?i:[ _]?addr(?:ess)?)?[\"']?(?: is)?[\s:=]{{1,3}}[\"']?"
    r"([0-9A-Fa-f]{6}-?[0-9A-Fa-f]{6})(?![0-9A-Za-z])"
)
_VERSION_BEFORE = re.compile(
    r"(?:(?:\b|_)(?:v|ver|version|release|build|firmware|chapter|section|oid|asn\.1|driver|update|patch|sdk|chrome|chromium"
    r"|edge?|opr|"
    r"версия|версии|верс|versión|versão|wersja|sürüm|phiên bản|"
    r"opera|safari|firefox|kernel|linux|windows|macos|ios|android|cuda|nginx|apache|openssl|php|java|jdk)[\W_]{0,4}"
    r"|(?:版本|版|バージョン|버전|إصدار|גרסה)\W{0,3}|[=<>~^]=\s?[\"']?)$",
    re.IGNORECASE,
)
_NOT_AN_ADDRESS_AFTER = re.compile(  # versions, names of files
    r"-?(?:alpha|beta|rc|dev|snapshot|final|release|post)|\.(?:png|jpe?g|gif|svg|webp|pdf|csv|txt|json|zip|tar|gz|mp[34])\b",
    re.IGNORECASE,
)
_PUBLIC_RESOLVERS = frozenset(
    re.findall(
        r"\S+", """8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 149.112.112.112 208.67.222.222 208.67.220.220 4.2.2.2"""
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_PLACEHOLDER_MACS = frozenset(
    re.findall(r"\S+", "001122334455 aabbccddeeff 0123456789ab deadbeef0000 112233445566 123456789abc")
)


def _ipv4(match: re.Match[str]) -> Span | None:
    try:
        address = ipaddress.IPv4Address(match[0].replace("-", "."))
    except ValueError:
        return None
    octets = address.packed
    if _VERSION_BEFORE.search(before(match)) or _NOT_AN_ADDRESS_AFTER.match(after(match)):
        return None
    if address.is_loopback or address.is_unspecified or address.is_multicast or octets[0] == 255:
        return None
    version = max(octets) < 10 or octets[1:] == b"\0\0\0"  # 1.2.3.4 and 2.0.0.0 are hardly anybody's
    public = address.is_global and not version and str(address) not in _PUBLIC_RESOLVERS
    return match.span() if public or claimed(match) else None


def _ipv6(match: re.Match[str]) -> Span | None:
    start, end = match.span()
    value = match[0]
    if value.count(":") < 2:
        return None
    if value[0] == ":" and value[1] != ":":  # the end of "addr:"
        value, start = value[1:], start + 1
    if value[-1:] == ":" and value[-2:] != "::":
        value, end = value[:-1], end - 1
    try:
        address = ipaddress.IPv6Address(value)
    except ValueError:
        return None
    if address not in _GLOBAL_UNICAST:  # code is full of a::b
        return None
    public = address.is_global and str(address) not in _PUBLIC_RESOLVERS
    return (start, end) if public or claimed(match) else None


def _mac(match: re.Match[str]) -> Span | None:
    digits = re.sub(r"[^0-9a-f]", "", match[0].lower())
    named = re.search(r"(?<![A-Za-z])(?:mac|hwaddr|ether|bssid|hardware)(?![A-Za-z])", before(match), re.IGNORECASE)
    if digits in _PLACEHOLDER_MACS or len(set(digits)) < 3 or (digits.isdecimal() and not named):
        return None
    return match.span()


def _mac_glued(match: re.Match[str]) -> Span | None:
    return match.span(1) if len(set(match[1])) > 3 else None


_has_dots = where(r"\.[0-9]{1,3}\.[0-9]")
_has_dashes = where(r"-[0-9]{1,3}-[0-9]{1,3}\.")
_has_colons = where(r":[0-9A-Fa-f]{0,4}:")
_has_pairs = where(r":[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}")
_has_dashed_pairs = where(r"-[0-9A-Fa-f]{2}-[0-9A-Fa-f]{2}-")
_has_quads = where(r"\.[0-9A-Fa-f]{4}\.")

RULES = (
    Rule("IP_ADDRESS", _has_dots, _IPV4, _ipv4),
    Rule("IP_ADDRESS", _has_dashes, _IPV4_IN_NAME, _ipv4),
    Rule("IP_ADDRESS", _has_colons, _IPV6, _ipv6),
    Rule("MAC_ADDRESS", after_words(_MAC_WORDS, 6), _MAC_GLUED, _mac_glued),
    *(Rule("MAC_ADDRESS", gate, _MAC, _mac) for gate in (_has_pairs, _has_dashed_pairs, _has_quads)),
)
